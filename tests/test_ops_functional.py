"""The functional step and the unroll backward: values, derivatives, errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastl2o
from fastl2o import _ops_reference, ops
from fastl2o.rules import LSTMRule, RNNPropRule
from tests.common import (
    RuleCase,
    assert_as_accurate,
    autograd_unroll,
    over_backends,
    over_rules,
    over_small_rules,
    random_state,
    random_window,
    relative_error,
    tricky_gradients,
)


@over_backends
@over_rules
def test_functional_step_and_its_gradient(case: RuleCase, backend: str) -> None:
    rule, exact_rule = case.make(), case.make(torch.float64)
    generator = torch.Generator().manual_seed(2)
    grad = tricky_gradients("normal", (25, 40), generator)
    state = random_state(rule, (25, 40), generator)
    upstream = (torch.randn(25, 40), torch.randn(state.shape))
    results = {}
    for name, made, dtype in (
        (backend, rule, torch.float32),
        ("plain", rule, torch.float32),
        ("exact", exact_rule, torch.float64),
    ):
        inputs = [part.to(dtype).requires_grad_() for part in (grad, state, made.flat_parameters())]
        inputs = [part.detach().requires_grad_() for part in inputs]
        with fastl2o.backend(backend if name == backend else "reference"):
            outputs = ops.step(made, inputs[0], inputs[1], 3, inputs[2])
        gradients = torch.autograd.grad(outputs, inputs, [part.to(dtype) for part in upstream])
        results[name] = (*outputs, *gradients)
    names = ("update", "new state", "d_grad", "d_state", "d_meta")
    for what, *values in zip(
        names, results[backend], results["plain"], results["exact"], strict=True
    ):
        assert_as_accurate(*values, what=what)


@over_backends
def test_functional_step_reaches_the_rules_parameters(backend: str) -> None:
    rule = LSTMRule(3, 1)
    grad = torch.randn(4, 5)
    with fastl2o.backend(backend):
        update, state = ops.step(rule, grad.t(), rule.init_state(grad.t()))
    (update.sum() + state.sum()).backward()
    assert all(parameter.grad is not None for parameter in rule.parameters())


@pytest.mark.parametrize("last", [True, False], ids=["with-last", "without-last"])
@over_rules
def test_reference_unroll_backward_equals_autograd(case: RuleCase, last: bool) -> None:
    rule = case.make(torch.float64)
    window = random_window(rule, steps=6, last=last, dtype=torch.float64)
    options = {"lr": 0.7, "weight_decay": 0.1}
    result = ops.unroll_backward(
        rule, window.grads, window.state, window.loss_weights, steps=6, step=window.step, **options
    )
    for ours, automatic in zip(result, autograd_unroll(rule, window, **options), strict=True):
        assert relative_error(ours, automatic) < 1e-12


def test_reference_unroll_backward_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = RNNPropRule(3, 2).double()
    window = random_window(rule, steps=5, runs=3, dim=7, dtype=torch.float64)
    monkeypatch.setattr(_ops_reference, "UNROLL_BLOCK", 4 * 5 * rule.state_planes)
    result = ops.unroll_backward(
        rule, window.grads, window.state, window.loss_weights, steps=5, step=window.step
    )
    for ours, automatic in zip(result, autograd_unroll(rule, window), strict=True):
        assert relative_error(ours, automatic) < 1e-12


@over_backends
@over_small_rules
def test_unroll_backward_of_given_upstream_gradients(case: RuleCase, backend: str) -> None:
    """With the dL/du_t that loss weights stand for, the result is that of the loss weights."""
    rule, lr, decay = case.make(), 0.7, 0.1
    window = random_window(rule, steps=4)
    weighted = window.loss_weights.unsqueeze(2) * window.grads
    adjoint, d_updates = weighted[4], torch.empty_like(window.grads[:4])
    for t in reversed(range(4)):
        d_updates[t] = lr * adjoint
        adjoint = weighted[t] + (1 - lr * decay) * adjoint
    at = {"steps": 4, "step": window.step}
    with fastl2o.backend(backend):
        given = ops.unroll_backward(rule, window.grads[:4], window.state, d_updates=d_updates, **at)
    expected = autograd_unroll(rule, window, lr=lr, weight_decay=decay)
    for ours, automatic in zip(given, expected, strict=True):
        assert relative_error(ours, automatic) < 1e-5


@over_backends
@over_small_rules
@pytest.mark.parametrize("given", ["d_updates", "loss_weights"])
def test_windows_chain_by_the_gradient_of_the_state_between_them(
    case: RuleCase, backend: str, given: str
) -> None:
    """A window's gradients, from those of its two halves; the later half is the upstream."""
    rule, lr, decay = case.make(), 0.7, 0.1
    window = random_window(rule, steps=4)
    grads, weights = window.grads, window.loss_weights
    middle = window.state
    for t in range(2):
        middle = rule.reference_step(
            grads[t], middle, window.step + t, rule.flat_parameters().detach()
        )[1]
    adjoints = weights.unsqueeze(2) * grads
    for t in reversed(range(4)):
        adjoints[t] += (1 - lr * decay) * adjoints[t + 1]
    upstream: list[dict[str, Tensor]] = [
        {"d_updates": lr * adjoints[1:3]},
        {"d_updates": lr * adjoints[3:]},
    ]
    first = grads[:2]
    if given == "loss_weights":
        # The first half's last gradient and weight stand for all losses from there on.
        first = torch.cat((grads[:2], adjoints[2:3]))
        upstream = [
            {"loss_weights": torch.cat((weights[:2], torch.ones_like(weights[:1])))},
            {"loss_weights": weights[2:]},
        ]
    rates = {"lr": lr, "weight_decay": decay, "steps": 2}
    with fastl2o.backend(backend):
        d_late, d_middle = ops.unroll_backward(
            rule, grads[2:], middle, step=window.step + 2, **upstream[1], **rates
        )
        d_early, d_state = ops.unroll_backward(
            rule,
            first,
            window.state,
            step=window.step,
            d_last_state=d_middle,
            **upstream[0],
            **rates,
        )
    expected = autograd_unroll(rule, window, lr=lr, weight_decay=decay)
    for ours, automatic in zip((d_early + d_late, d_state), expected, strict=True):
        assert relative_error(ours, automatic) < 1e-5


@over_backends
@over_small_rules
def test_unroll_backward_edge_windows(case: RuleCase, backend: str) -> None:
    """One step without the last gradient has no effect on any loss; no coordinates, no gradient."""
    rule = case.make()
    for runs, dim, last in ((2, 3, False), (0, 3, True), (2, 0, True)):
        window = random_window(rule, steps=1, runs=runs, dim=dim, last=last)
        with fastl2o.backend(backend):
            d_meta, d_state = ops.unroll_backward(
                rule, window.grads, window.state, window.loss_weights, steps=1, step=3
            )
        assert d_state.shape == window.state.shape
        assert not d_meta.any()
        assert not d_state.any()


def test_bad_windows_are_named() -> None:
    rule = LSTMRule(3, 1)
    window = random_window(rule, steps=3)
    grads, state, weights = window.grads, window.state, window.loss_weights
    for both in ({}, {"loss_weights": weights, "d_updates": grads[:3]}):
        with pytest.raises(ValueError, match="either loss_weights or d_updates"):
            ops.unroll_backward(rule, grads, state, steps=3, **both)
    with pytest.raises(ValueError, match=r"d_updates: expected shape \(3, 2, 5\)"):
        ops.unroll_backward(rule, grads, state, steps=3, d_updates=grads)
    with pytest.raises(ValueError, match=r"d_last_state: expected shape \(6, 2, 5\) like state's"):
        ops.unroll_backward(rule, grads, state, weights, steps=3, d_last_state=state[1:])
    tensors = fastl2o.HierarchicalRule()
    levels = tensors.init_runs(torch.zeros(2, 5), (5,))
    with pytest.raises(ValueError, match=r"d_updates: expected shape \(3, 2, 5\)"):
        ops.unroll_backward(tensors, grads, levels, steps=3, d_updates=grads)
    with pytest.raises(ValueError, match="d_last_state: a rule of family 'hierarchical' takes"):
        ops.unroll_backward(tensors, grads, levels, weights, steps=3, d_last_state=levels)
    with pytest.raises(ValueError, match="K = 5 or 6 for steps=5"):
        ops.unroll_backward(rule, grads, state, weights, steps=5)
    with pytest.raises(ValueError, match="grads: expected shape"):
        ops.unroll_backward(rule, grads[:, 0], state, weights, steps=3)
    with pytest.raises(ValueError, match=r"state: expected shape \(6, 2, 5\)"):
        ops.unroll_backward(rule, grads, state[1:], weights, steps=3)
    with pytest.raises(ValueError, match=r"loss_weights: expected shape \(4, 2\)"):
        ops.unroll_backward(rule, grads, state, weights.t(), steps=3)
    with pytest.raises(ValueError, match="Invalid steps: 0"):
        ops.unroll_backward(rule, grads, state, weights, steps=0)
    with pytest.raises(ValueError, match="Invalid step: -1"):
        ops.unroll_backward(rule, grads, state, weights, steps=3, step=-1)
