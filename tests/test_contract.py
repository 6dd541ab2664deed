"""What torch tests of every optimizer, retold: direction, schedulers, groups, paths, no-ops.

Each test names the torch test it mirrors; ``test_contract_checklist.py`` sees that none is missing.
What a learned rule cannot be held to is a row with its reason in ``RULES`` of ``optimizers.py``.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import lr_scheduler

import fastl2o
from fastl2o import LearnedOptimizer, LSTMRule
from fastl2o.rules import CoordinateRule
from tests.common import assert_as_accurate, present_backends
from tests.optimizers import (
    COORDINATE_WISE,
    DTYPES,
    OPTIONS,
    ORACLE,
    ORACLES,
    RANDOM,
    RULES,
    OptimizerCase,
    Oracle,
    assert_same_bits,
    clone_params,
    make_params,
    mirrors,
    on_backend,
    option_id,
    run_steps,
    set_grads,
    unchanged,
)

LR = 0.02
KERNELS = [name for name in present_backends() if name != "reference"]
by_rule = pytest.mark.parametrize("case", RULES, ids=repr)
by_oracle = pytest.mark.parametrize("case", ORACLES, ids=repr)


on_kernels = pytest.mark.parametrize("backend", KERNELS, indirect=True)


@pytest.fixture(params=present_backends(), autouse=True)
def backend(request: pytest.FixtureRequest) -> Any:
    """Run each test on every backend there is."""
    with on_backend(request.param) as name:
        yield name


def _linear_problem(contiguous: bool) -> tuple[list[torch.nn.Parameter], Any]:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(10, 5, 2, generator=generator)
    weight = weight[..., 0].contiguous() if contiguous else weight[..., 0]
    params = [torch.nn.Parameter(weight), torch.nn.Parameter(torch.randn(10, generator=generator))]
    features = torch.randn(5, generator=generator)

    def loss() -> Tensor:
        return (params[0] @ features + params[1]).square().sum()

    return params, loss


SCHEDULERS = {
    "none": lambda opt: None,
    "step": lambda opt: lr_scheduler.StepLR(opt, gamma=0.5, step_size=5),
    "linear": lambda opt: lr_scheduler.LinearLR(opt, start_factor=0.4, total_iters=4),
    "cosine": lambda opt: lr_scheduler.CosineAnnealingLR(opt, T_max=20),
    "exponential+plateau": lambda opt: [
        lr_scheduler.ExponentialLR(opt, gamma=0.95),
        lr_scheduler.ReduceLROnPlateau(opt),
    ],
}


def _advance(schedulers: Any, loss: Tensor) -> None:
    for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(loss.detach())
        elif scheduler is not None:
            scheduler.step()


@mirrors("forloop_goes_right_direction")
@pytest.mark.parametrize(
    ("contiguous", "scheduler"),
    [*((True, name) for name in SCHEDULERS), (False, "none")],
    ids=lambda value: {True: "contiguous", False: "strided"}.get(value, value),
)
@by_oracle
def test_goes_in_the_right_direction_with_its_oracle(
    case: OptimizerCase, contiguous: bool, scheduler: str
) -> None:
    params, loss = _linear_problem(contiguous)
    twins, _ = _linear_problem(contiguous)
    optimizer = LearnedOptimizer(params, case.rule(LR))
    oracle = Oracle(case, twins, LR)
    plans = SCHEDULERS[scheduler](optimizer), SCHEDULERS[scheduler](oracle.inner)
    losses = []
    for _ in range(16):
        optimizer.zero_grad()
        value = loss()
        losses.append(value.item())
        value.backward()
        optimizer.step()
        for p, q in zip(params, twins, strict=True):
            q.grad = p.grad.clone()  # same gradients for both, so that errors do not feed back
        oracle.step()
        _advance(plans[0], value)
        _advance(plans[1], value)
    assert min(losses) < 0.7 * losses[0]  # momentum may have swung past the minimum
    torch.testing.assert_close(params, twins, **ORACLE)


@mirrors("param_group_with_lrscheduler_goes_right_direction", "param_groups_lr")
@by_oracle
def test_groups_have_their_own_lr_and_schedules(case: OptimizerCase) -> None:
    params, twins = make_params(), make_params()
    groups = [{"params": params[:4]}, {"params": params[4:], "lr": 0.25}]
    optimizer = LearnedOptimizer(groups, case.rule(LR), lr=0.5)
    oracles = [Oracle(case, twins[:4], LR, lr=0.5), Oracle(case, twins[4:], LR, lr=0.25)]
    schedulers = [
        lr_scheduler.LambdaLR(opt, factors)
        for opt, factors in (
            (optimizer, [lambda t: 0.9**t, lambda t: 1.0 / (t + 1)]),
            (oracles[0].inner, lambda t: 0.9**t),
            (oracles[1].inner, lambda t: 1.0 / (t + 1)),
        )
    ]
    for step in range(10):
        set_grads(params, step)
        set_grads(twins, step)
        for each in (optimizer, *oracles):
            each.step()
        for scheduler in schedulers:
            scheduler.step()
    torch.testing.assert_close(params, twins, **ORACLE)


@mirrors("param_groups_weight_decay", "tensor_lr")
@pytest.mark.parametrize("options", OPTIONS, ids=option_id)
@by_oracle
def test_every_option_does_what_the_oracle_does(
    case: OptimizerCase, options: dict[str, Any]
) -> None:
    params, twins = make_params(), make_params()
    optimizer = LearnedOptimizer(params, case.rule(LR), **options)
    oracle = Oracle(case, twins, LR, **options)
    for step in range(5):
        set_grads(params, step)
        set_grads(twins, step)
        optimizer.step()
        oracle.step()
    torch.testing.assert_close(params, twins, **ORACLE)


@mirrors("tensor_lr")
def test_a_tensor_lr_is_read_at_each_step_and_not_changed() -> None:
    lr = torch.tensor(1.0)
    params, twins = make_params(), make_params()
    with_tensor = LearnedOptimizer(params, RANDOM[0].rule(LR), lr=lr)
    with_float = LearnedOptimizer(twins, RANDOM[0].rule(LR), lr=1.0)
    for step, value in enumerate((1.0, 0.5, 0.25)):
        lr.fill_(value)
        with_float.param_groups[0]["lr"] = value
        run_steps(with_tensor, 1, seed=step)
        run_steps(with_float, 1, seed=step)
    assert_same_bits(params, twins)
    assert lr.item() == 0.25


def _seven_steps(
    optimizer: LearnedOptimizer, params: list[torch.nn.Parameter], dtype: torch.dtype
) -> None:
    """Gradients come and go: none at step 2, a layer frozen at steps 3 to 5."""
    for step in range(7):
        set_grads(params, step, rounded_to=dtype)
        for position, p in enumerate(params):
            if step == 2 or (position == 6 and 3 <= step <= 5):
                p.grad = None
        optimizer.step()


@mirrors("fused_matches_forloop", "foreach_matches_forloop")
@on_kernels
@pytest.mark.parametrize("flag", ["foreach", "fused"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", RANDOM, ids=repr)
def test_list_kernels_match_the_reference_loop(
    case: OptimizerCase, dtype: torch.dtype, flag: str
) -> None:
    results: dict[str, list[Tensor]] = {}
    for name, flags in (
        ("K", {flag: True}),
        ("P", {"foreach": False}),
        ("R", {"foreach": False, "state_dtype": torch.float64}),
    ):
        params = make_params(dtype=dtype)
        if name == "R":
            params = [torch.nn.Parameter(p.detach().double()) for p in params]
        optimizer = LearnedOptimizer(params, case.rule(LR), lr=0.7, weight_decay=0.1, **flags)
        _seven_steps(optimizer, params, dtype)
        states = [optimizer.state[p]["planes"] for p in params]
        results[name] = [torch.cat([t.detach().flatten() for t in part])
                         for part in (params, states)]  # fmt: skip
    for kernel, plain, exact in zip(*(results[name] for name in "KPR"), strict=True):
        if kernel.dtype == torch.float64:  # the maths is float32 all the same
            kernel, plain = kernel.float(), plain.float()
        assert_as_accurate(kernel, plain, exact)


@mirrors("mixed_device_dtype")
@pytest.mark.parametrize("case", COORDINATE_WISE, ids=repr)
def test_mixed_dtypes_in_one_optimizer_are_stepped_as_if_alone(case: OptimizerCase) -> None:
    apart, together = [make_params(dtype=d) for d in DTYPES], [make_params(dtype=d) for d in DTYPES]
    rule = case.rule(LR)
    optimizers = [LearnedOptimizer(params, rule) for params in apart]
    mixed = LearnedOptimizer([p for params in together for p in params], rule)
    for step in range(2):
        for params in (*apart, *together):
            set_grads(params, step)
        for optimizer in (*optimizers, mixed):
            optimizer.step()
    for params, twins in zip(apart, together, strict=True):
        assert_same_bits(params, twins)


@mirrors("set_default_dtype_works_with_foreach")
@pytest.mark.parametrize("case", RANDOM, ids=repr)
def test_the_default_dtype_does_not_matter(case: OptimizerCase) -> None:
    rule, results = case.rule(LR), []
    for default in (torch.float32, torch.float64):
        torch.set_default_dtype(default)
        try:
            params = make_params()
            optimizer = LearnedOptimizer(params, rule)
            for step in range(3):
                for position, p in enumerate(params):
                    p.grad = torch.full_like(p, 0.1 * position + step)
                optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
        results.append([*params, *(optimizer.state[p]["planes"] for p in params)])
    assert_same_bits(*results)


@mirrors("defaults_changed_to_foreach")
@pytest.mark.parametrize(
    ("flags", "backend_used"),
    [
        ({}, "auto"),
        ({"foreach": True}, "auto"),
        ({"fused": True}, "auto"),
        ({"foreach": True, "fused": False}, "auto"),
        ({"foreach": False}, "reference"),
        ({"fused": False}, "reference"),
        ({"foreach": False, "fused": True}, "auto"),
    ],
    ids=str,
)
def test_flags_choose_the_list_kernels_or_the_reference_loop(
    flags: dict[str, bool], backend_used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    real = fastl2o.ops.step_

    def spy(*args: Any, **kwargs: Any) -> None:
        seen.append(fastl2o.backends.requested())
        real(*args, **kwargs)

    monkeypatch.setattr(fastl2o.ops, "step_", spy)
    optimizer = LearnedOptimizer(make_params(), RANDOM[0].rule(LR), **flags)
    with fastl2o.backend("auto"):
        run_steps(optimizer, 1)
    assert seen == [backend_used]


@mirrors("fused_does_not_step_if_foundinf")
@pytest.mark.parametrize("first_step", [True, False], ids=["first", "later"])
@by_rule
def test_found_inf_leaves_everything_alone(case: OptimizerCase, first_step: bool) -> None:
    optimizer = LearnedOptimizer(make_params(), case.rule(LR), fused=True)
    if not first_step:
        run_steps(optimizer, 2)
    set_grads(optimizer.param_groups[0]["params"], 9)
    optimizer.param_groups[0]["params"][0].grad.fill_(torch.inf)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(1.0)
    with unchanged(optimizer):
        optimizer.step()


@mirrors("fused_error_on_params_on_meta")
def test_parameters_on_the_meta_device_are_refused() -> None:
    with torch.device("meta"):
        p = torch.nn.Parameter(torch.zeros(3))
        p.grad = torch.zeros(3)
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0.* meta device"):
        LearnedOptimizer([p], RANDOM[0].rule(LR), fused=True).step()


@mirrors("step_is_noop_when_params_have_no_grad")
@by_rule
def test_parameters_without_gradients_are_left_alone(case: OptimizerCase) -> None:
    optimizer = LearnedOptimizer(make_params(), case.rule(LR), weight_decay=0.5)
    with unchanged(optimizer):
        optimizer.step()
    assert not optimizer.state


@mirrors("step_is_noop_for_zero_grads")
@by_rule
def test_zero_gradients(case: OptimizerCase) -> None:
    """A no-op where the rule is a known optimizer, else the reference's update; none if lr = 0."""
    params = make_params()
    before = clone_params(params)
    for p in params:
        p.grad = torch.zeros_like(p)
    rule = case.rule(LR)
    LearnedOptimizer(params, rule, lr=0.0, weight_decay=1.0).step()
    assert all(map(torch.equal, params, before))
    LearnedOptimizer(params, rule).step()
    is_noop = all(map(torch.equal, params, before))
    assert is_noop == ("step_is_noop_for_zero_grads" not in case.exempt)
    if not isinstance(rule, CoordinateRule):
        return  # its steps are compared in test_hierarchical_ops.py
    exact = copy.deepcopy(rule).double()
    for p, old in zip(params, before, strict=True):
        update, _ = rule.reference_step(p.grad, rule.init_state(p))
        wide, _ = exact.reference_step(p.grad.double(), rule.init_state(p, torch.float64))
        assert_as_accurate(p, old + update, old.double() + wide)


def test_bfloat16_state_steps_like_float32_state_but_for_its_rounding() -> None:
    params, twins = make_params(), make_params()
    rule = LSTMRule(5)
    optimizers = [
        LearnedOptimizer(params, rule, state_dtype=torch.bfloat16),
        LearnedOptimizer(twins, rule),
    ]
    for optimizer in optimizers:
        run_steps(optimizer, 5)
    for p, twin in zip(params, twins, strict=True):
        assert optimizers[0].state[p]["planes"].dtype == torch.bfloat16
        # each rounding of the state is 2^-9 relative at most, and |u| <= 0.1 (5 * max|w| + |b|)
        torch.testing.assert_close(p, twin, rtol=0, atol=0.05)
