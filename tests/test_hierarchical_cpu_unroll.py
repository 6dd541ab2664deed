"""The hierarchical rule's C++ unroll backward against autograd in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from fastl2o.rules import HierarchicalRule, _runs
from fastl2o.rules.hierarchical import ProblemState
from tests.common import needs_cpu_kernels
from tests.hierarchical_cpu import (
    DEFAULT,
    ODD,
    SMALLEST,
    TOLERANCE,
    Problem,
    make_rule,
    op_sizes,
    same_bits,
)
from tests.test_cpu_kernels import core, over_isa
from tests.test_cpu_kernels import pytestmark as needs_core


@dataclass
class Window:
    """Recorded gradients and the state before them, of several runs."""

    grads: Tensor  # (K, R, D)
    state: Tensor  # (R, W)
    weights: Tensor  # (K, R)
    steps: int
    taken: int
    sizes: tuple[int, ...]
    d_updates: Tensor | None = None  # (T, R, D) in place of the weights


def make_window(
    rule: HierarchicalRule, sizes: tuple[int, ...], steps: int, runs: int, taken: int, last: bool
) -> Window:
    generator = torch.Generator().manual_seed(3)
    rows = []
    for run in range(runs):
        problem = Problem.make(rule, [(size,) for size in sizes], taken=taken, seed=run)
        rows.append(_runs.pack(problem.problem_state()).float())
    shape = (steps + int(last), runs)
    grads = torch.randn(*shape, sum(sizes), generator=generator)
    weights = torch.rand(shape, generator=generator)
    return Window(grads, torch.stack(rows), weights, steps, taken, sizes)


def make_small_direction(rule: HierarchicalRule, window: Window, size: float) -> None:
    """Changes a weight so that the first tensor's one coordinate has this d, which is linear in
    the weight, in the window's first step."""
    planes, tensors, hidden = _runs.views(rule, window.state[0].double(), window.sizes)
    rates = [tensor[-1] * n for tensor, n in zip(tensors, window.sizes, strict=True)]
    mean = torch.stack(rates).sum() / sum(window.sizes)
    grad, weights = window.grads[0, 0, :1].double(), dict(rule.named_parameters())

    def direction(weight: float) -> float:
        rule.shortcut[0] = weight
        found = rule.reference_sweep(grad, planes[0], tensors[0], False, hidden, mean, weights)
        return float(found.sums[-2].sqrt().copysign(found.raw[0]))

    with torch.no_grad():
        start = direction(0.0)
        weight = (size - start) / (direction(1.0) - start)
        assert direction(np.float32(weight).item()) == pytest.approx(size, rel=0.01)


def autograd_unroll(
    rule: HierarchicalRule, window: Window, lr: float, weight_decay: float
) -> tuple[Tensor, Tensor]:
    """dL/d meta and dL/d state in float64 through the reference steps."""
    sizes = list(window.sizes)
    rows = window.state.double().requires_grad_()
    meta = rule.flat_parameters().detach().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for run, row in enumerate(rows):
        planes, tensors, hidden = _runs.views(rule, row, sizes)
        state = ProblemState(planes, tensors, [window.taken] * len(sizes), hidden)
        grads, weights = window.grads[:, run].double(), window.weights[:, run].double()
        adjoint = torch.zeros(sum(sizes), dtype=torch.float64)
        d_updates = []
        for t in range(len(grads) - 1, -1, -1):
            if t < window.steps:
                d_updates.append(lr * adjoint)
            adjoint = weights[t] * grads[t] + (1 - lr * weight_decay) * adjoint
        if window.d_updates is not None:
            d_updates = list(window.d_updates[:, run].double().flip(0))
        for t, d_update in enumerate(reversed(d_updates)):
            updates, state = rule.reference_step(grads[t].split(sizes), state, meta)
            for update, upstream in zip(updates, d_update.split(sizes), strict=True):
                if update is not None:
                    total = total + (update * upstream).sum()
    d_meta, d_state = torch.autograd.grad(total, (meta, rows))
    return d_meta, d_state


def core_unroll(isa: str, rule: HierarchicalRule, window: Window, threads: int = 1):
    meta = rule.flat_parameters().detach().float().numpy()
    arrays = (window.grads.numpy(), window.state.numpy())
    d_meta, d_state = core.hierarchical_unroll_backward(
        isa,
        list(op_sizes(rule).values()),
        meta,
        *arrays,
        window.taken == 0,
        window.weights.numpy(),
        window.steps,
        list(window.sizes),
        0.7,
        0.1,
        threads,
    )
    return torch.from_numpy(d_meta), torch.from_numpy(d_state)


WINDOWS = {
    "first-step": (DEFAULT, (15, 7, 1, 0, 65), 1, 1, 0, True),
    "from-start": (DEFAULT, (15, 2049), 6, 2, 0, True),
    "later": (DEFAULT, (5, 0, 40), 5, 3, 2, False),
    "odd": (ODD, (65, 33), 4, 2, 1, True),
    "smallest": (SMALLEST, (9, 3), 4, 2, 1, True),
    "long": (DEFAULT, (10,), 40, 2, 0, True),
}


@needs_core
@over_isa
@pytest.mark.parametrize("case", WINDOWS)
def test_unroll_backward_agrees_with_autograd(isa: str, case: str) -> None:
    rule = make_rule(WINDOWS[case][0])
    window = make_window(rule, *WINDOWS[case][1:])
    exact = autograd_unroll(rule, window, 0.7, 0.1)
    for result, target in zip(core_unroll(isa, rule, window), exact, strict=True):
        assert float((result - target).norm()) <= TOLERANCE * float(target.norm())


@needs_core
@over_isa
@pytest.mark.parametrize("seed", [3, 4])
def test_the_direction_of_a_single_coordinate_is_small(isa: str, seed: int) -> None:
    # Its rms is then as small, and the gradient through both a difference of almost equal numbers,
    # divided by that rms. These rules have it make much of the meta-gradient.
    rule = make_rule(seed=seed)
    window = make_window(rule, (1, 5), 1, 1, 1, True)
    make_small_direction(rule, window, 1e-2)
    exact = autograd_unroll(rule, window, 0.7, 0.1)
    for result, target in zip(core_unroll(isa, rule, window), exact, strict=True):
        assert float((result - target).norm()) <= TOLERANCE * float(target.norm())


@needs_core
@pytest.mark.parametrize("sizes", [(9000, 500), (30, 5)])
def test_unroll_threads_do_not_change_a_bit(sizes: tuple[int, ...]) -> None:
    rule = make_rule()
    window = make_window(rule, sizes, 3, 3, 0, True)
    isa = core.instruction_sets()[-1]
    one = core_unroll(isa, rule, window)
    for threads in (2, 5):
        assert same_bits(one, core_unroll(isa, rule, window, threads))


@needs_core
def test_windows_too_long_to_be_recorded_are_replayed_from_checkpoints() -> None:
    # 42 steps of 12,000 coordinates take more than 32 MB of states. Steps whose gradients have no
    # weight change nothing, so that the start of the window is a window that is recorded whole.
    rule = make_rule()
    window = make_window(rule, (12000,), 42, 1, 0, False)
    window.weights[18:] = 0.0
    start = Window(window.grads[:18], window.state, window.weights[:18], 17, 0, window.sizes)
    isa = core.instruction_sets()[-1]
    pairs = zip(core_unroll(isa, rule, window), core_unroll(isa, rule, start), strict=True)
    for result, target in pairs:
        assert float((result - target).norm()) <= TOLERANCE * float(target.norm())


@needs_cpu_kernels
def test_a_window_that_does_not_fit_is_refused() -> None:
    rule = make_rule()
    window = make_window(rule, (15, 7), 2, 1, 0, True)
    arguments = (window.grads, window.state, 0, rule.flat_parameters().detach().float())
    rest = dict(op_sizes(rule), lr=1.0, weight_decay=0.0)
    op = torch.ops.fastl2o.hierarchical_unroll_backward
    for weights, steps, sizes, message in (
        (window.weights, 2, [15, 8], "sizes add up to 23"),
        (window.weights, 4, [15, 7], "steps is 4"),
        (window.weights[:1], 2, [15, 7], "loss_weights must be"),
        (window.weights, 2, [22], "state must be"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*arguments, weights, steps, sizes, **rest)
