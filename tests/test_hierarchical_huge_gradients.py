"""Gradients of any size leave a hierarchical rule's numbers finite, on every backend alike."""

from __future__ import annotations

import pytest
import torch

import fastl2o
from fastl2o import ops
from fastl2o.rules._hierarchy import GRADIENT_LIMIT
from tests import cuda_hierarchical, cuda_step, hierarchical_cpu
from tests.common import over_backends
from tests.test_hierarchical_ops import Problem
from tests.test_hierarchical_rule import make


def huge_gradients_count_as_the_limit(backend: str, dtype: torch.dtype = torch.float32) -> None:
    """Steps with gradients of any finite size, with infinities passed on and with the limit."""
    rule = make(3, 4, 5, 2, dtype=torch.float32)
    results = []
    # bfloat16 has no such number as the limit, but the next one below it.
    least = 2 * GRADIENT_LIMIT if dtype == torch.bfloat16 else GRADIENT_LIMIT
    for size in (least, 1e20, torch.finfo(dtype).max, torch.inf):
        mine = Problem(rule, [(40,), (7,), (1,)], dtype)
        for _ in range(3):
            grads = mine.draw()
            grads[0][3], grads[0][5], grads[1][:], grads[2][:] = size, -size, size, -size
            grads[0][:2] = torch.tensor([1e-45, -1e-38])
            with fastl2o.backend(backend):
                mine.step(rule, grads, nonfinite="pass" if size == torch.inf else "raise")
        assert all(tensor.isfinite().all() for tensor in mine.everything())
        results.append(mine.everything())
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@over_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_huge_gradients_count_as_the_limit(dtype: torch.dtype, backend: str) -> None:
    huge_gradients_count_as_the_limit(backend, dtype)


def huge_gradients_leave_a_window_finite(backend: str) -> None:
    """A gradient beyond the limit, which weighs nothing, goes into a window's first step."""
    rule = make(3, 4, 5, 2, dtype=torch.float32)
    generator = torch.Generator().manual_seed(2)
    state = rule.init_runs(torch.randn(2, 12, generator=generator), (5, 7), generator)
    grads = torch.randn(3, 2, 12, generator=generator)
    weights = torch.tensor([[0.0], [1.0], [1.0]]).expand(3, 2).contiguous()
    results = []
    for size in (GRADIENT_LIMIT, 3e38):
        grads[0, :, 3:6] = size * torch.tensor([1.0, -1.0, 1.0])
        with fastl2o.backend(backend):
            found = ops.unroll_backward(rule, grads, state, weights, steps=2, sizes=(5, 7))
        assert all(tensor.isfinite().all() for tensor in found)
        results.append(found)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@over_backends
def test_huge_gradients_leave_a_window_finite(backend: str) -> None:
    huge_gradients_leave_a_window_finite(backend)


@pytest.mark.skipif(cuda_step.missing() is not None, reason=cuda_step.missing() or "never")
def test_huge_gradients_count_as_the_limit_in_cuda() -> None:
    rule = hierarchical_cpu.make_rule()
    results = []
    for size in (GRADIENT_LIMIT, 3e38):
        problem = hierarchical_cpu.Problem.make(rule, [(70,), (1,)])
        problem.grads[0][3:5] = size * torch.tensor([1.0, -1.0])
        problem.grads[1][:] = size
        cuda_hierarchical.step_(rule, problem)
        results.append([*problem.params, *problem.planes, *problem.states, problem.hidden])
        assert all(tensor.isfinite().all() for tensor in results[-1])
    assert hierarchical_cpu.same_bits(*results)
