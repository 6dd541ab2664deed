"""What torch tests of every optimizer, retold: state, checkpoints, hooks, copies, errors, autograd.

The other half is ``test_contract.py``; ``test_contract_checklist.py`` sees that none is missing.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from fastl2o import HierarchicalRule, LearnedOptimizer, LSTMRule, RNNPropRule
from tests.common import present_backends
from tests.optimizers import (
    RANDOM,
    RULES,
    OptimizerCase,
    assert_same_bits,
    clone_params,
    make_params,
    mirrors,
    on_backend,
    run_steps,
    set_grads,
    snapshot,
)

LR = 0.02
by_rule = pytest.mark.parametrize("case", RULES, ids=repr)
by_random = pytest.mark.parametrize("case", RANDOM, ids=repr)
by_backend = pytest.mark.parametrize("backend", present_backends())


@pytest.fixture(autouse=True)
def _backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """Force the backend of tests that are run on each."""
    callspec = getattr(request.node, "callspec", None)
    with on_backend(callspec.params.get("backend", "auto") if callspec else "auto"):
        yield


def _tensors(state_dict: dict[str, Any]) -> list[Tensor]:
    entries = state_dict["state"]
    return [entries[k][name] for k in sorted(entries, key=str) for name in sorted(entries[k])]


@mirrors("state_dict_deterministic", "cpu_load_state_dict")
@by_backend
@by_rule
def test_a_loaded_optimizer_goes_on_with_the_same_bits(case: OptimizerCase, backend: str) -> None:
    rule = case.rule(LR)
    params = make_params()
    optimizer = LearnedOptimizer(params, rule, weight_decay=0.1)
    run_steps(optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    twins = clone_params(params)
    other = LearnedOptimizer(twins, rule)
    other.load_state_dict(optimizer.state_dict())
    for each in (optimizer, other):
        run_steps(each, 3, seed=50)
    assert_same_bits(snapshot(optimizer), snapshot(other))
    assert optimizer.state_dict()["param_groups"] == other.state_dict()["param_groups"]
    other.load_state_dict(saved)  # neither optimizer has written into the checkpoint
    assert_same_bits(_tensors(saved), _tensors(other.state_dict()))


@mirrors("can_load_older_state_dict", "load_nontensor_step")
@by_random
def test_old_checkpoints_get_the_missing_flags_and_tensor_steps(case: OptimizerCase) -> None:
    rule = case.rule(LR)
    optimizer = LearnedOptimizer(make_params(), rule)
    run_steps(optimizer, 2)
    old = copy.deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        for flag in ("maximize", "foreach", "fused", "capturable", "differentiable", "rule"):
            del group[flag]
        del group["nonfinite"], group["state_dtype"]
    for entry in old["state"].values():
        if "step" in entry:
            entry["step"] = entry["step"].item()
    other = LearnedOptimizer(clone_params(optimizer.param_groups[0]["params"]), rule)
    other.load_state_dict(old)
    for each in (optimizer, other):
        run_steps(each, 2, seed=50)
    assert_same_bits(snapshot(optimizer), snapshot(other))


@mirrors("can_load_from_to_named_state_dict")
@pytest.mark.parametrize("named_source", [True, False])
@pytest.mark.parametrize("named_target", [True, False])
def test_named_and_unnamed_checkpoints_are_exchangeable(
    named_source: bool, named_target: bool
) -> None:
    rule = RANDOM[0].rule(LR)
    model, target = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)

    def make(module: torch.nn.Module, named: bool) -> LearnedOptimizer:
        params = module.named_parameters() if named else module.parameters()
        return LearnedOptimizer(params, rule)

    source = make(model, named_source)
    run_steps(source, 2)
    target.load_state_dict(model.state_dict())
    other = make(target, named_target)
    other.load_state_dict(source.state_dict())
    for each in (source, other):
        run_steps(each, 2, seed=50)
    assert_same_bits(model.parameters(), target.parameters())
    names = other.param_groups[0].get("param_names")
    assert names == (["weight", "bias"] if named_source or named_target else None)


@mirrors("save_load_equality_with_weights_only")
@by_rule
def test_checkpoints_need_no_pickle(case: OptimizerCase) -> None:
    optimizer = LearnedOptimizer(
        make_params(), case.rule(LR), lr=torch.tensor(0.5), state_dtype=torch.bfloat16
    )
    run_steps(optimizer, 2)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert loaded["param_groups"] == optimizer.state_dict()["param_groups"]
    assert_same_bits(_tensors(loaded), _tensors(optimizer.state_dict()))


@mirrors("non_empty_state")
@by_rule
def test_state_is_made_by_the_first_step_and_holds_tensors_only(case: OptimizerCase) -> None:
    params = make_params()
    rule = case.rule(LR)
    optimizer = LearnedOptimizer(params, rule)
    assert not optimizer.state
    run_steps(optimizer, 3)
    for p in params:
        entry = dict(optimizer.state[p])
        assert entry.pop("planes").shape == (rule.state_planes, *p.shape)
        if rule.needs_step:
            step = entry.pop("step")
            # A hierarchical rule leaves tensors without elements out of its means and counts.
            rests = isinstance(rule, HierarchicalRule) and not p.numel()
            expected = 0.0 if rests else 3.0
            assert (step.dim(), step.dtype, step.item()) == (0, torch.float32, expected)
        if isinstance(rule, HierarchicalRule):
            assert entry.pop("tensor").shape == (rule.tensor_size + 1,)
            if p is params[0]:
                assert entry.pop("global") is optimizer.state["global/0"]["hidden"]
        assert not entry


@mirrors("deepcopy_copies_all_public_attrs")
@by_rule
def test_deepcopy_keeps_public_attributes_and_goes_on_alike(case: OptimizerCase) -> None:
    params = make_params()
    optimizer = LearnedOptimizer(params, case.rule(LR))
    optimizer.note = {"kept": 1}
    run_steps(optimizer, 2)
    twin = copy.deepcopy(optimizer)

    def public(each: LearnedOptimizer) -> set[str]:
        return {name for name in vars(each) if not name.startswith("_")}

    assert public(twin) == public(optimizer) == {"defaults", "state", "param_groups", "note"}
    assert twin.param_groups[0]["rule"] is not optimizer.param_groups[0]["rule"]
    assert twin.param_groups[0]["rule"] is twin.defaults["rule"]
    run_steps(optimizer, 2, seed=50)
    run_steps(twin, 2, seed=50)
    assert_same_bits(snapshot(optimizer), snapshot(twin))


def _small() -> LearnedOptimizer:
    optimizer = LearnedOptimizer([torch.nn.Parameter(torch.ones(3))], RANDOM[0].rule(LR))
    set_grads(optimizer.param_groups[0]["params"], 0)
    return optimizer


@mirrors("step_pre_hook", "step_post_hook", "step_all_hooks")
def test_step_hooks_run_around_the_step_and_can_be_removed() -> None:
    optimizer, seen = _small(), []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("global pre")),
        optimizer.register_step_pre_hook(lambda opt, *_: seen.append(("pre", len(opt.state)))),
        optimizer.register_step_post_hook(lambda opt, *_: seen.append(("post", len(opt.state)))),
        register_optimizer_step_post_hook(lambda *_: seen.append("global post")),
    ]
    optimizer.step()
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert seen == ["global pre", ("pre", 0), ("post", 1), "global post"]


@mirrors("state_dict_pre_hook", "state_dict_post_hook")
def test_state_dict_hooks_see_the_rules_as_plain_data() -> None:
    optimizer, order = _small(), []

    def replace(opt: LearnedOptimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        order.append(state_dict["param_groups"][0]["rule"]["family"])
        return {**state_dict, "extra": 1}

    optimizer.register_state_dict_pre_hook(lambda opt: order.append("second"))
    optimizer.register_state_dict_pre_hook(lambda opt: order.append("first"), prepend=True)
    optimizer.register_state_dict_post_hook(replace)
    assert optimizer.state_dict()["extra"] == 1
    assert order == ["first", "second", "lstm"]


@mirrors("load_state_dict_pre_hook", "load_state_dict_post_hook")
def test_load_hooks_may_adapt_a_checkpoint_before_it_is_checked() -> None:
    source, optimizer, order = _small(), _small(), []
    source.step()
    foreign = source.state_dict()
    foreign["state"] = {0: {"wrong name": foreign["state"][0]["planes"]}}

    def adapt(opt: LearnedOptimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        order.append("pre")
        return {**state_dict, "state": {0: {"planes": state_dict["state"][0]["wrong name"]}}}

    def after(opt: LearnedOptimizer) -> None:
        order.append("post")
        assert_same_bits(snapshot(opt)[2:], snapshot(source)[2:])  # the planes are there already

    handle = optimizer.register_load_state_dict_pre_hook(adapt)
    optimizer.register_load_state_dict_post_hook(after)
    optimizer.load_state_dict(foreign)
    assert order == ["pre", "post"]
    handle.remove()
    with pytest.raises(ValueError, match="wrong name"):
        optimizer.load_state_dict(foreign)


@mirrors("rosenbrock_sparse")
@pytest.mark.parametrize("dense_first", [True, False])
def test_sparse_gradients_are_refused_by_name(dense_first: bool) -> None:
    p = torch.nn.Parameter(torch.ones(3, 3))
    optimizer = LearnedOptimizer([("table", p)], RANDOM[0].rule(LR))
    if dense_first:
        set_grads([p], 0)
        optimizer.step()
    p.grad = None
    before = snapshot(optimizer)
    p.grad = torch.eye(3).to_sparse()
    with pytest.raises(RuntimeError, match=r"'table' \(group 0.*sparse gradient.*to_dense"):
        optimizer.step()
    p.grad = None
    assert_same_bits(before, snapshot(optimizer))


@mirrors("complex", "complex_2d")
@by_backend
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@by_random
def test_complex_parameters_step_as_pairs_of_real_ones(
    case: OptimizerCase, dtype: torch.dtype, backend: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(), (5,), (3, 4)]
    params = [torch.nn.Parameter(torch.randn(s, dtype=dtype, generator=generator)) for s in shapes]
    params.append(torch.nn.Parameter(params[-1].detach().T.clone().T))  # strided, dense
    twins = [torch.nn.Parameter(torch.view_as_real(p.detach()).clone()) for p in params]
    rule = case.rule(LR)
    optimizers = LearnedOptimizer(params, rule), LearnedOptimizer(twins, rule)
    for _ in range(4):
        for p, twin in zip(params, twins, strict=True):
            p.grad = torch.randn(p.shape, dtype=dtype, generator=generator)
            twin.grad = torch.view_as_real(p.grad).clone()
        p.grad = p.grad.conj()  # lazily conjugated
        twin.grad = torch.view_as_real(p.grad.resolve_conj()).clone()
        for optimizer in optimizers:
            optimizer.step()
    assert_same_bits([torch.view_as_real(p.detach()) for p in params], twins)
    assert_same_bits(
        [optimizers[0].state[p]["planes"] for p in params],
        [optimizers[1].state[p]["planes"] for p in twins],
    )


@mirrors("optimizer_can_be_printed")
def test_printing_shows_groups_and_rules_on_a_line_each() -> None:
    params = make_params()
    groups = [{"params": params[:2]}, {"params": params[2:], "rule": RNNPropRule(3), "lr": 0.5}]
    text = repr(LearnedOptimizer(groups, LSTMRule(2)))
    assert text.startswith("LearnedOptimizer (\nParameter Group 0\n")
    assert "rule: LSTMRule(hidden_size=2, " in text
    assert "rule: RNNPropRule(hidden_size=3, " in text
    assert "lr: 0.5\n" in text


@by_random
def test_a_skipped_first_step_leaves_the_state_of_no_step_taken(case: OptimizerCase) -> None:
    """As torch's fused optimizers do where a GradScaler skips: the state is there, untouched."""
    rule = case.rule(LR)
    params = [p for p in make_params() if p.numel()]  # an empty gradient cannot hold a NaN
    optimizer = LearnedOptimizer(params, rule, nonfinite="skip")
    fresh = LearnedOptimizer(clone_params(params), rule, nonfinite="skip")
    set_grads(params, 0)
    for p in params:
        p.grad.fill_(torch.nan)
    before = clone_params(params)
    optimizer.step()
    assert all(map(torch.equal, params, before))
    for each in (optimizer, fresh):
        run_steps(each, 2, seed=50)
    assert_same_bits(snapshot(optimizer), snapshot(fresh))


def test_what_torch_tolerates_in_a_group_is_tolerated() -> None:
    """Integer tensors without a gradient, and options that mean nothing to the optimizer."""
    counts, weight = torch.ones(3, dtype=torch.int64), torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    optimizer = LearnedOptimizer(
        [{"params": [counts, weight], "note": "first layer"}], LSTMRule.as_sgd(LR)
    )
    optimizer.step()
    assert counts.tolist() == [1, 1, 1]
    assert bool((weight < 1).all())
    assert optimizer.state_dict()["param_groups"][0]["note"] == "first layer"
