"""Data-parallel meta-training: two processes take the steps of one."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastl2o
from fastl2o import meta
from fastl2o.meta.recipe import build_trainer
from fastl2o.meta.tasks import Quadratic
from tests.distributed_child import ESTIMATORS, train

ROOT = Path(__file__).parents[1]


def torchrun(*command: str) -> None:
    """Run a module in two processes."""
    run = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *run, *command],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have trained."""
    folder = tmp_path_factory.mktemp("shared")
    torchrun("tests.distributed_child", str(folder))
    return folder


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "log.csv", newline="") as file:
        table = list(csv.DictReader(file))
    for row in table:
        del row["seconds"]
    return table


@pytest.mark.parametrize("name", ESTIMATORS)
def test_two_processes_train_as_one_does(name: str, shared: Path, tmp_path: Path) -> None:
    alone = train(tmp_path, 20, ESTIMATORS[name])
    together = fastl2o.load(shared / name / "rule.safetensors")
    assert torch.equal(together.flat_parameters(), alone.best_rule.flat_parameters())
    assert rows(shared / name) == rows(tmp_path)
    assert alone.inner_steps > 0
    assert all(float(row["snr"]) > 0 for row in rows(tmp_path))


def test_one_process_goes_on_from_a_checkpoint_of_two(shared: Path, tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", 25, ESTIMATORS["bptt"])
    folder = tmp_path / "moved"
    folder.mkdir()
    for file in (shared / "bptt").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    moved = train(folder, 25, ESTIMATORS["bptt"])
    assert torch.equal(moved.rule.flat_parameters(), whole.rule.flat_parameters())


RECIPE = """
name = "shared"
outer_steps = 6
[rule]
family = "lstm"
hidden_size = 4
[[tasks]]
kind = "quadratic"
dim = 3
[estimator]
kind = "pes"
unroll = 5
sigma = 0.1
[trainer]
horizon = 10
runs = 4
accumulate = 2
log_snr = true
[validation]
every = 3
runs = 2
"""


def test_train_command_shares_a_recipe_among_processes(tmp_path: Path) -> None:
    recipe = tmp_path / "shared.toml"
    recipe.write_text(RECIPE)
    torchrun("fastl2o", "train", str(recipe), "--out", str(tmp_path / "two"))
    alone = build_trainer(recipe, progress=False)
    alone.fit(6)
    together = fastl2o.load(tmp_path / "two" / "shared.safetensors")
    assert torch.equal(together.flat_parameters(), alone.best_rule.flat_parameters())
    assert together.card["trained"]["outer_steps"] == 6


def test_accumulated_windows_are_averaged() -> None:
    def gradient(accumulate: int, slots: list[int]) -> torch.Tensor:
        rule = fastl2o.LSTMRule(hidden_size=4, num_layers=1)
        rule.reset_parameters(torch.Generator().manual_seed(0))
        start = rule.flat_parameters().detach().clone()
        optimizer = torch.optim.SGD(rule.parameters(), lr=1.0)
        trainer = meta.MetaTrainer(
            rule, [Quadratic(dim=3)], optimizer=optimizer, accumulate=accumulate, groups=2,
            horizon=20, progress=False,
        )  # fmt: skip
        for step in slots:
            with torch.no_grad():
                for parameter, value in rule.unflatten(start).items():
                    rule.get_parameter(parameter).copy_(value)
            trainer.fit(step + 1)
        return start - rule.flat_parameters().detach()

    mean = (gradient(1, [0]) + gradient(1, [0, 1])) / 2
    torch.testing.assert_close(gradient(2, [0]), mean, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 0}, "accumulate must be"),
        ({"accumulate": 2, "groups": 3}, "multiple of accumulate=2"),
        ({"accumulate": 2, "imitation": meta.Imitation()}, "imitation needs accumulate=1"),
    ],
)
def test_impossible_shares_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        meta.MetaTrainer(fastl2o.LSTMRule(4, 1), [Quadratic()], **options)
