"""Checkpoints of a meta-training: exact resume, kills, full disks, damaged and foreign files."""

from __future__ import annotations

import csv
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from fastl2o import meta
from fastl2o.meta.checkpoint import (
    CHECKPOINT,
    PREVIOUS,
    CheckpointError,
    CheckpointWriter,
    has_checkpoint,
    load_checkpoint,
)
from tests import meta_child
from tests.test_meta_trainer import ROOT, assert_same_bits, small_rule, small_trainer


@pytest.fixture(scope="module")
def uninterrupted() -> meta.MetaTrainer:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    trainer = meta_child.make_trainer(None)
    result = trainer.fit(meta_child.OUTER_STEPS)
    torch.set_num_threads(threads)
    assert result.best_step is not None
    return trainer


def test_fit_in_parts_is_fit_at_once(uninterrupted: meta.MetaTrainer) -> None:
    trainer = meta_child.make_trainer(None)
    for outer_steps in (1, 2, 17, meta_child.OUTER_STEPS):
        trainer.fit(outer_steps)
    assert_same_bits(trainer, uninterrupted)


@pytest.mark.parametrize("stop", [1, 2, 8, 13, 29])
def test_resumed_training_has_the_same_bits(
    stop: int, tmp_path: Path, uninterrupted: meta.MetaTrainer
) -> None:
    meta_child.make_trainer(tmp_path).fit(stop)
    trainer = meta_child.make_trainer(tmp_path)
    trainer.fit(meta_child.OUTER_STEPS)
    assert_same_bits(trainer, uninterrupted)


@pytest.mark.parametrize("mode", meta_child.MODES)
def test_killed_training_continues_to_the_same_bits(
    mode: str, tmp_path: Path, uninterrupted: meta.MetaTrainer
) -> None:
    command = [sys.executable, "-m", "tests.meta_child", str(tmp_path), mode]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert child.returncode == -signal.SIGKILL, child.stderr
    names = {path.name for path in tmp_path.iterdir()}
    assert (CHECKPOINT in names) == (mode != "renaming")
    assert any(name.endswith(".tmp") for name in names) == (mode != "between-checkpoints")
    trainer = meta_child.make_trainer(tmp_path)
    trainer.fit(trainer.outer_step)
    assert trainer.outer_step == meta_child.KILL_AT
    trainer.fit(meta_child.OUTER_STEPS)
    assert_same_bits(trainer, uninterrupted)
    with open(tmp_path / "log.csv", newline="") as file:
        steps = [int(row["outer_step"]) for row in csv.DictReader(file)]
    assert steps == list(range(1, meta_child.OUTER_STEPS + 1))
    assert {path.name for path in tmp_path.iterdir()} == {CHECKPOINT, PREVIOUS, "log.csv"}


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Make the system refuse to write files beyond ``size`` bytes, as a full disk would."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_full_disk_leaves_the_earlier_checkpoint(
    tmp_path: Path, uninterrupted: meta.MetaTrainer
) -> None:
    trainer = meta_child.make_trainer(tmp_path)
    trainer.fit(10)
    saved = (tmp_path / CHECKPOINT).read_bytes()
    with largest_file(len(saved) // 2), pytest.raises(meta.CheckpointError) as caught:
        trainer.fit(meta_child.OUTER_STEPS)
    assert "could not write the checkpoint" in str(caught.value)
    assert "is whole" in str(caught.value)
    assert (tmp_path / CHECKPOINT).read_bytes() == saved
    assert not list(tmp_path.glob("*.tmp"))
    # Both the trainer that failed and a new one go on to the same end.
    trainer.fit(meta_child.OUTER_STEPS)
    assert_same_bits(trainer, uninterrupted)


def test_damaged_checkpoints(tmp_path: Path, uninterrupted: meta.MetaTrainer) -> None:
    meta_child.make_trainer(tmp_path).fit(10)
    current, previous = tmp_path / CHECKPOINT, tmp_path / PREVIOUS
    current.write_bytes(current.read_bytes()[:1000])
    trainer = meta_child.make_trainer(tmp_path)
    with pytest.warns(RuntimeWarning, match="newest checkpoint is damaged"):
        trainer.fit(0)
    assert trainer.outer_step == 8
    assert not current.exists()
    assert previous.exists()
    trainer.fit(meta_child.OUTER_STEPS)
    assert_same_bits(trainer, uninterrupted)
    for path in (current, previous):
        path.write_bytes(b"not a checkpoint")
    with pytest.raises(meta.CheckpointError, match="can be read"):
        meta_child.make_trainer(tmp_path).fit(12)
    torch.save({"version": 99}, current)
    with pytest.raises(meta.CheckpointError, match="of version 99"):
        load_checkpoint(tmp_path)
    assert load_checkpoint(tmp_path / "nowhere") is None


def test_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    small_trainer(checkpoint_dir=tmp_path).fit(2)
    before = (tmp_path / CHECKPOINT).read_bytes()
    other = small_trainer(checkpoint_dir=tmp_path, runs=5, seed=1)
    start = other.rule.flat_parameters().detach()
    with pytest.raises(ValueError, match="seed: here 1, saved 0; runs: here 5, saved 4"):
        other.fit(4)
    assert torch.equal(start, other.rule.flat_parameters())
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    rule = small_rule()
    optimizer = torch.optim.Adam(rule.parameters(), lr=2e-3, betas=(0.8, 0.99))
    with pytest.raises(ValueError, match="optimizer: here"):
        small_trainer(rule=rule, optimizer=optimizer, checkpoint_dir=tmp_path).fit(4)


def test_foreign_checkpoint_is_named(tmp_path: Path) -> None:
    torch.save({"version": 3, "fingerprint": "{"}, tmp_path / CHECKPOINT)
    with pytest.raises(meta.CheckpointError, match="not one of a MetaTrainer"):
        small_trainer(checkpoint_dir=tmp_path).fit(1)


@pytest.mark.parametrize("state", [None, {}, {"rule": {}}])
def test_other_things_are_no_training_state(state: Any) -> None:
    with pytest.raises(TypeError, match="not of a MetaTrainer: give what its state_dict"):
        small_trainer().load_state_dict(state)


def test_nobody_is_told_to_unpickle_a_damaged_checkpoint(tmp_path: Path) -> None:
    (tmp_path / CHECKPOINT).write_text("no checkpoint")
    torch.save({"version": 3, "half": Fraction(1, 2)}, tmp_path / PREVIOUS)
    with pytest.raises(CheckpointError, match="can be read") as caught:
        load_checkpoint(tmp_path)
    assert str(caught.value).count("it is damaged, or holds what no checkpoint does") == 2
    assert "weights_only" not in str(caught.value)


def test_a_file_is_no_checkpoint_dir(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(CheckpointError, match=r"checkpoint_dir .* is no folder"):
        small_trainer(checkpoint_dir=tmp_path / "file").fit(1)


def test_resume_loads_ahead_of_fit(tmp_path: Path) -> None:
    small_trainer(checkpoint_dir=tmp_path).fit(2)
    trainer = small_trainer(checkpoint_dir=tmp_path)
    trainer.resume()
    assert trainer.outer_step == 2
    assert trainer.fit(3).outer_steps == 3


def test_training_does_not_wait_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, fsync = threading.Event(), os.fsync

    def slow(descriptor: int) -> None:
        assert written.wait(timeout=60)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    content = {"numbers": torch.zeros(3)}
    with CheckpointWriter(tmp_path) as writer:
        writer.save(content)
        content["numbers"].fill_(1)  # what is saved is what was there
        assert not has_checkpoint(tmp_path)
        written.set()
        writer.wait()
        assert numbers(load_checkpoint(tmp_path)) == [0, 0, 0]
        writer.save(content)
    assert numbers(load_checkpoint(tmp_path)) == [1, 1, 1]


def numbers(saved: dict[str, Any] | None) -> list[float]:
    assert saved is not None
    return saved["numbers"].tolist()
