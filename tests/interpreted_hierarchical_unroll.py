"""The hierarchical rule's Triton window backward, interpreted; run by its Triton tests."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

import fastl2o
from fastl2o import HierarchicalRule, meta, ops
from kernels.hierarchical.config import WindowConfig
from tests import gpu_common
from tests.test_hierarchical_huge_gradients import huge_gradients_leave_a_window_finite
from tests.test_hierarchical_ops import (
    window_gradient_is_that_of_autograd,
)
from tests.test_hierarchical_rule import make

# Where the ops have it from: kernels.hierarchical.window is another module of the same file.
window = import_module("fastl2o.kernels.hierarchical.window")


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill working memory with NaN before the kernels run."""
    gpu_common.poison_new_empty(monkeypatch)


def test_the_first_step_of_a_run() -> None:
    window_gradient_is_that_of_autograd(1, True, 0, "triton")


def test_a_window_without_gradients_after_its_last_step() -> None:
    window_gradient_is_that_of_autograd(2, False, 3, "triton")


def test_given_gradients_of_the_updates() -> None:
    window_gradient_is_that_of_autograd(2, False, 3, "triton", given=True)


def test_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    # Three steps in segments of two and one; three tiles a run for two programs.
    config = WindowConfig(block=16, programs=2, segment=2, segments=2)
    asked = []
    monkeypatch.setattr(window, "window_config", lambda *sizes: asked.append(sizes) or config)
    window_gradient_is_that_of_autograd(3, True, 0, "triton")
    assert asked


def test_huge_gradients_leave_a_window_finite() -> None:
    huge_gradients_leave_a_window_finite("triton")


def test_empty_windows() -> None:
    rule = make(3, 4, 5, 2, dtype=torch.float32)
    state = rule.init_runs(torch.zeros(2, 0), (0,))
    with fastl2o.backend("triton"):
        d_meta, d_state = ops.unroll_backward(
            rule, torch.ones(1, 2, 0), state, torch.ones(1, 2), steps=1, sizes=(0,)
        )
    assert not d_meta.any()
    assert not d_state.any()
    assert d_state.shape == state.shape


@pytest.mark.parametrize("weight", [torch.inf, torch.nan])
def test_the_weight_of_a_gradient_that_no_step_follows_does_not_count(weight: float) -> None:
    rule = make(3, 4, 5, 2, dtype=torch.float32)
    state = rule.init_runs(torch.zeros(2, 5), (5,))
    with fastl2o.backend("triton"):
        gradients = ops.unroll_backward(
            rule, torch.ones(1, 2, 5), state, torch.full((1, 2), weight), steps=1, sizes=(5,)
        )
    assert all(torch.equal(each, torch.zeros_like(each)) for each in gradients)


def test_truncated_bptt_goes_through_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    made = window.Window.run
    monkeypatch.setattr(window.Window, "run", lambda self: calls.append(self) or made(self))
    rule = make(3, 4, 5, 2, dtype=torch.float32)
    task = meta.tasks.RandomMLP(features=3, hidden=(2,), batch_size=8, points=20)
    results = {}
    for path in ("fused", "autograd"):
        progress = meta.start(rule, task.sample(1, torch.Generator().manual_seed(1)))
        estimator = meta.TruncatedBPTT(unroll=2, path=path)
        with fastl2o.backend("triton" if path == "fused" else "reference"):
            results[path] = estimator.window(rule, progress)
    fused, autograd = results["fused"], results["autograd"]
    assert len(calls) == 1
    torch.testing.assert_close(fused.losses, autograd.losses)
    distance = (fused.gradient - autograd.gradient).norm()
    assert float(distance) <= 1e-5 * float(autograd.gradient.norm())


def test_sizes_without_kernels_are_refused() -> None:
    rule = HierarchicalRule(param_size=17)
    state = rule.init_runs(torch.zeros(1, 3), (3,))
    with (
        fastl2o.backend("triton"),
        pytest.raises(RuntimeError, match="param_size up to 16, not 17"),
    ):
        ops.unroll_backward(rule, torch.ones(2, 1, 3), state, torch.ones(2, 1), steps=1, sizes=(3,))
