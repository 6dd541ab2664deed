"""Damaged files and states are refused as documented, or work; `make fuzz` tries more."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastl2o import LearnedOptimizer, RNNPropRule, meta
from fastl2o.meta.checkpoint import CHECKPOINT, CheckpointWriter, load_checkpoint
from tests.fuzz.targets import TARGETS, attempt
from tests.test_meta_trainer import small_trainer


@pytest.mark.parametrize("first", range(0, 400, 100))
def test_damaged_input_is_refused_or_works(first: int, tmp_path: Path) -> None:
    tried = {attempt(case, tmp_path)[0] for case in range(first, first + 100)}
    assert tried == set(TARGETS)


def test_a_flipped_bit_in_a_checkpoint_is_noticed(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path) as writer:
        writer.save({"numbers": torch.zeros(1000)})
    data = bytearray((tmp_path / CHECKPOINT).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / CHECKPOINT).write_bytes(data)
    with pytest.raises(meta.CheckpointError, match="it is damaged: its content has not the digest"):
        load_checkpoint(tmp_path)


DAMAGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a counter that is a method's name": lambda s: s["counters"].update(fit=7),
    "a counter of another type": lambda s: s["counters"].update(outer_step="x"),
    "no batches of runs": lambda s: s.update(groups=[]),
    "a rule of another shape": lambda s: s["outer"]["rule"].update({"readout.bias": torch.ones(5)}),
    "runs of another shape": lambda s: s["groups"][0]["group"]["progress"].update(
        params=torch.zeros(9)
    ),
    "an optimizer that cannot step": lambda s: s["outer"]["optimizers"][0]["state"][0].pop(
        "exp_avg"
    ),
}


def test_runs_of_another_estimator_are_refused() -> None:
    source = small_trainer(estimator=meta.PES(4))
    source.fit(1)
    state = copy.deepcopy(source.state_dict())
    state["groups"][0]["group"]["progress"]["perturbations"] = None
    with pytest.raises(ValueError, match="perturbations is of runs of another estimator"):
        small_trainer(estimator=meta.PES(4)).load_state_dict(state)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_training_state_is_refused_and_changes_nothing(damage: str) -> None:
    source = small_trainer()
    source.fit(2)
    state = copy.deepcopy(source.state_dict())
    DAMAGES[damage](state)
    trainer = small_trainer()
    before = trainer.rule.flat_parameters().detach().clone()
    with pytest.raises(ValueError, match="a damaged state of a MetaTrainer"):
        trainer.load_state_dict(state)
    assert torch.equal(before, trainer.rule.flat_parameters())
    assert trainer.outer_step == 0
    trainer.load_state_dict(source.state_dict())
    assert trainer.fit(3).outer_steps == 3


def _first(state: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = state["state"][0]
    return found


STATES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "planes without data": (
        lambda s: _first(s).update(planes=_first(s)["planes"].to("meta")),
        "parameter 0 of group 0.*'planes' as a torch.strided tensor on meta",
    ),
    "a step without data": (
        lambda s: _first(s).update(step=torch.zeros((), device="meta")),
        "parameter 0 of group 0.*'step' as a torch.strided tensor on meta",
    ),
    "sparse planes": (
        lambda s: _first(s).update(planes=_first(s)["planes"].to_sparse()),
        "parameter 0 of group 0.*'planes' as a torch.sparse_coo tensor",
    ),
    "params that are lists": (lambda s: s["param_groups"][0].update(params=[[0]]), r"\[0\] in"),
    "params that are none": (
        lambda s: s["param_groups"][0].update(params=0.5),
        "a list of 'params'",
    ),
    "a flag that is a tensor": (
        lambda s: s["param_groups"][0].update(maximize=torch.zeros(2)),
        "group 0.*Invalid maximize: tensor",
    ),
    "a flag that is text": (
        lambda s: s["param_groups"][0].update(foreach="x"),
        "Invalid foreach: 'x'",
    ),
    "a config that is a tensor": (
        lambda s: s["param_groups"][0]["rule"].update(config=torch.zeros(3)),
        "made by a rule of config",
    ),
}


@pytest.mark.parametrize("damage", STATES)
def test_a_damaged_optimizer_state_is_refused_and_changes_nothing(damage: str) -> None:
    param = torch.zeros(3, requires_grad=True)
    param.grad = torch.ones(3)
    optimizer = LearnedOptimizer([param], RNNPropRule(2, 1))
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    change, message = STATES[damage]
    change(state)
    before, values = optimizer.state[param]["planes"].clone(), param.detach().clone()
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert torch.equal(optimizer.state[param]["planes"], before)
    assert torch.equal(param.detach(), values)
