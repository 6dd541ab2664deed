"""The hierarchical rule's Triton step under Triton's interpreter; run by the Triton tests."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

import fastl2o
from fastl2o import HierarchicalRule, LearnedOptimizer
from kernels.hierarchical.config import StepConfig
from kernels.hierarchical.parameters import packed
from tests.optimizers import run_steps, snapshot
from tests.test_hierarchical_huge_gradients import huge_gradients_count_as_the_limit
from tests.test_hierarchical_ops import (
    Problem,
    close,
    problems_are_apart,
    refused_rows_change_nothing,
    skipped_tensors_rest,
)
from tests.test_hierarchical_rule import detached, make

# NaN and Inf go through on purpose; NumPy, which the interpreter computes with, remarks on them.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

# Where the ops have it from: kernels.hierarchical.step is another module of the same file.
step = import_module("fastl2o.kernels.hierarchical.step")

SIZES = (3, 4, 5, 2)
SHAPES: list[tuple[int, ...]] = [(5, 3), (), (0,), (260,)]


@pytest.fixture(autouse=True)
def by_triton() -> Any:
    """Force the backend."""
    with fastl2o.backend("triton"):
        yield


def follows_float64(mine: Problem, rule: HierarchicalRule, steps: int, **options: Any) -> None:
    """Steps of the kernels against the reference in float64."""
    sizes = (rule.param_size, rule.tensor_size, rule.global_size, rule.num_scales)
    twin = make(*sizes)
    count = len(mine.params)
    lr, decay = [0.5 + 0.1 * i for i in range(count)], [0.1 * i for i in range(count)]
    params, state = mine.wide()
    scale = options.get("grad_scale", torch.ones(()))
    sign = -1.0 if options.get("maximize") else 1.0
    for _ in range(steps):
        grads = mine.draw()
        exact: list[Tensor | None] = [sign * g.double() / scale.double() for g in grads]
        mine.step(rule, grads, lr=lr, weight_decay=decay, **options)
        updates, state = twin.reference_step(exact, state)
        state = detached(state)
        for i, update in enumerate(updates):
            assert update is not None
            params[i] = (1 - lr[i] * decay[i]) * params[i] + lr[i] * update.detach()
    expected = [*params, *state.planes, *state.tensors, state.hidden]
    found = [*mine.params, *mine.planes, *mine.tensors, mine.hidden[0]]
    for one, other in zip(found, expected, strict=True):
        close(one.double(), other)
    assert [int(taken) for taken in mine.steps] == state.steps


@pytest.mark.parametrize("sizes", [SIZES, (1, 2, 1, 1), (2, 17, 3, 4)], ids=str)
def test_steps_are_the_reference_in_float64(sizes: tuple[int, ...]) -> None:
    rule = make(*sizes, dtype=torch.float32)
    follows_float64(Problem(rule, SHAPES), rule, 3)


def test_many_tiles_a_chunk_and_many_chunks_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    config = StepConfig(block=32, warps=1, chunk=64, max_programs=2, tensors=2, rows=2)
    asked = []
    monkeypatch.setattr(step, "step_config", lambda *sizes: asked.append(sizes) or config)
    rule = make(*SIZES, dtype=torch.float32)
    follows_float64(Problem(rule, [(290,), (3,), (63,)]), rule, 2)
    assert asked


def test_gradient_scale_and_maximize() -> None:
    rule = make(*SIZES, dtype=torch.float32)
    mine = Problem(rule, [(40,), (7,)])
    follows_float64(mine, rule, 1, grad_scale=torch.tensor(4.0), maximize=True)


def test_gradients_are_written_back_unscaled() -> None:
    rule = make(*SIZES, dtype=torch.float32)
    mine = Problem(rule, [(40,)])
    grads = mine.draw()
    before = grads[0].clone()
    mine.step(rule, grads, grad_scale=torch.tensor(4.0))
    assert torch.equal(grads[0], before / 4)


def test_dtypes_mix_in_one_call() -> None:
    rule = make(*SIZES, dtype=torch.float32)
    results = []
    for backend in ("triton", "reference"):
        mine = Problem(rule, [(20,), (9,), (6, 5), (33,)], state_dtype=torch.bfloat16)
        dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
        mine.params = [p.to(dtype) for p, dtype in zip(mine.params, dtypes, strict=True)]
        with fastl2o.backend(backend):
            for _ in range(2):
                mine.step(rule, mine.draw())
        results.append(mine.everything())
    for found, expected in zip(*results, strict=True):
        assert found.dtype == expected.dtype
        close(found.double(), expected.double(), 2e-2 if found.element_size() == 2 else 1e-2)


def test_planes_are_rounded_by_the_bits_of_the_reference() -> None:
    rule = make(*SIZES, dtype=torch.float32)
    results = []
    for backend, seed in (("triton", 2**40 + 5), ("reference", 2**40 + 5), ("triton", None)):
        mine = Problem(rule, [(0,), (300,), (260,)], state_dtype=torch.bfloat16)
        with fastl2o.backend(backend):
            mine.step(rule, mine.draw(), rounding_seed=seed)
        results.append(torch.cat(mine.planes, dim=1))
    kernel, reference, plain = results
    # A last bit of the float32 value decides only where the draw lies next to it.
    assert float((kernel != reference).double().mean()) <= 2e-3
    torch.testing.assert_close(kernel, reference, rtol=2**-7, atol=1e-30)
    assert not torch.equal(kernel, plain)


def test_problems_of_one_call_are_apart() -> None:
    problems_are_apart("triton")


def test_huge_gradients_count_as_the_limit() -> None:
    huge_gradients_count_as_the_limit("triton")


def test_skipped_tensors_take_no_part() -> None:
    skipped_tensors_rest("triton")


@pytest.mark.parametrize("nonfinite", ["raise", "skip", "pass"])
def test_found_inf_and_refused_gradients_change_nothing(nonfinite: str) -> None:
    rule = make(*SIZES, dtype=torch.float32)
    mine = Problem(rule, [(9,), (33,)])
    grads = mine.draw()
    grads[1][7] = torch.inf
    before = [tensor.clone() for tensor in mine.everything()]
    mine.step(rule, grads, found_inf=torch.ones(()), nonfinite=nonfinite)
    if nonfinite == "raise":
        with pytest.raises(RuntimeError, match="gradient 1 of the list holds NaN or Inf"):
            mine.step(rule, grads)
    with pytest.raises(ValueError, match="problems"):
        mine.step(rule, mine.draw(), problems=[0, 1])
    assert all(torch.equal(a, b) for a, b in zip(before, mine.everything(), strict=True))


@pytest.mark.parametrize("name", ["grad_scale", "found_inf"])
@pytest.mark.parametrize("number", [torch.ones(2), torch.ones((), dtype=torch.float64)], ids=str)
def test_scalars_of_another_kind_are_refused_by_name(name: str, number: Tensor) -> None:
    rule = make(*SIZES, dtype=torch.float32)
    mine = Problem(rule, [(9,)])
    before = [tensor.clone() for tensor in mine.everything()]
    with pytest.raises(ValueError, match=f"{name}: expected 1 contiguous float32 on cpu, got"):
        mine.step(rule, mine.draw(), **{name: number})
    assert all(torch.equal(a, b) for a, b in zip(before, mine.everything(), strict=True))


def test_rows_of_meta_parameters_refused_change_nothing() -> None:
    refused_rows_change_nothing("triton")


def test_tables_are_kept_while_addresses_stay() -> None:
    rule = make(*SIZES, dtype=torch.float32)
    mine, other = Problem(rule, [(9,)]), Problem(rule, [(9,)])
    plans = []
    for each in (mine, mine, other):
        lists = (each.params, each.params, each.planes, each.tensors, each.steps)
        plans.append(step.plan_of(rule, *lists, []))
    assert plans[0] is plans[1]
    assert plans[0] is not plans[2]


def test_rules_of_other_sizes_do_not_share_tables() -> None:
    rules = [make(*sizes, dtype=torch.float32) for sizes in ((3, 4, 5, 2), (6, 4, 5, 1))]
    assert rules[0].num_sums == rules[1].num_sums
    mine = Problem(rules[0], [(9,)])  # where another optimizer's tensors lay before
    lists = (mine.params, mine.params, mine.planes, mine.tensors, mine.steps)
    for rule in rules:
        assert step.plan_of(rule, *lists, []).packed.shape[1] == packed(
            "all", rule.param_size, rule.num_scales
        )


@pytest.mark.parametrize("capturing", [False, True])
def test_a_changed_lr_makes_no_one_wait_for_its_copy(
    capturing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = make(*SIZES, dtype=torch.float32)
    mine = Problem(rule, [(9,)])
    lists = (mine.params, mine.params, mine.planes, mine.tensors, mine.steps)
    plan, copies, kept = step.plan_of(rule, *lists, []), [], []
    made = torch.tensor

    def pinned(rows: Any, *, dtype: torch.dtype, pin_memory: bool = False) -> Tensor:
        table = made(rows, dtype=dtype)
        copies.append((table, pin_memory))
        return table

    class OnDevice:
        is_cuda, device = True, torch.device("cuda", 0)

        def copy_(self, table: Tensor, non_blocking: bool = False) -> None:
            assert table is copies[-1][0]
            assert non_blocking

    monkeypatch.setattr(torch, "tensor", pinned)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(step, "_captured", kept)
    monkeypatch.setattr(plan, "rates", OnDevice())
    for lr in (0.5, 0.5, 0.25):
        plan.set_rates([lr], [0.0])
    tables = [table for table, pin_memory in copies if pin_memory]
    assert [table[0, 2].item() for table in tables] == [0.5, 0.25]
    # what a graph is to read again must not be freed
    assert [id(table) for table in kept] == [id(table) for table in tables if capturing]


def test_sizes_without_kernels_are_refused() -> None:
    rule = HierarchicalRule(param_size=17)
    mine = Problem(rule, [(9,)])
    with pytest.raises(RuntimeError, match="param_size up to 16, not 17"):
        mine.step(rule, mine.draw())


def test_the_optimizer_steps_by_it() -> None:
    rule = make(*SIZES, dtype=torch.float32)
    results = []
    for backend in ("triton", "reference"):
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in SHAPES]
        optimizer = LearnedOptimizer(params, rule, seed=3)
        run_steps(optimizer, 2, backend=backend)
        results.append(snapshot(optimizer))
    for found, expected in zip(*results, strict=True):
        close(found.double(), expected.double())
