"""The memory and the name of a step, as torch's profiler sees them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastl2o import LearnedOptimizer
from tests.common import needs_cpu_kernels
from tests.optimizers import DTYPES, RANDOM, OptimizerCase, mirrors, run_steps

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"nonfinite": "skip"},
    {"nonfinite": "pass"},
    {"lr": torch.tensor(0.5), "weight_decay": 0.1},
    {"maximize": True, "state_dtype": torch.bfloat16},
    {"state_dtype": torch.bfloat16, "stochastic_rounding": True},
)


def _allocations(run: Callable[[], object]) -> list[int]:
    """Bytes of each allocation of tensor memory, also of one that is given back at once."""
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    recorded = profile.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in recorded if event.name() == "[memory]"]
    return [size for size in sizes if size > 0]


def test_allocations_are_counted() -> None:
    assert _allocations(lambda: torch.empty(100)) == [400]


@mirrors("peak_memory_foreach")
@needs_cpu_kernels
@pytest.mark.parametrize("dtypes", [DTYPES[:1], DTYPES], ids=["one dtype", "mixed dtypes"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("case", RANDOM, ids=repr)
def test_kernel_steps_allocate_nothing_after_the_first(
    case: OptimizerCase, options: dict[str, Any], dtypes: tuple[torch.dtype, ...]
) -> None:
    tensors = [torch.zeros(100, dtype=dtype) for dtype in dtypes for _ in range(5)]
    optimizer = LearnedOptimizer(map(torch.nn.Parameter, tensors), case.rule(0), **options)
    run_steps(optimizer, 2)
    assert _allocations(optimizer.step) == []


@needs_cpu_kernels
@pytest.mark.parametrize("case", RANDOM, ids=repr)
def test_steps_that_unscale_gradients_allocate_nothing_either(case: OptimizerCase) -> None:
    optimizer = LearnedOptimizer([torch.nn.Parameter(torch.zeros(100))], case.rule(0))
    run_steps(optimizer, 2)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    assert _allocations(optimizer.step) == []


def test_profiles_name_the_step() -> None:
    optimizer = LearnedOptimizer([torch.nn.Parameter(torch.zeros(3))], RANDOM[0].rule(0))
    with torch.profiler.profile() as profile:
        run_steps(optimizer, 1)
    assert "Optimizer.step#LearnedOptimizer.step" in {event.key for event in profile.key_averages()}
