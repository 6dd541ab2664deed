"""LearnedOptimizer's own promises: groups, memory layouts, resuming, copies, scaling, caching."""

from __future__ import annotations

import copy
import doctest
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastl2o
from fastl2o import HierarchicalRule, LearnedOptimizer, LSTMRule, RNNPropRule, Rule, drop_ins, optim
from tests.common import present_backends
from tests.optimizers import (
    DTYPES,
    RANDOM,
    OptimizerCase,
    assert_same_bits,
    clone_params,
    make_params,
    on_backend,
    run_steps,
    set_grads,
    snapshot,
    unchanged,
)

by_case = pytest.mark.parametrize("case", RANDOM, ids=repr)


@pytest.fixture(params=present_backends(), autouse=True)
def backend(request: pytest.FixtureRequest) -> Any:
    """Run each test on every backend there is."""
    with on_backend(request.param) as name:
        yield name


Calls = list[dict[str, Any]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Keyword arguments and number of tensors of each list op called; they still happen."""
    seen, real = Calls(), fastl2o.ops.step_

    def spy(rule: Rule, params: list[Tensor], *rest: Any, **options: Any) -> None:
        seen.append({"rule": rule, "count": len(params), **options})
        real(rule, params, *rest, **options)

    monkeypatch.setattr(fastl2o.ops, "step_", spy)
    return seen


# Groups and rules


def test_doctests_of_the_public_classes() -> None:
    assert doctest.testmod(optim, raise_on_error=True).attempted == 8
    assert doctest.testmod(drop_ins, raise_on_error=True).attempted == 18


@by_case
def test_groups_with_their_own_rules_step_as_separate_optimizers(case: OptimizerCase) -> None:
    params, twins = make_params(), make_params()
    first, second = case.rule(0), RNNPropRule(4, 2)
    groups = [{"params": params[:4], "lr": 0.3}, {"params": params[4:], "rule": second}]
    together = LearnedOptimizer(groups, first, weight_decay=0.2)
    apart = [
        LearnedOptimizer(twins[:4], first, lr=0.3, weight_decay=0.2),
        LearnedOptimizer(twins[4:], second, weight_decay=0.2),
    ]
    for step in range(3):
        set_grads(params, step)
        set_grads(twins, step)
        for optimizer in (together, *apart):
            optimizer.step()
    assert_same_bits(params, twins)


def test_a_rule_may_be_a_path_also_in_a_group(tmp_path: Path) -> None:
    rule = LSTMRule(3)
    rule.save(tmp_path / "mine.safetensors")
    group = {"params": make_params(), "rule": str(tmp_path / "mine.safetensors")}
    for optimizer in (
        LearnedOptimizer(make_params(), tmp_path / "mine.safetensors"),
        LearnedOptimizer([group], RNNPropRule(2)),
        fastl2o.LSTM(make_params(), rule=tmp_path / "mine.safetensors"),
    ):
        loaded = optimizer.param_groups[0]["rule"]
        assert_same_bits([loaded.flat_parameters()], [rule.flat_parameters()])


@pytest.mark.parametrize(
    ("drop_in", "rule"),
    [(fastl2o.LSTM, LSTMRule(3)), (fastl2o.RNNProp, RNNPropRule(3))],
    ids=["LSTM", "RNNProp"],
)
def test_named_drop_ins_are_learned_optimizers(drop_in: Any, rule: Rule) -> None:
    params, twins = make_params(), make_params()
    named = drop_in(params, 0.5, 0.1, True, rule=rule, nonfinite="skip", state_dtype=torch.bfloat16)
    plain = LearnedOptimizer(
        twins, rule, 0.5, 0.1, True, nonfinite="skip", state_dtype=torch.bfloat16
    )
    assert repr(named).startswith(drop_in.__name__ + " (")
    for optimizer in (named, plain):
        run_steps(optimizer, 2)
    assert_same_bits(snapshot(named), snapshot(plain))
    named.zero_grad()  # torch pickles no gradients
    assert_same_bits(snapshot(named), snapshot(pickle.loads(pickle.dumps(named))))


def test_equal_groups_share_a_list_op_and_others_do_not(calls: Calls) -> None:
    params = make_params()
    optimizer = LearnedOptimizer([{"params": [p]} for p in params], LSTMRule(3))
    run_steps(optimizer, 1, backend="auto")
    assert [call["count"] for call in calls] == [len(params)]
    calls.clear()
    optimizer.param_groups[2]["lr"] = 0.5
    optimizer.param_groups[5]["lr"] = torch.tensor(0.5)
    run_steps(optimizer, 1, backend="auto")
    assert [(call["count"], call["lr"]) for call in calls] == [(len(params) - 2, 1.0), (2, 0.5)]


def test_a_group_can_be_added_later() -> None:
    params, twins = make_params(), make_params()
    rule = RNNPropRule(3)
    optimizer = LearnedOptimizer(params[:4], rule)
    run_steps(optimizer, 2)
    optimizer.add_param_group({"params": params[4:], "lr": 0.5})
    set_grads(params, 7)
    optimizer.step()
    fresh = LearnedOptimizer(twins[4:], rule, lr=0.5)
    set_grads(twins, 7)
    fresh.step()
    assert_same_bits(params[4:], twins[4:])
    assert [optimizer.state[p]["step"].item() for p in (params[0], params[4])] == [3.0, 1.0]


def test_a_closure_is_called_once_with_gradients_enabled() -> None:
    p, seen = torch.nn.Parameter(torch.ones(3)), []
    optimizer = LearnedOptimizer([p], LSTMRule(2))

    def closure() -> float:
        seen.append(torch.is_grad_enabled())
        loss = p.square().sum()
        loss.backward()
        return loss.item()

    with torch.no_grad():
        assert optimizer.step(closure) == 3.0
    assert seen == [True]
    assert optimizer.step() is None


def test_meta_parameters_are_read_at_each_step() -> None:
    params = make_params()
    rule = LSTMRule(3)
    optimizer = LearnedOptimizer(params, rule)
    run_steps(optimizer, 1)
    before = clone_params(params)
    with torch.no_grad():
        rule.readout.weight.zero_()
        rule.readout.bias.zero_()
    run_steps(optimizer, 1)
    assert_same_bits(params, before)


# Memory layouts

LAYOUTS = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 3).contiguous().transpose(0, 3),
    "sliced": lambda t: torch.stack([t, t], dim=2).select(2, 0),
    "every second": lambda t: t.repeat_interleave(2, dim=3)[..., ::2],
}


@pytest.mark.parametrize("grad_layout", ["same", "contiguous", "every second"])
@pytest.mark.parametrize("layout", ["contiguous", *LAYOUTS])
@by_case
def test_any_layout_steps_like_a_contiguous_twin(
    case: OptimizerCase, layout: str, grad_layout: str, backend: str
) -> None:
    change = LAYOUTS.get(layout, torch.clone)
    start, beside = torch.randn(3, 4, 2, 5), torch.randn(2, 2)
    params = [torch.nn.Parameter(change(start)), torch.nn.Parameter(beside.clone())]
    twins = [torch.nn.Parameter(start.clone()), torch.nn.Parameter(beside.clone())]
    optimizer = LearnedOptimizer(params, case.rule(0), weight_decay=0.1)
    plain = LearnedOptimizer(twins, case.rule(0), weight_decay=0.1)
    change_grad = change if grad_layout == "same" else LAYOUTS.get(grad_layout, torch.clone)
    for step in range(2):
        set_grads(params, step)
        set_grads(twins, step)
        params[0].grad = change_grad(params[0].grad)
        optimizer.step()
        plain.step()
    assert params[0].stride() == change(start).stride()
    pairs = ((optimizer, params), (plain, twins))
    if isinstance(optimizer.param_groups[0]["rule"], HierarchicalRule):
        backend = "reference"  # its means add up in the order of the memory
    assert_twins(params, twins, backend)
    states = ([opt.state[p]["planes"] for p in each] for opt, each in pairs)
    assert_twins(*states, backend)


def assert_twins(first: list[Any], second: list[Any], backend: str) -> None:
    """Assert equal bits; the reference's products round by a coordinate's place."""
    if backend == "reference":
        torch.testing.assert_close(first, second)
    else:
        assert_same_bits(first, second)


def test_state_planes_lie_in_memory_as_their_parameter() -> None:
    p = torch.nn.Parameter(LAYOUTS["channels_last"](torch.randn(3, 4, 2, 5)))
    optimizer = LearnedOptimizer([p], LSTMRule(2))
    run_steps(optimizer, 1)
    assert optimizer.state[p]["planes"][1].stride() == p.stride()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.state[p]["planes"][1].stride() == p.stride()


def test_a_parameter_whose_data_is_swapped_is_noticed(backend: str) -> None:
    """As by model.half() or model.to(memory_format=...) between two steps."""
    p = torch.nn.Parameter(torch.randn(3, 4, 2, 5))
    twin = torch.nn.Parameter(p.detach().clone())
    rule = RNNPropRule(2, 1)
    optimizers = LearnedOptimizer([p], rule), LearnedOptimizer([twin], rule)
    for optimizer in optimizers:
        run_steps(optimizer, 2)
    p.data = p.data.contiguous(memory_format=torch.channels_last)
    for optimizer in optimizers:
        run_steps(optimizer, 2, seed=50)
    assert_twins([p], [twin], backend)
    for q in (p, twin):
        q.grad = None
        q.data = q.data.half()
    for optimizer in optimizers:
        run_steps(optimizer, 2, seed=60)
    assert p.dtype == torch.half
    assert_twins([optimizers[0].state[p]["planes"]], [optimizers[1].state[twin]["planes"]], backend)


def test_autograd_learns_that_a_parameter_has_changed() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = LearnedOptimizer([p], LSTMRule(2))
    loss = p.square().sum()
    set_grads([p], 0)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Resuming and copies


@pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    [*((dtype, torch.float32) for dtype in DTYPES), (torch.bfloat16, torch.bfloat16)],
    ids=str,
)
@by_case
def test_a_run_resumed_from_a_file_has_the_same_bits(
    case: OptimizerCase, dtype: torch.dtype, state_dtype: torch.dtype
) -> None:
    params = make_params(dtype=dtype)
    rule = case.rule(0)
    optimizer = LearnedOptimizer(params, rule, state_dtype=state_dtype)
    run_steps(optimizer, 2)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    resumed_params = clone_params(params)
    run_steps(optimizer, 2, seed=50)
    file.seek(0)
    # the constructor's state_dtype is another: like lr, it is the checkpoint's that counts
    resumed = LearnedOptimizer(resumed_params, rule, state_dtype=torch.float64)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    run_steps(resumed, 2, seed=50)
    assert_same_bits(snapshot(optimizer), snapshot(resumed))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
def test_copies_keep_the_rule_and_work_under_a_scheduler(copied: Any) -> None:
    optimizer = LearnedOptimizer(make_params(), RNNPropRule(3))
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # wraps step on the instance
    run_steps(optimizer, 2)
    optimizer.zero_grad()  # torch pickles no gradients
    twin = copied(optimizer)
    assert isinstance(twin.param_groups[0]["rule"], RNNPropRule)
    assert twin._step_supports_amp_scaling
    for each in (optimizer, twin):
        run_steps(each, 2, seed=50)
    assert_same_bits(snapshot(optimizer), snapshot(twin))


def test_an_old_pickle_gets_the_missing_flags() -> None:
    optimizer = LearnedOptimizer(make_params(), RNNPropRule(3))
    run_steps(optimizer, 1)
    state = optimizer.__getstate__()
    for options in (state["defaults"], *state["param_groups"]):
        del options["nonfinite"], options["foreach"], options["state_dtype"]
    twin = LearnedOptimizer.__new__(LearnedOptimizer)
    twin.__setstate__(state)
    run_steps(twin, 1)
    assert twin.defaults["nonfinite"] == "raise"


def test_state_removed_by_the_user_starts_again() -> None:
    params, twins = make_params(), make_params()
    rule = RNNPropRule(3)
    optimizer = LearnedOptimizer(params, rule)
    run_steps(optimizer, 2)
    optimizer.state.clear()
    other = LearnedOptimizer(twins, rule)
    for p, twin in zip(params, twins, strict=True):
        twin.data.copy_(p.data)
    run_steps(optimizer, 2, seed=50)
    run_steps(other, 2, seed=50)
    assert_same_bits(snapshot(optimizer), snapshot(other))


# Gradient scaling


@pytest.mark.parametrize("flags", [{}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("unscale_first", [False, True])
@by_case
def test_grad_scaler(case: OptimizerCase, unscale_first: bool, flags: dict[str, bool]) -> None:
    """A scaled run equals an unscaled one; an overflow changes nothing and lowers the scale."""
    layout = LAYOUTS["channels_last"](torch.randn(3, 4, 2, 5))
    params = [*make_params(), torch.nn.Parameter(layout)]
    twins = clone_params(params)
    optimizer = LearnedOptimizer(params, case.rule(0), **flags)
    plain = LearnedOptimizer(twins, case.rule(0), **flags)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    for step in range(3):
        set_grads(params, step)
        set_grads(twins, step)
        scaler.scale(torch.ones(()))
        for p in params:
            p.grad = (p.grad * 1024.0).clone(memory_format=torch.contiguous_format)
        if step == 1:
            params[3].grad[0] = torch.inf
        else:
            plain.step()
        if unscale_first:
            scaler.unscale_(optimizer)
        before = snapshot(optimizer)[: len(params)]
        scaler.step(optimizer)
        if step == 1:
            assert_same_bits(before, snapshot(optimizer)[: len(params)])
            scaler.update(1024.0)
        else:
            assert_same_bits([p.grad for p in params], [p.grad for p in twins])
            scaler.update()
    assert_same_bits(params, twins)
    pairs = ((optimizer, params), (plain, twins))
    assert_same_bits(*([opt.state[p]["planes"] for p in each] for opt, each in pairs))
    assert not {"grad_scale", "found_inf"} & set(vars(optimizer))


# Caching


def test_the_plan_of_a_step_is_kept_while_nothing_but_numbers_changes() -> None:
    params = make_params()
    optimizer = LearnedOptimizer(params, RNNPropRule(2), lr=torch.tensor(1.0))
    run_steps(optimizer, 1)
    plan = optimizer._plan
    optimizer.param_groups[0]["lr"].fill_(0.5)
    run_steps(optimizer, 2)
    assert optimizer._plan is plan
    params[0].grad = None
    optimizer.step()
    assert optimizer._plan is not plan


def test_two_optimizers_that_load_one_checkpoint_do_not_share_state() -> None:
    source = LearnedOptimizer(make_params(), RNNPropRule(2))
    run_steps(source, 1)
    loaded = LearnedOptimizer(make_params(), source.param_groups[0]["rule"])
    loaded.load_state_dict(source.state_dict())
    with unchanged(source):
        run_steps(loaded, 2)
