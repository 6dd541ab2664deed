"""differentiable=True: autograd through the step, and what that mode refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastl2o import LearnedOptimizer, LSTMRule, RNNPropRule, Rule
from tests.common import SMALL_RULE_CASES, RuleCase, over_small_rules, present_backends
from tests.optimizers import assert_same_bits, mirrors, on_backend, set_grads, unchanged

SHAPE = (2, 3)


def _step(
    rule: Rule, p: Tensor, grad: Tensor, planes: Tensor, *, step: float = 2.0, **options: Any
) -> tuple[Tensor, Tensor]:
    """One step as a function of its tensors."""
    p = p.clone()
    p.grad = grad
    optimizer = LearnedOptimizer(
        [p], rule, differentiable=True, state_dtype=torch.float64, **options
    )
    optimizer.state[p]["planes"] = planes
    if rule.needs_step:
        optimizer.state[p]["step"] = torch.tensor(step)
    optimizer.step()
    return p, optimizer.state[p]["planes"]


@mirrors("differentiable")
@pytest.mark.parametrize("options", [{}, {"maximize": True, "weight_decay": 0.3, "lr": 0.5}])
@over_small_rules
def test_gradcheck_through_one_step(case: RuleCase, options: dict[str, Any]) -> None:
    rule = case.make(torch.float64)
    p, grad = (torch.randn(SHAPE, dtype=torch.float64, requires_grad=True) for _ in range(2))
    planes = 0.5 * torch.rand(rule.state_planes, *SHAPE, dtype=torch.float64) + 0.1

    def run(p: Tensor, grad: Tensor, planes: Tensor) -> tuple[Tensor, Tensor]:
        return _step(rule, p, grad, planes, **options)

    assert torch.autograd.gradcheck(run, (p, grad, planes.requires_grad_()))


@mirrors("differentiable")
@over_small_rules
def test_gradcheck_through_two_steps_to_meta_parameters_and_lr(case: RuleCase) -> None:
    rule = case.make(torch.float64)
    names = [name for name, _ in rule.named_parameters()]
    start = torch.randn(SHAPE, dtype=torch.float64)

    def loss(lr: Tensor, *meta: Tensor) -> Tensor:
        def unroll(p: Tensor, planes: Tensor) -> Tensor:
            for step in range(2):
                grad = p.sin() + 0.3  # depends on p: second order is included
                p, planes = _step(rule, p, grad, planes, step=step, lr=lr, weight_decay=0.1)
            return p.square().sum()

        planes = rule.init_state(start, torch.float64)
        for name, value in zip(names, meta, strict=True):
            owner, _, leaf = name.rpartition(".")
            module = rule.get_submodule(owner)
            module._parameters[leaf] = value  # type: ignore[assignment]
        return unroll(start.clone().requires_grad_(), planes)

    meta = [p.detach().clone().requires_grad_() for p in rule.parameters()]
    lr = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (lr, *meta))


@pytest.mark.parametrize("backend", present_backends())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("case", SMALL_RULE_CASES[::3], ids=str)
def test_the_differentiable_step_is_the_step(
    case: RuleCase, dtype: torch.dtype, backend: str
) -> None:
    rule = case.make()
    start = torch.randn(4, 3).to(dtype)
    plain, recorded = torch.nn.Parameter(start.clone()), start.clone()
    options: dict[str, Any] = {"lr": torch.tensor([0.5]), "weight_decay": 0.1, "maximize": True}
    optimizers = [
        LearnedOptimizer([plain], rule, **options),
        LearnedOptimizer([recorded], rule, differentiable=True, **options),
    ]
    with on_backend(backend):
        for step in range(3):
            plain.grad = torch.randn(start.shape).to(dtype) + step
            recorded.grad = plain.grad.clone()
            for optimizer in optimizers:
                optimizer.step()
    # the functional and the in-place kernels may round an update differently
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(recorded, plain.detach(), rtol=tolerance, atol=tolerance)
    states = [optimizers[0].state[plain], optimizers[1].state[recorded]]
    torch.testing.assert_close(states[0]["planes"], states[1]["planes"], rtol=1e-5, atol=1e-6)
    assert states[0].keys() == states[1].keys()


def test_a_leaf_that_requires_grad_is_refused_by_name() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = LearnedOptimizer([("w", p)], LSTMRule(2), differentiable=True)
    set_grads([p], 0)
    with unchanged(optimizer), pytest.raises(RuntimeError, match=r"'w'.* is a leaf.*clone"):
        optimizer.step()


def test_a_step_counter_that_requires_grad_is_refused() -> None:
    p = torch.ones(3)
    optimizer = LearnedOptimizer([p], RNNPropRule(2, 1), differentiable=True)
    set_grads([p], 0)
    optimizer.step()
    optimizer.state[p]["step"].requires_grad_()
    with unchanged(optimizer), pytest.raises(RuntimeError, match="`requires_grad`"):
        optimizer.step()


@pytest.mark.parametrize("policy", ["raise", "skip", "pass"])
def test_nonfinite_policies_hold_here_too(policy: str) -> None:
    bad, good = torch.ones(3), torch.ones(3)
    optimizer = LearnedOptimizer([bad, good], LSTMRule(2), differentiable=True, nonfinite=policy)
    set_grads([bad, good], 0)
    bad.grad[1] = torch.nan
    if policy == "raise":
        with unchanged(optimizer), pytest.raises(RuntimeError, match="parameter 0 of group 0"):
            optimizer.step()
        return
    optimizer.step()
    assert not torch.equal(good, torch.ones(3))
    if policy == "skip":
        assert_same_bits([bad], [torch.ones(3)])
    else:
        assert bad.isnan().tolist() == [False, True, False]
