"""LearnedOptimizer with a hierarchical rule: what its parameters share, and where that is kept."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor

import fastl2o
from fastl2o import HierarchicalRule, LearnedOptimizer, LSTMRule
from fastl2o._rounding import step_seed
from fastl2o.rules.hierarchical import ProblemState
from tests.common import present_backends
from tests.optimizers import assert_same_bits, clone_params, make_params, on_backend, set_grads


@pytest.fixture(params=present_backends(), autouse=True)
def backend(request: pytest.FixtureRequest) -> Any:
    """Run each test on every backend that takes the rule."""
    with on_backend(request.param) as name:
        yield name


def small_rule(seed: int = 7) -> HierarchicalRule:
    rule = HierarchicalRule(4, 5, 6, 3)
    rule.reset_parameters(torch.Generator().manual_seed(seed))
    return rule


def parameters(*shapes: tuple[int, ...]) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def steps(optimizer: LearnedOptimizer, count: int, seed: int = 0) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(count):
        set_grads(params, seed + step)
        optimizer.step()


def test_groups_with_their_own_rates_are_one_problem() -> None:
    params, twins = parameters((3, 4), (5,)), parameters((3, 4), (5,))
    rule = small_rule()
    grouped = LearnedOptimizer(
        [{"params": params[:1], "lr": 0.5, "weight_decay": 0.1}, {"params": params[1:]}], rule
    )
    plain = LearnedOptimizer(twins, rule)
    steps(grouped, 1)
    steps(plain, 1)
    assert [key for key in grouped.state if isinstance(key, str)] == ["global/0"]
    for name in ("planes", "tensor"):
        own, other = (
            [opt.state[p][name] for p in each] for opt, each in ((grouped, params), (plain, twins))
        )
        assert_same_bits(own, other)
    assert torch.equal(params[1], twins[1])
    start = parameters((3, 4))[0]
    update = twins[0] - start
    torch.testing.assert_close(params[0], (1 - 0.5 * 0.1) * start + 0.5 * update)


def test_rules_and_devices_are_problems_of_their_own() -> None:
    params = parameters((3,), (4,), (5,))
    first, second = small_rule(1), small_rule(2)
    optimizer = LearnedOptimizer(
        [{"params": params[:1]}, {"params": params[1:2], "rule": second}, {"params": params[2:]}],
        first,
    )
    steps(optimizer, 2)
    shared = {key: entry for key, entry in optimizer.state.items() if isinstance(key, str)}
    assert set(shared) == {"global/0", "global/1"}
    assert not torch.equal(shared["global/0"]["hidden"], shared["global/1"]["hidden"])


@pytest.mark.parametrize("shapes", [[(0,), (2, 0)], [()], [(1,)]], ids=str)
def test_odd_models(shapes: list[tuple[int, ...]]) -> None:
    params = parameters(*shapes)
    before = clone_params(params)
    steps(LearnedOptimizer(params, small_rule()), 3)
    for p, old in zip(params, before, strict=True):
        assert bool(p.isfinite().all())
        assert p.numel() == 0 or not torch.equal(p, old)


def test_parameters_without_gradient_rest() -> None:
    params, alone = parameters((3, 4), (5,)), parameters((3, 4))
    rule = small_rule()
    optimizer, single = LearnedOptimizer(params, rule), LearnedOptimizer(alone, rule)
    set_grads(params, 0)
    params[1].grad = None
    alone[0].grad = params[0].grad.clone()
    optimizer.step()
    single.step()
    assert torch.equal(params[0], alone[0])
    assert params[1] not in optimizer.state
    shared = [opt.state["global/0"]["hidden"] for opt in (optimizer, single)]
    assert torch.equal(*shared)


def test_parameters_added_later_are_taken_up() -> None:
    params = parameters((3, 4), (5,))
    optimizer = LearnedOptimizer(params[:1], small_rule())
    steps(optimizer, 2)
    shared = optimizer.state["global/0"]["hidden"]
    optimizer.add_param_group({"params": params[1:], "lr": 0.1})
    steps(optimizer, 1)
    assert optimizer.state["global/0"]["hidden"] is shared
    assert [int(optimizer.state[p]["step"]) for p in params] == [3, 1]


def test_the_seed_decides_the_initial_rates() -> None:
    def planes(seed: int, *, others: int = 1) -> Tensor:
        params = parameters((30,), *[(3,)] * others)
        optimizer = LearnedOptimizer(params, small_rule(), seed=seed)
        steps(optimizer, 1)
        return optimizer.state[params[0]]["planes"][-1]

    assert torch.equal(planes(0), planes(0))
    assert float((planes(0) - planes(1)).abs().max()) > 1.0
    # What a parameter starts with does not depend on those that follow it.
    assert float((planes(0) - planes(0, others=3)).abs().max()) < 1.0


def test_a_checkpoint_goes_on_with_the_same_bits_and_shares_nothing() -> None:
    rule, params = small_rule(), make_params()
    optimizer = LearnedOptimizer(params, rule)
    steps(optimizer, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twins = clone_params(params)
    other = LearnedOptimizer(twins, rule)
    other.load_state_dict(torch.load(file, weights_only=True))
    copied = copy.deepcopy(optimizer)
    for each in (optimizer, other, copied):
        steps(each, 2, seed=50)
    assert_same_bits(params, twins)
    assert_same_bits(params, copied.param_groups[0]["params"])
    hidden = [each.state["global/0"]["hidden"] for each in (optimizer, other, copied)]
    assert len({tensor.data_ptr() for tensor in hidden}) == 3
    assert_same_bits(hidden[:2], [hidden[2]] * 2)


def test_a_checkpoint_from_before_parameters_held_the_shared_state_loads() -> None:
    rule, params = small_rule(), make_params()
    optimizer = LearnedOptimizer(params, rule)
    steps(optimizer, 3)
    older = copy.deepcopy(optimizer.state_dict())
    older["state"]["global/0"] = {"hidden": older["state"][0].pop("global")}
    older["param_groups"][0]["state_dtype"] = torch.float32
    twins = clone_params(params)
    other = LearnedOptimizer(twins, rule)
    other.load_state_dict(older)
    for each in (optimizer, other):
        steps(each, 2, seed=50)
    assert_same_bits(params, twins)
    assert sorted(other.state_dict()["state"]) == sorted(optimizer.state_dict()["state"])


def test_a_checkpoint_of_other_options_and_of_an_unused_group_is_loaded() -> None:
    rules = [small_rule(1), small_rule(2), small_rule(3)]

    def groups() -> list[dict[str, Any]]:
        params = parameters((3,), (4,), (5,), (2,))
        kinds = [{}, {"rule": rules[1]}, {"rule": rules[2]}, {}]
        return [{"params": [p], **kind} for p, kind in zip(params, kinds, strict=True)]

    optimizer = LearnedOptimizer(groups(), rules[0])
    optimizer.param_groups[3]["maximize"] = True  # a problem of its own, as the op takes one sign
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for _ in range(2):
        set_grads(params, 0)
        params[1].grad = None
        optimizer.step()
    shared = {key for key in optimizer.state if isinstance(key, str)}
    assert shared == {"global/0", "global/2", "global/3"}
    other = LearnedOptimizer(groups(), rules[0])
    other.load_state_dict(optimizer.state_dict())
    twins = [p for group in other.param_groups for p in group["params"]]
    with torch.no_grad():
        for p, twin in zip(params, twins, strict=True):
            twin.copy_(p)
    for each in (optimizer, other):
        steps(each, 2, seed=50)
    assert_same_bits(params, twins)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state[0].pop("global"), r"'global/0'.* is no 'hidden' tensor"),
        (lambda state: state[0].update({"global": torch.zeros(3)}), r"of shape \(6,\)"),
        (lambda state: state[0].pop("tensor"), r"parameter 0 .* has no 'tensor' of shape \(6,\)"),
        (lambda state: state[0].update(tensor=torch.zeros(2)), r"has no 'tensor' of shape \(6,\)"),
    ],
)
def test_checkpoints_that_do_not_fit_change_nothing(change: Any, message: str) -> None:
    params = parameters((3, 4), (5,))
    optimizer = LearnedOptimizer(params, small_rule())
    steps(optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    change(saved["state"])
    before = copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    after = optimizer.state_dict()["state"]
    for key, entry in before.items():
        assert_same_bits(list(entry.values()), list(after[key].values()))


def test_a_first_step_that_raises_leaves_no_state() -> None:
    params = parameters((3, 4), (5,))
    optimizer = LearnedOptimizer(params, small_rule())
    set_grads(params, 0)
    params[1].grad[2] = torch.nan
    with pytest.raises(RuntimeError, match="parameter 1 of group 0"):
        optimizer.step()
    assert not optimizer.state


def test_what_the_rule_does_not_have_is_refused() -> None:
    params = parameters((3, 4))
    with pytest.raises(RuntimeError, match=r"triton|cuda"), fastl2o.backend("cuda"):
        LearnedOptimizer(params, small_rule()).step()


def test_dtypes_mix_in_one_problem() -> None:
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    params = [
        torch.nn.Parameter(p.detach().to(dtype))
        for p, dtype in zip(parameters((9,), (8,), (7,), (3, 2)), dtypes, strict=True)
    ]
    twins = [torch.nn.Parameter(p.detach().float()) for p in params]
    rule = small_rule()
    mixed, plain = LearnedOptimizer(params, rule), LearnedOptimizer(twins, rule)
    set_grads(params, 0, torch.bfloat16)
    set_grads(twins, 0, torch.bfloat16)
    mixed.step()
    plain.step()
    assert torch.equal(mixed.state["global/0"]["hidden"], plain.state["global/0"]["hidden"])
    for p, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(p.float(), twin.to(p.dtype).float())


def test_another_family_refuses_the_checkpoint() -> None:
    params = parameters((3, 4))
    optimizer = LearnedOptimizer(params, small_rule())
    steps(optimizer, 1)
    with pytest.raises(ValueError, match="family hierarchical, this rule's is lstm"):
        LearnedOptimizer(params, LSTMRule(4)).load_state_dict(optimizer.state_dict())


def test_attention_takes_gradients_ahead_of_the_parameters() -> None:
    """Against the parameters and the points ahead kept apart, with an lr that changes."""
    rule = HierarchicalRule(4, 5, 6, 3, attention=True)
    rule.reset_parameters(torch.Generator().manual_seed(7))
    with torch.no_grad():
        rule.rate_bias.fill_(4.0)  # long steps
    params = parameters((3, 4), (5,))
    values, points = ([p.detach().double() for p in params] for _ in range(2))
    optimizer = LearnedOptimizer(params, rule, seed=3)
    twin = copy.deepcopy(rule).double()
    generators = [torch.Generator().manual_seed(step_seed(3, 0, i)) for i in (0, 1)]
    pairs = [rule.init_tensor(p, g) for p, g in zip(params, generators, strict=True)]
    state = ProblemState(
        [planes.double() for planes, _ in pairs],
        [tensor.double() for _, tensor in pairs],
        [0, 0],
        twin.init_global(torch.device("cpu"), torch.float64),
    )
    with on_backend("auto"):
        for lr in (1.0, 1.0, 0.5, 0.25):
            for group in optimizer.param_groups:
                group["lr"] = lr
            for p in params:
                p.grad = torch.sin(p.detach())  # depends on where it is taken
            optimizer.step()
            before = [planes[-1] for planes in state.planes]
            updates, state = twin.reference_step([torch.sin(p) for p in points], state)
            for i, (update, planes) in enumerate(zip(updates, state.planes, strict=True)):
                assert update is not None
                values[i] = values[i] + lr * (update - planes[-1] + before[i])
                points[i] = values[i] + lr * planes[-1]
            for found, expected in zip(params, points, strict=True):
                torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(values, points, strict=True))
    optimizer.eval()
    optimizer.eval()
    for found, expected in zip(params, values, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match=r"call optimizer.train\(\)"):
        optimizer.step()
    resumed = LearnedOptimizer(params, rule)
    resumed.load_state_dict(optimizer.state_dict())
    resumed.train()
    for found, expected in zip(params, points, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_attention_has_no_kernels(backend: str) -> None:
    params = parameters((3, 4))
    optimizer = LearnedOptimizer(params, HierarchicalRule(attention=True))
    set_grads(params, 0)
    if backend == "cpu":
        with pytest.raises(RuntimeError, match=r"'cpu' was forced.*attention=True"):
            optimizer.step()
        assert not optimizer.state
    else:
        optimizer.step()
