"""The in-place Triton step under Triton's interpreter; run by `test_triton_step.py`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastl2o import _ops_reference
from fastl2o.rules import Rule
from kernels.lstm import step
from kernels.lstm.config import StepConfig
from tests import common

# NaN and Inf go through on purpose; NumPy, which the interpreter computes with, remarks on them.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

SHAPES = ((), (0,), (129,), (3, 5))


class Lists:
    """Parameters, gradients, states and counters of a rule over SHAPES."""

    def __init__(
        self,
        rule: Rule,
        param_dtype: torch.dtype = torch.float32,
        state_dtype: torch.dtype = torch.float32,
        kind: str = "normal",
        shapes: tuple[tuple[int, ...], ...] = SHAPES,
    ) -> None:
        generator = torch.Generator().manual_seed(3)
        self.params = [torch.randn(s, generator=generator).to(param_dtype) for s in shapes]
        self.grads = [common.tricky_gradients(kind, s, generator).to(param_dtype) for s in shapes]
        self.states = [common.random_state(rule, s, generator).to(state_dtype) for s in shapes]
        counts = [0.0, 5.0, 2.0, 1000.0][: len(shapes)]
        self.steps = [torch.tensor(k) for k in counts] if rule.needs_step else []

    def double(self) -> Lists:
        """A copy in float64, counters apart."""
        copy = object.__new__(Lists)
        for name in ("params", "grads", "states"):
            setattr(copy, name, [tensor.double() for tensor in getattr(self, name)])
        copy.steps = [tensor.clone() for tensor in self.steps]
        return copy

    def clone(self) -> Lists:
        copy = object.__new__(Lists)
        for name in ("params", "grads", "states", "steps"):
            setattr(copy, name, [tensor.clone() for tensor in getattr(self, name)])
        return copy

    def all(self) -> list[Tensor]:
        return [*self.params, *self.grads, *self.states, *self.steps]

    def run(
        self,
        rule: Rule,
        function=step.step_,
        nonfinite: int = 0,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> Lists:
        meta = rule.flat_parameters().detach()
        function(
            rule, self.params, self.grads, self.states, self.steps, meta, 0.7, 0.1, True,
            nonfinite, grad_scale, found_inf,
        )  # fmt: skip
        return self


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def assert_like_reference(case: common.RuleCase, lists: Lists, **options: object) -> None:
    """Step `lists` and compare with the reference in the same dtypes and in float64."""
    rule, exact_rule = case.make(), case.make(torch.float64)
    plain, exact = lists.clone(), lists.double()
    lists.run(rule, **options)
    plain.run(rule, _ops_reference.step_, **options)
    exact.run(exact_rule, _ops_reference.step_, **options)
    for name in ("params", "states", "grads"):
        parts = (flat(getattr(each, name)) for each in (lists, plain, exact))
        common.assert_as_accurate(*parts, name)
    assert [float(k) for k in lists.steps] == [float(k) for k in plain.steps]


@common.over_rules
def test_step_is_as_accurate_as_plain_torch(case: common.RuleCase) -> None:
    assert_like_reference(case, Lists(case.make(), shapes=((0,), (100,))))


@common.over_small_rules
@pytest.mark.parametrize("kind", ["wide", "zeros", "denormal", "mixed", "nonfinite"])
def test_every_kind_of_gradient(case: common.RuleCase, kind: str) -> None:
    assert_like_reference(case, Lists(case.make(), kind=kind))


@common.over_small_rules
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("param_dtype", list(step.DTYPES), ids=str)
def test_dtypes_and_gradient_scale(
    case: common.RuleCase, param_dtype: torch.dtype, state_dtype: torch.dtype
) -> None:
    lists = Lists(case.make(), param_dtype, state_dtype)
    assert_like_reference(case, lists, grad_scale=torch.tensor(3.0))


@common.over_small_rules
@pytest.mark.parametrize("nonfinite", [step.PASS, step.SKIP, step.RAISE])
def test_found_inf_changes_nothing(case: common.RuleCase, nonfinite: int) -> None:
    rule = case.make()
    lists = Lists(rule, kind="nonfinite")
    before = [bits(tensor) for tensor in lists.all()]
    lists.run(rule, nonfinite=nonfinite, found_inf=torch.tensor(1.0))
    assert [bits(tensor) for tensor in lists.all()] == before
    assert_like_reference(case, Lists(rule), found_inf=torch.tensor(0.0))


@common.over_small_rules
def test_skip_leaves_tensors_with_nonfinite_gradients(case: common.RuleCase) -> None:
    rule = case.make()
    lists = Lists(rule)
    lists.grads[2][128] = torch.inf
    kept = [bits(part[2]) for part in (lists.params, lists.states)]
    assert_like_reference(case, lists, nonfinite=step.SKIP)
    assert [bits(part[2]) for part in (lists.params, lists.states)] == kept


def test_raise_names_the_tensor_and_changes_nothing() -> None:
    for case in common.SMALL_RULE_CASES:
        rule = case.make()
        lists = Lists(rule)
        lists.grads[3][1, 2] = torch.nan
        before = [bits(tensor) for tensor in lists.all()]
        with pytest.raises(RuntimeError, match="gradient 3 of the list"):
            lists.run(rule, nonfinite=step.RAISE)
        assert [bits(tensor) for tensor in lists.all()] == before


@common.over_small_rules
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_tiles_a_chunk_and_many_chunks_a_program(
    case: common.RuleCase, state_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = StepConfig(block=32, warps=1, chunk=64, max_programs=2)
    monkeypatch.setattr(step, "step_config", lambda *args, **options: config)
    lists = Lists(case.make(), state_dtype=state_dtype, shapes=((150,), (3,), (63,)))
    assert_like_reference(case, lists)


def test_tables_are_kept_while_addresses_stay() -> None:
    case = common.SMALL_RULE_CASES[0]
    rule = case.make()
    lists, others = Lists(rule), Lists(rule)
    plans = []
    for each in (lists, lists, others):
        each.run(rule)
        plans.append(step._plan(rule, each.params, each.grads, each.states, each.steps))
    assert plans[0] is plans[1]
    assert plans[0] is not plans[2]


def test_tables_that_a_captured_graph_reads_are_never_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rule = common.SMALL_RULE_CASES[0].make()
    captured, *others = (Lists(rule) for _ in range(step.MAX_PLANS + 2))

    def plan(of: Lists) -> step.Plan:
        return step._plan(rule, of.params, of.grads, of.states, of.steps)

    before = plan(captured)
    monkeypatch.setattr(step, "_capturing", lambda device: True)
    assert plan(captured) is before
    with pytest.raises(RuntimeError, match="not stepped before: step them once, then capture"):
        plan(others[0])
    monkeypatch.undo()
    dropped = plan(others[0])
    for other in others[1:]:
        plan(other)
    assert len(step._plans) == step.MAX_PLANS
    assert plan(captured) is before
    assert plan(others[0]) is not dropped


def test_a_kernel_that_does_not_compile_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*arguments: object, **options: object) -> None:
                raise RuntimeError("does not compile")

            return launch

    rule = common.SMALL_RULE_CASES[-1].make()
    assert rule.needs_step
    lists = Lists(rule)
    before = [bits(tensor) for tensor in lists.all()]
    monkeypatch.setattr(step.step_kernels, "step", Broken())
    with pytest.raises(RuntimeError, match="does not compile"):
        lists.run(rule)
    assert [bits(tensor) for tensor in lists.all()] == before


def test_lists_it_cannot_take_are_refused_before_anything_changes() -> None:
    rule = common.SMALL_RULE_CASES[0].make()
    for name, index, wrong, message in (
        ("grads", 2, torch.zeros(129).double(), r"grads\[2\]: expected a dense torch.float32"),
        ("grads", 3, torch.zeros(5, 3), r"grads\[3\]: .* of shape \(3, 5\) like its parameter"),
        ("states", 2, torch.zeros(1, 129), r"states\[2\]: .* make it with rule.init_state"),
        ("params", 3, torch.zeros(5, 3).T, r"params\[3\]: expected contiguous"),
    ):
        lists = Lists(rule)
        getattr(lists, name)[index] = wrong
        before = [bits(tensor) for tensor in lists.all()]
        with pytest.raises(ValueError, match=message):
            lists.run(rule)
        assert [bits(tensor) for tensor in lists.all()] == before
    lists = Lists(rule)
    lists.steps = [torch.zeros(())]
    with pytest.raises(ValueError, match="expected 4 grads and states and 0 steps for 4 params"):
        lists.run(rule)
    with pytest.raises(ValueError, match=r"grad_scale: expected 1 contiguous float32"):
        Lists(rule).run(rule, grad_scale=torch.ones(2))
    with pytest.raises(TypeError, match="float32 or bfloat16 states"):
        Lists(rule, state_dtype=torch.float64).run(rule)
