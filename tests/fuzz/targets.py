"""What is fuzzed: a way to make damaged input, and what must come of it.

Every target either accepts its input, and what it made of it works, or refuses it with the
documented error and changes nothing.
"""

from __future__ import annotations

import contextlib
import json
import random
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fastl2o
from fastl2o import meta
from fastl2o._files import FORMAT
from fastl2o.meta.checkpoint import CHECKPOINT, CheckpointWriter, load_checkpoint
from fastl2o.rules import HierarchicalRule, LSTMRule, RNNPropRule, Rule

from . import mutations
from .layouts import step_layouts

Attempt = Callable[[random.Random, Path], bool]


def _rules() -> list[Rule]:
    rules = [LSTMRule(2, 1), RNNPropRule(2, 1), HierarchicalRule(2, 2, 2, 1)]
    for rule in rules:
        rule.reset_parameters(torch.Generator().manual_seed(0))
    return rules


def _rule_files() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rule.safetensors")
        files = []
        for rule in _rules():
            rule.save(path, {"task": "none", "numbers": [1, 2.5]})
            files.append(path.read_bytes())
    return files


_FILES = _rule_files()


def _load(data: bytes, folder: Path) -> bool:
    path = folder / "rule.safetensors"
    path.write_bytes(data)
    try:
        rule = fastl2o.load(path)
    except ValueError as error:
        if str(path) not in str(error):
            raise AssertionError(f"does not name the file: {error}") from error
        return False
    param = torch.zeros(3, requires_grad=True)
    param.grad = torch.ones(3)
    fastl2o.LearnedOptimizer([param], rule).step()
    return True


def rule_bytes(rng: random.Random, folder: Path) -> bool:
    """A rule file whose bytes were damaged."""
    data = rng.choice(_FILES)
    mutate = rng.choice((mutations.mutate_bytes, mutations.mutate_bytes, mutations.mutate_length))
    return _load(mutate(data, rng), folder)


def rule_header(rng: random.Random, folder: Path) -> bool:
    """A rule file whose header lies: of its tensors, or of the rule."""
    data = rng.choice(_FILES)
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    if rng.random() < 0.5:
        header = mutations.mutate_tree(header, rng, mutations.hostile_json)
    else:
        own = json.loads(header["__metadata__"][FORMAT])
        own = mutations.mutate_tree(own, rng, mutations.hostile_json)
        header["__metadata__"][FORMAT] = mutations.as_json(own, rng)
    text = mutations.as_json(header, rng).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return _load(len(text).to_bytes(8, "little") + text + data[end:], folder)


def _trainer(folder: Path, kind: int) -> meta.MetaTrainer:
    rule = _rules()[0]
    estimators = (meta.TruncatedBPTT(2), meta.PES(2))
    optimizer = torch.optim.Adam(rule.parameters(), lr=1e-3)
    return meta.MetaTrainer(
        rule,
        [meta.tasks.Quadratic(dim=2)],
        estimators[kind % 2],
        horizon=6,
        runs=2,
        seed=3,
        optimizer=optimizer,
        imitation=meta.Imitation(probability=1.0) if kind == 2 else None,
        average=0.9,
        checkpoint_dir=folder,
        progress=False,
    )


def _checkpoints() -> list[tuple[bytes, dict[str, Any]]]:
    made = []
    for kind in range(3):
        with tempfile.TemporaryDirectory() as folder:
            _trainer(Path(folder), kind).fit(2)
            content = load_checkpoint(Path(folder))
            assert content is not None
            made.append((Path(folder, CHECKPOINT).read_bytes(), content))
    return made


_CHECKPOINTS = _checkpoints()


def _resume(folder: Path, kind: int) -> bool:
    (folder / "log.csv").unlink(missing_ok=True)
    trainer = _trainer(folder, kind)
    before = trainer.rule.flat_parameters().detach().clone()
    try:
        with warnings.catch_warnings(action="ignore"):
            trainer.resume()
    except (meta.CheckpointError, ValueError):
        if trainer.outer_step or not torch.equal(before, trainer.rule.flat_parameters()):
            raise AssertionError("refused, but the trainer is not as it was") from None
        return False
    # numbers that no training can go on from are refused later
    with contextlib.suppress(meta.CheckpointError, RuntimeError, ValueError):
        trainer.fit(trainer.outer_step + 1)
    return True


def checkpoint_bytes(rng: random.Random, folder: Path) -> bool:
    """A checkpoint whose bytes were damaged."""
    kind = rng.randrange(3)
    (folder / CHECKPOINT).write_bytes(mutations.mutate_bytes(_CHECKPOINTS[kind][0], rng))
    return _resume(folder, kind)


def checkpoint_content(rng: random.Random, folder: Path) -> bool:
    """A checkpoint that holds something else than a training, in one place."""
    kind = rng.randrange(3)
    content = mutations.mutate_tree(_CHECKPOINTS[kind][1], rng, mutations.hostile_value)
    with CheckpointWriter(folder) as writer:
        writer.save(content)
    return _resume(folder, kind)


def _optimizer(kind: int) -> fastl2o.LearnedOptimizer:
    params = [torch.zeros(3, requires_grad=True), torch.zeros(2, 2, requires_grad=True)]
    for param in params:
        param.grad = torch.ones_like(param)
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.5}]
    return fastl2o.LearnedOptimizer(groups, _rules()[kind])


def optimizer_state(rng: random.Random, folder: Path) -> bool:
    """An optimizer's state_dict that is none any more, in one place."""
    kind = rng.randrange(3)
    source = _optimizer(kind)
    source.step()
    state = mutations.mutate_tree(source.state_dict(), rng, mutations.hostile_value)
    optimizer = _optimizer(kind)
    optimizer.step()
    before = optimizer.state_dict()
    try:
        optimizer.load_state_dict(state)
    except (ValueError, TypeError):
        _require_same(before, optimizer.state_dict())
        return False
    # torch does not look at every option when it loads them
    with contextlib.suppress(RuntimeError, ValueError):
        optimizer.step()
    return True


def _require_same(before: Any, after: Any) -> None:
    for left, right in zip(before["state"].values(), after["state"].values(), strict=True):
        if not all(torch.equal(left[key], right[key]) for key in left):
            raise AssertionError("refused, but the optimizer is not as it was")
    if before["param_groups"] != after["param_groups"]:
        raise AssertionError("refused, but the groups are not as they were")


# How often each is tried, in a hundred.
TARGETS: dict[str, tuple[Attempt, int]] = {
    "rule file, bytes": (rule_bytes, 25),
    "rule file, header": (rule_header, 25),
    "checkpoint, bytes": (checkpoint_bytes, 4),
    "checkpoint, content": (checkpoint_content, 6),
    "optimizer state": (optimizer_state, 29),
    "layouts": (step_layouts, 11),
}


def attempt(case: int, folder: Path) -> tuple[str, bool]:
    """Try one case, the same for the same number; its target, and whether it was accepted."""
    rng = random.Random(case)
    name = rng.choices(list(TARGETS), [share for _, share in TARGETS.values()])[0]
    return name, TARGETS[name][0](rng, folder)
