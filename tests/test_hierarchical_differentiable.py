"""differentiable=True with a hierarchical rule: the graph of steps that tensors take together."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import fastl2o
from fastl2o import HierarchicalRule, LearnedOptimizer
from fastl2o._rounding import step_seed
from fastl2o.rules.hierarchical import ProblemState
from tests.common import present_backends
from tests.optimizers import assert_same_bits, mirrors, on_backend, set_grads, unchanged

SEED = 3
WEIGHT_DECAY = 0.1
FIXED_LR = 0.5  # of the second group


def make_rule(attention: bool = False) -> HierarchicalRule:
    rule = HierarchicalRule(3, 4, 5, 2, attention=attention)
    rule.reset_parameters(torch.Generator().manual_seed(7))
    with torch.no_grad():
        rule.rate_bias.fill_(3.0)  # long steps
    return rule


def make_starts(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, generator=generator) for shape in ((2, 3), (5,), ())]
    return [tensor.to(dtype).requires_grad_() for tensor in drawn]


def make_optimizer(params: list[Tensor], rule: HierarchicalRule, lr: Tensor) -> LearnedOptimizer:
    """One problem of two groups."""
    groups = [
        {"params": params[:1], "lr": lr, "weight_decay": WEIGHT_DECAY},
        {"params": params[1:], "lr": FIXED_LR},
    ]
    return LearnedOptimizer(
        groups, rule, maximize=True, seed=SEED, state_dtype=torch.float64, differentiable=True
    )


def start_state(rule: HierarchicalRule, params: list[Tensor]) -> ProblemState:
    """The state before the first step as a function of the meta-parameters."""
    planes, tensors = [], []
    for index, p in enumerate(params):
        generator = torch.Generator().manual_seed(step_seed(SEED, 0, index))
        drawn, tensor = rule.init_tensor(p.detach(), generator, torch.float64)
        h = torch.stack([number.expand(p.shape) for number in rule.param_start])
        planes.append(torch.cat((h, drawn[rule.param_size :])))
        tensors.append(torch.cat((rule.tensor_start, tensor[-1:])))
    return ProblemState(planes, tensors, [0] * len(params), rule.global_start)


def objective_gradient(p: Tensor, step: int) -> Tensor | None:
    """Depends on where it is taken, so second derivatives count; the 0-dim tensor rests once."""
    if step == 1 and p.dim() == 0:
        return None
    return p.clone().sin() + 0.3 * (step + 1)


@mirrors("differentiable")
@pytest.mark.parametrize("attention", [False, True])
def test_gradients_are_those_of_a_loop_over_the_reference(attention: bool) -> None:
    rule = make_rule(attention).double()
    starts, lr = make_starts(torch.float64), torch.tensor(0.7, dtype=torch.float64)
    leaves = [*starts, lr.requires_grad_(), *rule.parameters()]

    params = [start.clone() for start in starts]
    for p in params:
        p.retain_grad()  # torch warns of reading a .grad that it would not fill
    optimizer = make_optimizer(params, rule, lr)
    looped, state = list(starts), start_state(rule, starts)
    for step in range(3):
        for p in params:
            p.grad = objective_gradient(p, step)
        optimizer.step()
        seen = [objective_gradient(p, step) for p in looped]
        updates, state = rule.reference_step([None if g is None else -g for g in seen], state)
        for i, update in enumerate(updates):
            if update is not None:
                rate, decay = (lr, WEIGHT_DECAY) if i == 0 else (FIXED_LR, 0.0)
                looped[i] = (1 - rate * decay) * looped[i] + rate * update

    hidden = optimizer.state["global/0"]["hidden"]
    planes = [optimizer.state[p]["planes"] for p in params]
    tensors = [optimizer.state[p]["tensor"] for p in params]
    found = [*params, *planes, *tensors, hidden]
    expected = [*looped, *state.planes, *state.tensors, state.hidden]
    torch.testing.assert_close(found, expected)
    assert [int(optimizer.state[p]["step"]) for p in params] == state.steps == [3, 3, 2]

    gradients = [
        torch.autograd.grad(sum(t.square().sum() for t in results), leaves)
        for results in (found, expected)
    ]
    torch.testing.assert_close(*gradients)
    assert all(bool((gradient != 0).any()) for gradient in gradients[0])


@mirrors("differentiable")
def test_gradcheck_through_one_step() -> None:
    rule = make_rule().double()
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> Tensor:
        return torch.rand(shape, dtype=torch.float64, generator=generator).add(0.1).requires_grad_()

    shapes = [(2,), ()]
    values, grads = ([drawn(*shape) for shape in shapes] for _ in range(2))
    planes = [drawn(rule.state_planes, *shape) for shape in shapes]
    tensors = [drawn(rule.tensor_size + 1) for _ in shapes]

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        params = [p.clone() for p in inputs[:2]]
        optimizer = LearnedOptimizer(params, rule, differentiable=True, state_dtype=torch.float64)
        for i, p in enumerate(params):
            p.grad = inputs[2 + i]
            optimizer.state[p] = {
                "planes": inputs[4 + i], "tensor": inputs[6 + i], "step": torch.tensor(4.0)
            }  # fmt: skip
        optimizer.state["global/0"] = {"hidden": inputs[8]}
        optimizer.step()
        states = [optimizer.state[p][name] for p in params for name in ("planes", "tensor")]
        return (*params, *states, optimizer.state["global/0"]["hidden"])

    inputs = (*values, *grads, *planes, *tensors, drawn(rule.global_size))
    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_the_differentiable_step_is_the_step(dtype: torch.dtype, attention: bool) -> None:
    rule = make_rule(attention)
    generator = torch.Generator().manual_seed(2)
    starts = [
        torch.randn(4, 3, generator=generator).to(dtype).T,
        torch.zeros(0, dtype=dtype),
        torch.randn(2, generator=generator).to(dtype),
    ]
    plain = [torch.nn.Parameter(start.clone()) for start in starts]
    recorded = [start.clone() for start in starts]
    options: dict[str, Any] = {"lr": torch.tensor([0.5]), "weight_decay": 0.1, "maximize": True}
    optimizers = [
        LearnedOptimizer(plain, rule, **options),
        LearnedOptimizer(recorded, rule, differentiable=True, **options),
    ]
    with on_backend("auto"):
        for step in range(3):
            set_grads(plain, step)
            for p, twin in zip(plain, recorded, strict=True):
                assert p.grad is not None
                twin.grad = p.grad.clone()
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = torch.tensor([0.5 / (1 + step)])
                optimizer.step()
        for optimizer in optimizers:
            optimizer.eval()
    # the in-place kernels may round an update differently
    tolerance = 8 * torch.finfo(dtype).eps
    for p, twin in zip(plain, recorded, strict=True):
        torch.testing.assert_close(twin.detach(), p.detach(), rtol=tolerance, atol=tolerance)
        entries = [opt.state[each] for opt, each in zip(optimizers, (p, twin), strict=True)]
        assert entries[0].keys() == entries[1].keys()
        for name in entries[0]:
            first, second = (entry[name].detach() for entry in entries)
            torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    hidden = [optimizer.state["global/0"]["hidden"].detach() for optimizer in optimizers]
    torch.testing.assert_close(*hidden, rtol=1e-5, atol=1e-6)


def test_states_can_be_saved_and_go_on() -> None:
    rule = make_rule()
    params = [start.detach().clone() for start in make_starts(torch.float32)]
    optimizer = LearnedOptimizer(params, rule, differentiable=True)
    set_grads(params, 0)
    optimizer.step()
    twins = [p.detach().clone() for p in params]
    other = LearnedOptimizer(twins, rule, differentiable=True)
    other.load_state_dict(copy.deepcopy(detached(optimizer.state_dict())))
    for each, mine in ((optimizer, params), (other, twins)):
        set_grads(mine, 1)
        each.step()
    assert_same_bits(params, twins)


def detached(value: Any) -> Any:
    """The same nest of dictionaries with tensors that are no part of a graph."""
    if isinstance(value, dict):
        return {key: detached(entry) for key, entry in value.items()}
    return value.detach() if isinstance(value, Tensor) else value


@pytest.mark.parametrize("policy", ["raise", "skip", "pass"])
def test_nonfinite_policies_hold_here_too(policy: str) -> None:
    params = [start.detach().clone() for start in make_starts(torch.float32)]
    alone = [p.clone() for p in params[1:]]
    rule = make_rule()
    optimizer = LearnedOptimizer(params, rule, differentiable=True, nonfinite=policy)
    set_grads(params, 0)
    assert params[0].grad is not None
    params[0].grad[1] = torch.nan
    if policy == "raise":
        with unchanged(optimizer), pytest.raises(RuntimeError, match="parameter 0 of group 0"):
            optimizer.step()
        return
    before = params[0].clone()
    optimizer.step()
    if policy == "pass":
        assert bool(params[0].isnan().all())  # by the rms of its direction
        assert bool(optimizer.state["global/0"]["hidden"].isnan().all())
        return
    assert_same_bits([params[0]], [before])
    assert int(optimizer.state[params[0]]["step"]) == 0
    # The others step as if the skipped one were not there.
    single = LearnedOptimizer([{"params": [before]}, {"params": alone}], rule, differentiable=True)
    for p, twin in zip(params[1:], alone, strict=True):
        twin.grad = p.grad
    single.step()
    assert_same_bits(params[1:], alone)


def test_leaves_and_forced_backends_without_such_a_step_are_refused() -> None:
    leaf = torch.nn.Parameter(torch.ones(3))
    optimizer = LearnedOptimizer([("w", leaf)], make_rule(), differentiable=True)
    set_grads([leaf], 0)
    with unchanged(optimizer), pytest.raises(RuntimeError, match=r"'w'.* is a leaf.*clone"):
        optimizer.step()
    p = torch.ones(3)
    optimizer = LearnedOptimizer([p], make_rule(), differentiable=True)
    set_grads([p], 0)
    for name in set(present_backends()) - {"reference"}:
        refused = pytest.raises(RuntimeError, match="no differentiable step of hierarchical")
        with unchanged(optimizer), refused, fastl2o.backend(name):
            optimizer.step()
    with fastl2o.backend("reference"):
        optimizer.step()
    assert not torch.equal(p.detach(), torch.ones(3))


def test_attention_refuses_an_lr_whose_change_the_graph_would_miss() -> None:
    p = torch.ones(3)
    optimizer = LearnedOptimizer(
        [p], make_rule(attention=True), torch.tensor(0.5, requires_grad=True), differentiable=True
    )
    set_grads([p], 0)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = torch.tensor(0.25, requires_grad=True)
    with unchanged(optimizer), pytest.raises(RuntimeError, match=r"group 0: .*attention.*lr"):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.25
    optimizer.step()
    assert p.requires_grad
    optimizer.eval()
    with unchanged(optimizer), pytest.raises(RuntimeError, match=r"call optimizer.train\(\)"):
        optimizer.step()
