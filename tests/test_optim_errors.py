"""Bad input to LearnedOptimizer: a clear error that names what is wrong, and nothing changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastl2o
from fastl2o import LearnedOptimizer, LSTMRule, RNNProp, RNNPropRule
from tests.common import present_backends
from tests.optimizers import (
    DTYPES,
    clone_params,
    make_params,
    mirrors,
    on_backend,
    run_steps,
    set_grads,
    two_groups,
    unchanged,
)


def _param(*shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(shape))


def _twice() -> list[torch.nn.Parameter]:
    p = _param(2)
    return [p, p]


BAD_OPTIONS: tuple[tuple[dict[str, Any], type[Exception], str], ...] = (
    ({"lr": -1}, ValueError, "Invalid lr: -1"),
    ({"lr": float("nan")}, ValueError, "Invalid lr: nan"),
    ({"lr": float("inf")}, ValueError, "Invalid lr: inf"),
    ({"lr": True}, ValueError, "Invalid lr: True"),
    ({"lr": torch.tensor(True)}, ValueError, "Invalid lr: True"),
    ({"lr": torch.tensor(1j)}, ValueError, "Invalid lr: 1j"),
    ({"lr": "fast"}, ValueError, "Invalid lr: fast"),
    ({"lr": "1"}, ValueError, "Invalid lr: 1. Accepted: a finite number"),
    ({"lr": np.array("1")}, ValueError, "Invalid lr: 1. Accepted: a finite number"),
    ({"lr": np.True_}, ValueError, "Invalid lr: True"),
    ({"lr": None}, ValueError, "Invalid lr: None"),
    ({"lr": torch.tensor([0.1, 0.2])}, ValueError, "Tensor lr must be 1-element"),
    ({"lr": torch.tensor(-1.0)}, ValueError, "Invalid lr: -1"),
    ({"lr": torch.tensor(0.1), "foreach": True}, ValueError, "lr as a Tensor is not supported"),
    ({"weight_decay": -0.5}, ValueError, "Invalid weight_decay: -0.5"),
    ({"weight_decay": False}, ValueError, "Invalid weight_decay: False"),
    ({"weight_decay": float("nan")}, ValueError, "Invalid weight_decay: nan"),
    ({"nonfinite": "ignore"}, ValueError, "Invalid nonfinite: 'ignore'.*'skip'"),
    ({"state_dtype": torch.float16}, ValueError, "Invalid state_dtype: torch.float16.*bfloat16"),
    ({"state_dtype": "float32"}, ValueError, "Invalid state_dtype: float32"),
    ({"foreach": True, "fused": True}, RuntimeError, "`fused` and `foreach` cannot be `True`"),
    ({"fused": True, "differentiable": True}, RuntimeError, "`fused` does not support `diff"),
    ({"foreach": True, "differentiable": True}, RuntimeError, "`foreach` does not support"),
)


def _bad_id(row: Any) -> str:
    return "-".join(f"{k}={v}" for k, v in row.items()) if isinstance(row, dict) else "error"


@mirrors("errors")
@pytest.mark.parametrize("in_group", [False, True], ids=["argument", "group"])
@pytest.mark.parametrize(("options", "error", "message"), BAD_OPTIONS, ids=_bad_id)
def test_impossible_options(
    options: dict[str, Any], error: type[Exception], message: str, in_group: bool
) -> None:
    if not in_group:
        with pytest.raises(error, match=message):
            LearnedOptimizer([_param(2)], LSTMRule(2), **options)
        return
    optimizer = LearnedOptimizer([_param(2)], LSTMRule(2))
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": [_param(3)], **options})
    assert len(optimizer.param_groups) == 1


@mirrors("errors")
@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        (lambda: _param(2), TypeError, "iterable of Tensors or dicts"),
        (list, ValueError, "empty parameter list"),
        (lambda: [{"params": {_param(2)}}], TypeError, "ordered collections"),
        (lambda: [_param(2) * 2], ValueError, "non-leaf"),
        (lambda: [0.0], TypeError, "can only optimize Tensors"),
        (lambda: [("w", _param(2)), _param(2)], ValueError, "with/without names"),
        (_twice, ValueError, "holds a parameter more than once"),
        (lambda: [{"params": [p]} for p in _twice()], ValueError, "more than one parameter group"),
    ],
)
def test_impossible_parameters(
    params: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        LearnedOptimizer(params(), LSTMRule(2))


@pytest.mark.parametrize("in_group", [False, True], ids=["argument", "group"])
@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        (3, TypeError, r"Invalid rule: int.*fastl2o\.zoo\.names"),
        (None, TypeError, "Invalid rule: NoneType"),
        (torch.nn.LSTM(2, 2), TypeError, "Invalid rule: LSTM"),
        ("no-such-rule", Exception, "no-such-rule"),
    ],
)
def test_impossible_rules(rule: Any, error: type[Exception], message: str, in_group: bool) -> None:
    group = {"params": [_param(2)], "rule": rule} if in_group else {"params": [_param(2)]}
    with pytest.raises(error, match=message):
        LearnedOptimizer([group], LSTMRule(2) if in_group else rule)


def test_named_drop_ins_refuse_rules_of_another_family() -> None:
    with pytest.raises(ValueError, match=r"'lstm', RNNProp takes 'rnnprop'.*LearnedOptimizer"):
        RNNProp([_param(2)], rule=LSTMRule(2))


def _integer() -> Tensor:
    p = torch.ones(3, dtype=torch.int64)
    p.grad = torch.ones(3, dtype=torch.int64)
    return p


def _other_grad_dtype() -> Tensor:
    p = torch.ones(3, dtype=torch.bfloat16)
    p.grad_dtype = torch.float32
    p.grad = torch.ones(3)
    return p


def _other_shape() -> Tensor:
    p = _param(3)
    p.grad = torch.ones(3)
    p.data = torch.ones(2, 2)
    return p


def _expanded() -> Tensor:
    p = torch.ones(1).expand(3)
    p.grad = torch.ones(3)
    return p


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_integer, "has dtype torch.int64. Accepted:.*float32"),
        (_other_grad_dtype, "of torch.bfloat16.*gradient of torch.float32.*convert"),
        (_other_shape, r"shape \(2, 2\).*gradient of.*shape \(3,\)"),
        (_expanded, "share memory"),
    ],
)
def test_parameters_a_step_cannot_take(make: Callable[[], Tensor], message: str) -> None:
    good, bad = _param(2), make()
    set_grads([good], 0)
    optimizer = LearnedOptimizer([good, bad], LSTMRule(2))
    with (
        unchanged(optimizer),
        pytest.raises(RuntimeError, match=rf"parameter 1 of group 0.*{message}"),
    ):
        optimizer.step()


@pytest.mark.parametrize("backend", present_backends())
@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("position", [0, 3, 8])
def test_a_nonfinite_gradient_raises_before_anything_changes(
    position: int, poison: float, steps_before: int, backend: str
) -> None:
    """Also with a list op for each dtype: the poisoned one need not come first."""
    params = [(f"{d}-{i}", p) for d in DTYPES for i, p in enumerate(make_params(dtype=d))]
    optimizer = LearnedOptimizer(params, RNNPropRule(3, 1), foreach=None)
    with on_backend(backend):
        run_steps(optimizer, steps_before)
        for dtype_idx in range(4):
            set_grads([p for _, p in params], 9)
            name, p = params[9 * dtype_idx + position]
            p.grad.view(-1)[-1] = poison
            with (
                unchanged(optimizer),
                pytest.raises(RuntimeError, match=rf"gradient of parameter '{name}'.*NaN or Inf"),
            ):
                optimizer.step()


@pytest.mark.parametrize("backend", present_backends())
@pytest.mark.parametrize("policy", ["skip", "pass"])
def test_nonfinite_gradients_can_be_skipped_or_passed(policy: str, backend: str) -> None:
    params, twins = make_params(), make_params()
    rule = RNNPropRule(3, 1)
    optimizer = LearnedOptimizer(params, rule, nonfinite=policy)
    other = LearnedOptimizer(twins, rule)
    bad = 3
    with on_backend(backend):
        run_steps(optimizer, 1)
        run_steps(other, 1)
        for each in (params, twins):
            set_grads(each, 5)
        params[bad].grad[7], twins[bad].grad = torch.nan, None
        optimizer.step()
        other.step()
    for position, (p, twin) in enumerate(zip(params, twins, strict=True)):
        if position == bad and policy == "pass":
            assert p.isnan().nonzero().tolist() == [[7]]
            assert optimizer.state[p]["planes"].isnan().any(0).nonzero().tolist() == [[7]]
            continue
        assert torch.equal(p, twin)
        for key in ("planes", "step"):
            assert torch.equal(optimizer.state[p][key], other.state[twin][key])


def test_a_forced_backend_that_takes_only_some_buckets_changes_none() -> None:
    if "cpu" not in present_backends():
        pytest.skip("needs the CPU kernels")
    first, second = _param(50), _param(3)
    groups = [{"params": [first]}, {"params": [second], "state_dtype": torch.float64}]
    optimizer = LearnedOptimizer(groups, RNNPropRule(3, 1))
    run_steps(optimizer, 1)  # auto: the reference takes the second
    set_grads([first, second], 3)
    with (
        unchanged(optimizer),
        fastl2o.backend("cpu"),
        pytest.raises(RuntimeError, match="'cpu' was forced"),
    ):
        optimizer.step()


def _saved(rule: fastl2o.Rule, params: list[Tensor]) -> dict[str, Any]:
    optimizer = LearnedOptimizer(params, rule)
    run_steps(optimizer, 2)
    return copy.deepcopy(optimizer.state_dict())


OWN_RULE = RNNPropRule(3, 1)


def _edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[list[Tensor]], dict[str, Any]]:
    def make(params: list[Tensor]) -> dict[str, Any]:
        state_dict = _saved(OWN_RULE, params)
        change(state_dict)
        return state_dict

    return make


def _of(rule: fastl2o.Rule) -> Callable[[list[Tensor]], dict[str, Any]]:
    return lambda params: _saved(rule, params)


def _adams(params: list[Tensor]) -> dict[str, Any]:
    adam = torch.optim.Adam(params)
    set_grads(params, 0)
    adam.step()
    return adam.state_dict()


BAD_CHECKPOINTS: dict[str, tuple[Callable[[list[Tensor]], dict[str, Any]], str]] = {
    "family": (_of(LSTMRule(3, 1)), "parameter 0 of group 0.*family lstm.*rnnprop"),
    "config": (_of(RNNPropRule(4, 1)), "parameter 0 of group 0.*'hidden_size': 4"),
    "meta-parameters": (_of(RNNPropRule(3, 1)), "other meta-parameters.*delete 'rule'"),
    "adam": (_adams, "group 0 has the options .*'betas'.*of another optimizer"),
    "adam before its first step": (
        lambda params: torch.optim.Adam(params).state_dict(),
        "group 0 has the options .*'betas'.*of another optimizer",
    ),
    "adam's state": (
        _edit(lambda sd: sd["state"].update({4: {"exp_avg": torch.zeros(5, 3)}})),
        "parameter 4 of group 0.*'exp_avg'.*no 'planes'",
    ),
    "model": (lambda params: {"weight": params[0]}, "keys.*weight.*not 'state'"),
    "fewer parameters": (_edit(lambda sd: sd["param_groups"][0]["params"].pop()), "groups of"),
    "fewer groups": (_edit(lambda sd: sd["param_groups"].pop()), "groups of"),
    "shape": (
        _edit(lambda sd: sd["state"][4].update(planes=torch.zeros(8, 3, 5))),
        r"parameter 4 of group 0 .*\(8, 3, 5\), not \(8, 5, 3\)",
    ),
    "dtype": (
        _edit(lambda sd: sd["state"][4].update(planes=torch.zeros(8, 5, 3, dtype=torch.int32))),
        "parameter 4 of group 0.*torch.int32",
    ),
    "no planes": (_edit(lambda sd: sd["state"][4].pop("planes")), "parameter 4 of group 0.*planes"),
    "no step": (_edit(lambda sd: sd["state"][4].pop("step")), "parameter 4 of group 0.*no 'step'"),
    "step": (_edit(lambda sd: sd["state"][4].update(step=-1.0)), "parameter 4.*impossible 'step'"),
    "lr": (_edit(lambda sd: sd["param_groups"][0].update(lr=-1.0)), "group 0.*Invalid lr: -1"),
    "rule": (_edit(lambda sd: sd["param_groups"][0].update(rule=5)), "unreadable rule: 5"),
}


@pytest.mark.parametrize("name", BAD_CHECKPOINTS)
def test_checkpoints_that_do_not_fit_are_refused_and_change_nothing(name: str) -> None:
    make, message = BAD_CHECKPOINTS[name]
    params = make_params()
    optimizer = LearnedOptimizer(params, OWN_RULE)
    run_steps(optimizer, 1)
    state_dict = make(clone_params(params))
    groups = copy.copy(optimizer.param_groups[0])
    with unchanged(optimizer), pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups == [groups]


def test_a_checkpoint_of_other_meta_parameters_loads_once_its_rule_entry_is_deleted() -> None:
    params = make_params()
    state_dict = _saved(RNNPropRule(3, 1), clone_params(params))
    del state_dict["param_groups"][0]["rule"]
    optimizer = LearnedOptimizer(params, OWN_RULE)
    optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0]["rule"] is OWN_RULE
    assert torch.equal(optimizer.state[params[3]]["planes"], state_dict["state"][3]["planes"])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.ones(3, dtype=torch.float64), "parameter 0 of group 1.*must be alike"),
        (torch.ones(5), "parameter 0 of group 1.*must be alike"),
    ],
    ids=["dtype", "shape"],
)
def test_data_exchanged_between_steps_is_refused_before_anything_changes(
    data: Tensor, message: str
) -> None:
    params, optimizer = two_groups()
    optimizer.step()
    params[1].data = data
    before = clone_params(params)
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert all(map(torch.equal, params, before))


def test_a_refused_first_step_leaves_no_state() -> None:
    p = _param(3)
    optimizer = LearnedOptimizer([p], LSTMRule(hidden_size=2), state_dtype=torch.float64)
    p.grad = torch.ones_like(p)
    with fastl2o.backend("cpu"), pytest.raises(RuntimeError, match="float64"):
        optimizer.step()
    assert not optimizer.state


@pytest.mark.parametrize(
    ("state_dict", "error"),
    [
        (None, TypeError),
        ("x", TypeError),
        ({"state": [], "param_groups": []}, ValueError),
        ({"state": {}, "param_groups": None}, ValueError),
        ({"state": {}, "param_groups": [{}, {}]}, ValueError),
        ({"state": {0: 3}, "param_groups": [{"params": [0]}, {"params": [1]}]}, ValueError),
    ],
)
def test_malformed_checkpoints_are_refused(state_dict: Any, error: type[Exception]) -> None:
    _, optimizer = two_groups()
    with pytest.raises(error, match=r"state_dict|loaded state dict is malformed"):
        optimizer.load_state_dict(state_dict)
