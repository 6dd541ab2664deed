"""Options that are given later than the optimizer is built, or in another kind of number."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch

from fastl2o import LearnedOptimizer, RNNPropRule
from tests.optimizers import clone_params, make_params, run_steps, two_groups, unchanged


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lr", float("nan"), "Invalid lr: nan"),
        ("lr", "a", "Invalid lr: a"),
        ("lr", torch.tensor([1.0, 2.0]), r"Invalid lr: tensor of shape \(2,\)"),
        ("lr", np.array([1.0, 2.0]), "Invalid lr: .1. 2.."),
        ("maximize", "x", "Invalid maximize: 'x'"),
        ("maximize", 1, "Invalid maximize: 1"),
        ("nonfinite", "foo", "Invalid nonfinite: 'foo'"),
        ("state_dtype", torch.float16, "Invalid state_dtype: torch.float16"),
        ("rule", 3, "Invalid rule: int"),
    ],
)
@pytest.mark.parametrize("steps", [0, 1])
def test_options_assigned_later_are_checked_before_anything_changes(
    name: str, value: Any, message: str, steps: int
) -> None:
    params, optimizer = two_groups()
    for _ in range(steps):
        optimizer.step()
    before, states = clone_params(params), len(optimizer.state)
    optimizer.param_groups[1][name] = value
    with pytest.raises((ValueError, TypeError), match=message):
        optimizer.step()
    assert all(map(torch.equal, params, before))
    assert len(optimizer.state) == states


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_state_dtype_assigned_later_is_that_of_states_yet_to_be_made(dtype: torch.dtype) -> None:
    params, optimizer = two_groups()
    optimizer.param_groups[1]["state_dtype"] = dtype
    optimizer.step()
    assert optimizer.state[params[1]]["planes"].dtype == dtype
    optimizer.param_groups[0]["state_dtype"] = dtype
    with (
        unchanged(optimizer),
        pytest.raises(ValueError, match=rf"{dtype} for group 0, .* made in torch.float32.*delete"),
    ):
        optimizer.step()
    del optimizer.state[params[0]]
    optimizer.step()
    assert optimizer.state[params[0]]["planes"].dtype == dtype


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int64])
def test_a_rate_of_numpy_is_saved_as_a_number(kind: Any) -> None:
    params = make_params()[:3]
    groups = [{"params": params[:1]}, {"params": params[1:2], "weight_decay": kind(1)}]
    optimizer = LearnedOptimizer(groups, RNNPropRule(3, 1), lr=kind(2))
    optimizer.add_param_group({"params": params[2:], "lr": kind(3)})
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)  # keeps the first rates there too
    optimizer.param_groups[0]["weight_decay"] = kind(4)
    run_steps(optimizer, 1)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)["param_groups"]
    assert [(group["lr"], group["weight_decay"]) for group in saved] == [(2, 4), (2, 1), (3, 0)]
