"""What users put around an optimizer: clipping, accumulation, averaging, hooks, offloading."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from fastl2o import LearnedOptimizer
from tests.common import present_backends
from tests.optimizers import (
    COORDINATE_WISE,
    ORACLE,
    RANDOM,
    RULES,
    OptimizerCase,
    Oracle,
    assert_same_bits,
    make_params,
    on_backend,
    run_steps,
    set_grads,
    snapshot,
)

LR = 0.02
by_random = pytest.mark.parametrize("case", RANDOM, ids=repr)
by_coordinate_wise = pytest.mark.parametrize("case", COORDINATE_WISE, ids=repr)
SGD = next(case for case in RULES if case.name == "sgd")


@pytest.fixture(params=present_backends(), autouse=True)
def backend(request: pytest.FixtureRequest) -> Any:
    """Run each test on every backend there is."""
    with on_backend(request.param) as name:
        yield name


def _model(batch_norm: bool = False) -> torch.nn.Sequential:
    torch.manual_seed(0)
    middle = torch.nn.BatchNorm1d(8) if batch_norm else torch.nn.Tanh()
    return torch.nn.Sequential(torch.nn.Linear(4, 8), middle, torch.nn.Linear(8, 2))


def _batches(count: int) -> Tensor:
    return torch.randn(count, 6, 4, generator=torch.Generator().manual_seed(1))


def _loss(model: torch.nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - 1).square().mean()


# Gradients that others change before the step

Clip = Callable[[Iterable[Tensor]], object]
CLIPS: dict[str, tuple[Clip, Callable[[list[Tensor]], list[Tensor]]]] = {
    "norm": (
        lambda params: clip_grad_norm_(params, 0.5),
        lambda grads: [
            g * (0.5 / (torch.cat([each.flatten() for each in grads]).norm() + 1e-6)) for g in grads
        ],
    ),
    "value": (
        lambda params: clip_grad_value_(params, 0.1),
        lambda grads: [g.clamp(-0.1, 0.1) for g in grads],
    ),
}


@pytest.mark.parametrize("clip", CLIPS)
@by_random
def test_clipped_gradients_are_what_the_rule_sees(case: OptimizerCase, clip: str) -> None:
    params, twins = make_params(), make_params()
    rule = case.rule(LR)
    optimizer, plain = LearnedOptimizer(params, rule), LearnedOptimizer(twins, rule)
    apply, expected = CLIPS[clip]
    for step in range(3):
        set_grads(params, step)
        clipped = expected([p.grad for p in params])
        apply(params)
        for twin, p, grad in zip(twins, params, clipped, strict=True):
            torch.testing.assert_close(p.grad, grad)
            twin.grad = p.grad.clone()
        optimizer.step()
        plain.step()
    assert_same_bits(params, twins)


@by_random
def test_scaled_gradients_are_unscaled_clipped_and_stepped(case: OptimizerCase) -> None:
    """In the order of torch's recipe: scaler.unscale_, clip_grad_norm_, scaler.step."""
    params, twins = make_params(), make_params()
    rule = case.rule(LR)
    optimizer, plain = LearnedOptimizer(params, rule), LearnedOptimizer(twins, rule)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for step in range(4):
        overflows = step == 2
        set_grads(params, step)
        set_grads(twins, step)
        scaler.scale(torch.ones(()))
        for p in params:
            p.grad *= 256.0
        if overflows:
            params[3].grad[0] = torch.inf
        scaler.unscale_(optimizer)
        before = snapshot(optimizer)[: len(params)]
        clip_grad_norm_(params, 0.5)
        scaler.step(optimizer)
        scaler.update(256.0)
        if overflows:
            assert_same_bits(before, snapshot(optimizer)[: len(params)])
        else:
            clip_grad_norm_(twins, 0.5)
            plain.step()
    assert_same_bits(params, twins)


@pytest.mark.parametrize("set_to_none", [True, False])
@by_random
def test_accumulated_gradients_step_like_their_sum(case: OptimizerCase, set_to_none: bool) -> None:
    model, twin = _model(), _model()
    rule = case.rule(LR)
    accumulating = LearnedOptimizer(model.parameters(), rule)
    plain = LearnedOptimizer(twin.parameters(), rule)
    for batches in _batches(6).view(3, 2, 6, 4):
        accumulating.zero_grad(set_to_none=set_to_none)
        for batch in batches:
            (_loss(model, batch) / 2).backward()
        twin.load_state_dict(model.state_dict())
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            parts = [torch.autograd.grad(_loss(twin, batch) / 2, q)[0] for batch in batches]
            q.grad = parts[0] + parts[1]
            torch.testing.assert_close(p.grad, q.grad)
            q.grad.copy_(p.grad)
        accumulating.step()
        plain.step()
        assert_same_bits(model.parameters(), twin.parameters())


@by_random
def test_zeroed_and_absent_gradients_give_the_same_run(case: OptimizerCase) -> None:
    """Gradients that stay in place and gradients that are made anew."""
    runs = []
    for set_to_none in (True, False):
        model = _model()
        optimizer = LearnedOptimizer(model.parameters(), case.rule(LR))
        for batch in _batches(3):
            optimizer.zero_grad(set_to_none=set_to_none)
            _loss(model, batch).backward()
            optimizer.step()
        runs.append(list(model.parameters()))
    assert_same_bits(*runs)


def test_a_pre_hook_may_change_the_gradients() -> None:
    params, twins = make_params(), make_params()
    rule = RANDOM[0].rule(LR)
    hooked, plain = LearnedOptimizer(params, rule), LearnedOptimizer(twins, rule)

    def halve(optimizer: Any, args: Any, kwargs: Any) -> None:
        for p in optimizer.param_groups[0]["params"]:
            p.grad *= 0.5

    hooked.register_step_pre_hook(halve)
    set_grads(params, 0)
    set_grads(twins, 0)
    for twin in twins:
        twin.grad *= 0.5
    hooked.step()
    plain.step()
    assert_same_bits(params, twins)


# Averages of the parameters

AVERAGES: dict[str, dict[str, Any]] = {
    "SWA": {},
    "EMA": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
}


@pytest.mark.parametrize("average", AVERAGES)
def test_averaged_models_and_swa_schedules_work_as_with_torchs_own(average: str) -> None:
    """AveragedModel, SWALR and update_bn, beside SGD, which the rule is."""
    model, twin = _model(batch_norm=True), _model(batch_norm=True)
    optimizer = LearnedOptimizer(model.parameters(), SGD.rule(LR))
    oracle = Oracle(SGD, twin.parameters(), LR)
    averaged = [AveragedModel(each, **AVERAGES[average]) for each in (model, twin)]
    schedules = [
        SWALR(optimizer, swa_lr=0.25, anneal_epochs=3),
        SWALR(oracle.inner, swa_lr=0.25 * LR, anneal_epochs=3),
    ]
    for batch in _batches(6):
        for each, stepping in ((model, optimizer), (twin, oracle)):
            each.zero_grad()
            _loss(each, batch).backward()
            stepping.step()
        averaged[0].update_parameters(model)
        averaged[1].update_parameters(twin)
        for schedule in schedules:
            schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.25)
    for each in averaged:
        update_bn(_batches(3), each)
    torch.testing.assert_close(averaged[0].state_dict(), averaged[1].state_dict(), **ORACLE)


# Stepping one parameter at a time


@by_coordinate_wise
def test_stepping_in_the_backward_pass_is_stepping_after_it(case: OptimizerCase) -> None:
    """One optimizer for each parameter, stepped as soon as its gradient is complete, then freed."""
    model, twin = _model(), _model()
    rule = case.rule(LR)
    optimizers = {p: LearnedOptimizer([p], rule) for p in model.parameters()}

    def step_and_free(p: Tensor) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step_and_free)
    plain = LearnedOptimizer(twin.parameters(), rule)
    for batch in _batches(3):
        _loss(model, batch).backward()
        assert all(p.grad is None for p in model.parameters())
        plain.zero_grad()
        _loss(twin, batch).backward()
        plain.step()
    assert_same_bits(model.parameters(), twin.parameters())
    for (p, optimizer), q in zip(optimizers.items(), twin.parameters(), strict=True):
        assert_same_bits([optimizer.state[p]["planes"]], [plain.state[q]["planes"]])


@by_coordinate_wise
def test_one_optimizer_may_be_stepped_whenever_a_gradient_is_there(case: OptimizerCase) -> None:
    params, twins = make_params(), make_params()
    rule = case.rule(LR)
    piecewise, plain = LearnedOptimizer(params, rule), LearnedOptimizer(twins, rule)
    for step in range(2):
        set_grads(twins, step)
        plain.step()
        for p, twin in zip(params, twins, strict=True):
            p.grad = twin.grad
            piecewise.step()
            p.grad = None
    assert_same_bits(params, twins)


@by_coordinate_wise
def test_offloaded_masters_train_like_parameters_in_place(case: OptimizerCase) -> None:
    """As CPU offloading does: low-precision parameters, float32 masters and state on the CPU."""
    model, twin = _model().bfloat16(), _model().bfloat16()
    rule = case.rule(LR)
    masters = {p: torch.nn.Parameter(p.detach().float()) for p in model.parameters()}
    optimizers = {p: LearnedOptimizer([master], rule) for p, master in masters.items()}

    def offload(p: Tensor) -> None:
        masters[p].grad, p.grad = p.grad.float(), None
        optimizers[p].step()
        with torch.no_grad():
            p.copy_(masters[p])

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(offload)
    whole = [torch.nn.Parameter(p.detach().float()) for p in twin.parameters()]
    plain = LearnedOptimizer(whole, rule)
    for batch in _batches(3).bfloat16():
        _loss(model, batch).backward()
        twin.zero_grad()
        _loss(twin, batch).backward()
        for master, p in zip(whole, twin.parameters(), strict=True):
            master.grad = p.grad.float()
        plain.step()
        with torch.no_grad():
            for master, p in zip(whole, twin.parameters(), strict=True):
                p.copy_(master)
    assert_same_bits(masters.values(), whole)
    assert_same_bits(model.parameters(), twin.parameters())


# Parameters that rest for a while


@by_random
def test_parameters_that_are_frozen_and_thawed_keep_their_state(case: OptimizerCase) -> None:
    params = make_params()
    optimizer = LearnedOptimizer(params, case.rule(LR))
    run_steps(optimizer, 1)
    p = params[4]
    before, state = p.detach().clone(), optimizer.state[p]
    kept = {name: value.clone() for name, value in state.items()}
    p.requires_grad_(False)
    set_grads(params, 9)
    p.grad = None
    optimizer.step()
    assert_same_bits([p], [before])
    assert_same_bits(state.values(), kept.values())
    p.requires_grad_(True)
    run_steps(optimizer, 1, seed=20)
    assert not torch.equal(p, before)
    assert not torch.equal(state["planes"], kept["planes"])
