"""The hierarchical rule's Triton step: interpreted, compiled ahead of time, its PTX executed."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from fastl2o import HierarchicalRule
from fastl2o.rules.hierarchical import ProblemState
from tests import common, gpu_common
from tests.test_hierarchical_rule import make

pytestmark = [gpu_common.needs_triton, gpu_common.needs_ptxemu]

POINTERS = {
    "chunk": "i64",
    **dict.fromkeys(("tensors", "levels", "chunks"), "*i64"),
    **dict.fromkeys(("tensors_total", "chunks_total", "programs"), "i32"),
    **dict.fromkeys(("seed_low", "seed_high"), "i32"),
    "flags": "*i32",
    **dict.fromkeys(("meta", "hidden", "packed", "raw", "partials", "inverse_rms"), "*fp32"),
    **dict.fromkeys(("grad_scale", "found_inf", "rates"), "*fp32"),
}
SMALL, DEFAULT = (3, 4, 5, 2), (10, 20, 20, 4)
# A parameter's gradient, 19 planes twice, the raw step twice, the parameter twice.
LEAST = 172


@functools.cache
def compiled(
    name: str, sizes: tuple[int, ...], architecture: int, planes: torch.dtype = torch.float32
) -> Any:
    """A kernel of the step with float32 parameters, as a ptxemu module."""
    from kernels.hierarchical import step, step_kernels
    from kernels.hierarchical.config import step_config
    from kernels.lstm.step import DTYPES

    config = step_config(1, sizes[0])
    param, state = DTYPES[torch.float32], DTYPES[planes]
    tiles = {"BLOCK": config.block, "TENSORS": config.tensors}
    own: dict[str, Any] = {
        "sweep": {
            "PARAM": param,
            "PLANES": state,
            "HAS_SCALE": False,
            "STOCHASTIC": False,
            **tiles,
        },
        "tensor_level": {"ROWS": config.rows},
        "apply": {"PARAM": param, **tiles},
    }[name]
    flagged = {"HAS_FOUND_INF": False, "HAS_FLAGS": False}
    constants = {**own, **flagged, **step.constants(HierarchicalRule(*sizes))}
    kernel = getattr(step_kernels, name)
    return gpu_common.compile_triton(kernel, POINTERS, constants, architecture, config.warps)


class Lists:
    """Tensors of two problems after some steps, and what one more makes of them."""

    def __init__(self, rule: HierarchicalRule, sizes: list[list[int]], taken: int) -> None:
        generator = torch.Generator().manual_seed(5)
        self.rule, self.sizes = rule, sizes
        flat = [n for problem in sizes for n in problem]
        self.problems = [index for index, problem in enumerate(sizes) for _ in problem]
        self.params = [torch.randn(n, generator=generator) for n in flat]
        self.grads = [torch.randn(n, generator=generator) for n in flat]
        pairs = [rule.init_tensor(param, generator) for param in self.params]
        self.planes, self.tensors = ([pair[i] for pair in pairs] for i in (0, 1))
        for planes in self.planes:
            first = rule.param_size
            planes[first : first + rule.num_scales].normal_(generator=generator)
            squares = planes[first + rule.num_scales : -1]
            squares.copy_(torch.rand(squares.shape, generator=generator) + 0.1)
        self.steps = [torch.full((1,), float(taken)) for _ in flat]
        self.hidden = torch.randn(len(sizes), rule.global_size, generator=generator)

    def expected(self, rule: HierarchicalRule, dtype: torch.dtype) -> list[Tensor]:
        """Parameters, planes, tensor states and global states after a step, by the reference."""
        params: list[Tensor] = []
        planes: list[Tensor] = []
        tensors: list[Tensor] = []
        hidden = []
        for problem in range(len(self.sizes)):
            mine = [i for i, owner in enumerate(self.problems) if owner == problem]
            state = ProblemState(
                [self.planes[i].to(dtype) for i in mine],
                [self.tensors[i].to(dtype) for i in mine],
                [int(self.steps[i]) for i in mine],
                self.hidden[problem].to(dtype),
            )
            with torch.no_grad():
                updates, new = rule.reference_step([self.grads[i].to(dtype) for i in mine], state)
            for i, update in zip(mine, updates, strict=True):
                assert update is not None
                params.append(0.9 * self.params[i].to(dtype) + 0.5 * update)
            planes += new.planes
            tensors += new.tensors
            hidden.append(new.hidden)
        return [*params, *planes, *tensors, torch.stack(hidden)]

    def execute(self, architecture: int) -> list[Any]:
        """One step by the compiled kernels, in place; the counts of the three launches."""
        from kernels.hierarchical import step

        address = gpu_common.device_address
        rows = [
            (*map(address, tensors), len(tensors[0]))
            for tensors in zip(self.params, self.grads, self.planes, self.steps, strict=True)
        ]
        levels = list(zip(map(address, self.tensors), self.problems, strict=True))
        count = len(rows)
        dtypes = [torch.float32] * count
        plan = step.make_plan(self.rule, rows, levels, dtypes, torch.device("cpu"))
        for buffer in (plan.raw, plan.partials, plan.inverse_rms, plan.packed):
            buffer.fill_(torch.nan)
        plan.set_rates([0.5] * count, [0.2] * count)
        meta = self.rule.flat_parameters().detach()
        one, chunks = torch.ones(1), len(plan.chunks)
        programs = min(chunks, plan.config.max_programs)
        sizes = tuple(self.rule.config().values())[:4]
        checks = {"check_races": True, "check_uninit": True}
        sweep, level, apply = (
            compiled(name, sizes, architecture, self.planes[0].dtype)
            for name in ("sweep", "tensor_level", "apply")
        )
        totals = (count, chunks, programs, plan.config.chunk)
        return [
            sweep.launch(
                (programs,),
                [
                    *(plan.tensors, plan.levels, plan.chunks, meta, self.hidden, plan.packed),
                    *(plan.raw, plan.partials, one, one, plan.flags, *totals, 1.0, 0, 0),
                ],
                **checks,
            ),
            level.launch(
                (count,),
                [
                    *(plan.tensors, plan.levels, meta, self.hidden, plan.partials),
                    *(plan.inverse_rms, one, plan.flags),
                ],
                **checks,
            ),
            apply.launch(
                (programs + len(self.sizes),),
                [
                    *(plan.tensors, plan.levels, plan.chunks, meta, self.hidden, plan.raw),
                    *(plan.inverse_rms, plan.rates, one, plan.flags, *totals),
                ],
                **checks,
            ),
        ]


def test_interpreted() -> None:
    gpu_common.run_interpreted("tests/interpreted_hierarchical.py")


@pytest.mark.parametrize("taken", [0, 3])
def test_executed_ptx_is_as_accurate_as_plain_torch(taken: int) -> None:
    rule, exact_rule = make(*SMALL, dtype=torch.float32), make(*SMALL)
    lists = Lists(rule, [[1, 300, 63], [17]], taken)
    plain, exact = lists.expected(rule, torch.float32), lists.expected(exact_rule, torch.float64)
    lists.execute(80)
    found = [*lists.params, *lists.planes, *lists.tensors, lists.hidden]
    for index, parts in enumerate(zip(found, plain, exact, strict=True)):
        common.assert_as_accurate(*parts, f"result {index}")
    assert [float(step) for step in lists.steps] == [taken + 1.0] * 4


@pytest.mark.parametrize("architecture", gpu_common.ARCHITECTURES)
@pytest.mark.parametrize(("name", "most"), [("sweep", 255), ("tensor_level", 96), ("apply", 96)])
def test_compiles_without_spills(name: str, most: int, architecture: int) -> None:
    found = gpu_common.resources(compiled(name, DEFAULT, architecture), architecture)
    assert (found.spill_stores, found.spill_loads, found.stack) == (0, 0, 0)
    assert found.registers <= most


def test_counts_of_the_default_rule_stay_near_the_memory_floor() -> None:
    """Three launches; what all parameters share is a few percent of a million's traffic."""
    count = 2048
    rule, exact_rule = make(*DEFAULT, dtype=torch.float32), make(*DEFAULT)
    lists = Lists(rule, [[count]], 3)
    plain, exact = lists.expected(rule, torch.float32), lists.expected(exact_rule, torch.float64)
    counts = lists.execute(90)
    found = [*lists.params, *lists.planes, *lists.tensors, lists.hidden]
    for index, parts in enumerate(zip(found, plain, exact, strict=True)):
        common.assert_as_accurate(*parts, f"result {index}")
    shared = 3 * (rule.num_meta_parameters + 200) * 4
    total = sum(each.dram_bytes for each in counts)
    assert (total - shared) / count <= 1.05 * LEAST
    assert counts[0].coalescing("st_global") >= 0.9
    assert counts[0].thread_inst["fp32_fma"] / count <= 1.5 * 704


def test_config_is_a_function_of_the_problem() -> None:
    from kernels.hierarchical.config import MAX_TILES, step_config

    assert step_config(1_000).chunk == step_config(1).block
    assert step_config(10**6).chunk == 1024
    assert step_config(1, 16).block == 256
    assert step_config(2**33).chunk == MAX_TILES * step_config(1).block
