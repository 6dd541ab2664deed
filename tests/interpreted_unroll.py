"""The Triton window backward and functional step, interpreted; run by `test_triton_unroll.py`."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from fastl2o.rules import Rule
from kernels.lstm import config, window
from tests import common

# NaN and Inf go through on purpose; NumPy, which the interpreter computes with, remarks on them.
# Where an operand of `tl.dot` is infinite, its first part is the largest TF32 number.
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered in matmul:RuntimeWarning"),
]

LR, DECAY = 0.7, 0.1
SMALL = {case.name: case for case in common.SMALL_RULE_CASES}
over_deep = pytest.mark.parametrize("name", ["lstm-3x2", "rnnprop-2x1"])


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill every output and scratch of the launchers with NaN before the kernels run."""
    empty, empty_like = Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(
        Tensor, "new_empty", lambda *args, **options: empty(*args, **options).fill_(torch.nan)
    )
    monkeypatch.setattr(
        torch, "empty_like", lambda *args, **options: empty_like(*args, **options).fill_(torch.nan)
    )


def meta_of(rule: Rule) -> Tensor:
    return rule.flat_parameters().detach()


def run(rule: Rule, recorded: common.Window) -> tuple[Tensor, Tensor]:
    return window.unroll_backward(
        rule, recorded.grads, recorded.state, recorded.step, meta_of(rule), recorded.loss_weights,
        recorded.steps, LR, DECAY,
    )  # fmt: skip


def assert_window(case: common.RuleCase, recorded: common.Window) -> None:
    """Compare d_meta and d_state with autograd in float64, by the error of float32 autograd."""
    rule = case.make()
    result = run(rule, recorded)
    scales = {"lr": LR, "weight_decay": DECAY}
    plain = common.autograd_unroll(rule, recorded, **scales)
    exact = common.autograd_unroll(case.make(torch.float64), recorded.to(torch.float64), **scales)
    for index, what in enumerate(("d_meta", "d_state")):
        common.assert_as_accurate(result[index], plain[index], exact[index], what, norm=True)


@common.over_small_rules
@pytest.mark.parametrize(
    ("steps", "runs", "dim", "last"), [(1, 1, 5, True), (1, 2, 3, False), (3, 3, 7, False)]
)
def test_windows(case: common.RuleCase, steps: int, runs: int, dim: int, last: bool) -> None:
    rule = case.make()
    assert_window(case, common.random_window(rule, steps=steps, runs=runs, dim=dim, last=last))


@over_deep
@pytest.mark.parametrize("kind", ["mixed", "zeros"])
def test_windows_of_tricky_gradients(name: str, kind: str) -> None:
    rule = SMALL[name].make()
    assert_window(SMALL[name], common.random_window(rule, steps=2, kind=kind))


@pytest.mark.parametrize("name", ["lstm-2x1-identity", "rnnprop-2x1"])
def test_segments_tiles_and_programs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Three steps in segments of two and one; three tiles for two programs.
    def small(rule: Rule, coordinates: int, steps: int) -> config.WindowConfig:
        made = config.window_config(rule, coordinates, steps)
        assert made.segments == 2
        return dataclasses.replace(made, programs=2)

    monkeypatch.setattr(config, "MAX_SEGMENT", 2)
    monkeypatch.setattr(window, "window_config", small)
    rule = SMALL[name].make()
    assert_window(SMALL[name], common.random_window(rule, steps=3, runs=5, dim=13))


@pytest.mark.parametrize("name", ["lstm-7x3", "lstm-1x1", "rnnprop-1x1", "rnnprop-5x1-no-momentum"])
def test_sizes_that_groups_of_units_do_not_divide(name: str) -> None:
    case = next(case for case in common.RULE_CASES if case.name == name)
    assert_window(case, common.random_window(case.make(), steps=1, runs=1, dim=3))


def step_results(case: common.RuleCase, grad: Tensor) -> list[list[Tensor]]:
    """Update, new state, d_grad, d_state, d_meta: by the kernels, torch in float32 and float64."""
    rule = case.make()
    generator = torch.Generator().manual_seed(2)
    state = common.random_state(rule, tuple(grad.shape), generator)
    upstream = [torch.randn(part.shape, generator=generator) for part in (grad, state)]
    outputs = window.step(rule, grad, state, 3, meta_of(rule))
    gradients = window.step_backward(rule, *upstream, grad, state, 3, meta_of(rule))
    results = [[*outputs, *gradients]]
    for made, dtype in ((rule, torch.float32), (case.make(torch.float64), torch.float64)):
        parts = [part.to(dtype) for part in (*upstream, grad, state)]
        with torch.no_grad():
            forward = made.reference_step(*parts[2:], 3, meta_of(made))
            backward = made.reference_backward(*parts, 3, meta_of(made))
        results.append([*forward, *backward])
    return results


@common.over_small_rules
def test_functional_step_and_its_derivative(case: common.RuleCase) -> None:
    grad = common.tricky_gradients("normal", (3, 13), torch.Generator().manual_seed(1))
    names = ("update", "new state", "d_grad", "d_state", "d_meta")
    for what, *parts in zip(names, *step_results(case, grad), strict=True):
        common.assert_as_accurate(*parts, what, norm=True)


@over_deep
def test_gradients_that_are_not_finite_stay_in_their_coordinate(name: str) -> None:
    grad = torch.tensor([1.0, torch.nan, torch.inf, -1.0, 0.0])
    kernel, plain, _ = step_results(SMALL[name], grad)
    for got, expected in zip(kernel[:4], plain[:4], strict=True):
        assert torch.equal(got.isnan(), expected.isnan())
        finite = expected.isfinite()
        torch.testing.assert_close(got[finite], expected[finite], rtol=1e-4, atol=1e-5)


def test_saturated_gates_give_no_nan() -> None:
    rule = SMALL["lstm-3x2"].make()
    with torch.no_grad():
        for parameter in rule.parameters():
            parameter.mul_(1e4)
    for part in run(rule, common.random_window(rule, steps=2)):
        assert bool(part.isfinite().all())


def test_empty_windows_and_steps() -> None:
    rule = SMALL["lstm-3x2"].make()
    d_meta, d_state = run(rule, common.random_window(rule, steps=2, runs=0))
    assert torch.equal(d_meta, torch.zeros(rule.num_meta_parameters))
    assert d_state.shape == (12, 0, 5)
    empty = torch.zeros(0)
    update, state = window.step(rule, empty, rule.init_state(empty), 0, meta_of(rule))
    assert (update.shape, state.shape) == ((0,), (12, 0))
