"""Meta-training ``lstm-mnist``: fastl2o's trainer against the same loop in eager autograd."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastl2o import meta
from fastl2o.meta.recipe import build_trainer, load_recipe
from fastl2o.meta.tasks import MLPClassification
from fastl2o.rules import LSTMRule

from .common import (
    ROOT,
    Contest,
    Figure,
    Suite,
    Target,
    available_gib,
    relative_errors,
    require,
    summary,
)
from .eager import EagerMetaTraining

# The stage of windows of 50: eager autograd keeps about 1,000 numbers a coordinate and step, so the
# last stage's 100 would not fit into small machines.
RECIPE = "lstm-mnist-middle"

OURS, EAGER = "fastl2o.meta", "eager autograd"
# What eager autograd keeps for a coordinate and step, with room to spare.
EAGER_NUMBERS = 1_200
# Steps of the gate's window: each path follows a trajectory of its own, and roundoff drives them
# apart; a few steps tell a wrong baseline from that.
GATE_STEPS = 5


def find_data() -> str | Path:
    """MNIST by ``$FASTL2O_DATA`` or beside the repository, else ``"digits"``."""
    if os.environ.get("FASTL2O_DATA"):
        return "mnist"
    beside = ROOT.parent / "shared" / "data" / "mnist.npz"
    return beside if beside.is_file() else "digits"


def _trainer(data: str | Path) -> meta.MetaTrainer:
    """The recipe's trainer, without validation; on the digits where there is no MNIST."""
    recipe = replace(load_recipe(RECIPE), validation=None)
    if data == "digits":
        recipe = replace(recipe, tasks=[{**recipe.tasks[0], "data": "digits"}])
    return build_trainer(recipe, None if data in ("digits", "mnist") else data, progress=False)


def _eager(trainer: meta.MetaTrainer) -> EagerMetaTraining:
    """The baseline with the same task, rule and settings."""
    (task,), rule = trainer.tasks, trainer.rule
    assert isinstance(task, MLPClassification)
    assert isinstance(rule, LSTMRule)
    settings = load_recipe(RECIPE)
    return EagerMetaTraining(
        rule,
        task,
        runs=settings.trainer["runs"],
        horizon=settings.trainer["horizon"],
        clip=settings.trainer["clip_grad"],
        unroll=trainer.estimator.unroll,
        objective=trainer.estimator.objective,
        lr=settings.optimizer["lr"],
    )


def gate(data: str | Path) -> Figure:
    """Both loops from the same rule, runs and minibatches: the first window's meta-gradients agree.

    Raises:
        AssertionError: if they do not.
    """
    trainer = _trainer(data)
    baseline = _eager(trainer)
    gradient = baseline.net.flat_gradient(baseline.window(GATE_STEPS))
    task, runs = trainer.tasks[0], baseline.runs
    progress = meta.start(trainer.rule, task.sample(runs, torch.Generator().manual_seed(0)))
    result = trainer.estimator.window(trainer.rule, progress, GATE_STEPS)
    error, _ = relative_errors(result.gradient, gradient)
    require(error <= 1e-3, f"fused and eager meta-gradients differ by {error:.2g}, relative")
    return Figure(
        f"lstm-mnist, {GATE_STEPS} steps: fused against eager meta-gradient, 2-norm", error, ""
    )


def training(seconds: float = 60.0) -> tuple[Suite, list[Figure], list[str]]:
    """Inner steps a second of both loops, after the gate; its figure, and notes."""
    data, notes = find_data(), []
    name = "digits" if data == "digits" else "mnist"
    if name == "digits":
        notes.append("lstm-mnist ran on scikit-learn's digits: set $FASTL2O_DATA for MNIST")
    trainer = _trainer(data)
    unroll, runs = trainer.estimator.unroll, load_recipe(RECIPE).trainer["runs"]
    task = trainer.tasks[0]
    assert isinstance(task, MLPClassification)
    needed = 4 * EAGER_NUMBERS * unroll * runs * task.dim / 2**30
    enough = available_gib() >= needed
    contenders: dict[str, Any] = {OURS: lambda: trainer.fit(trainer.outer_step + 1)}
    gated: list[Figure] = []
    if enough:
        gated.append(gate(data))
        contenders[EAGER] = _eager(_trainer(data)).outer_step
    else:
        notes.append(f"no row for meta-training by {EAGER}, gate included: needs {needed:.1f} GiB")
    title = f"meta-training lstm-mnist on {name}, T={unroll}"

    def figures(contest: Contest) -> list[Figure]:
        rows = []
        for contender in contenders:
            times = contest.times[contender]
            label = f"{title}: {contender}, inner steps of {runs} runs"
            rows.append(summary(label, "a second", [unroll / t for t in times]))
        if enough:
            label = f"{title}: times faster than {EAGER}"
            rows.append(contest.ratio(EAGER, OURS, label, Target(5)))
        return rows

    suite = Suite(title, OURS, Contest(contenders, seconds, min_rounds=5, max_rounds=10), figures)
    return suite, gated, notes
