"""Validation of a rule on fixed runs, for selection while it is being meta-trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._checks import check_choice, check_number, check_seed
from .unroll import run_window, start

if TYPE_CHECKING:
    from ..rules import Rule
    from .tasks import Task

__all__ = ["Validation", "run_losses"]

# Inner steps whose gradients are held at a time while a rule is only applied.
_CHUNK = 20
# Seeds of validation runs lie far from a training seed's neighbourhood: seeds 0, 1, 2, ... never
# share runs.
_SEED_OFFSET = 2**40


def run_losses(
    rule: Rule,
    task: Task,
    *,
    runs: int = 8,
    horizon: int = 100,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Train ``runs`` fresh optimizees for ``horizon`` steps under ``rule``.

    Returns the losses f_0 .. f_horizon, ``(horizon + 1, runs)``.

    The same ``seed`` gives the same data, initial parameters and minibatches whatever the rule.
    Runs that diverge show as non-finite losses.

    Example:
        >>> import fastl2o
        >>> from fastl2o import meta
        >>> rule = fastl2o.LSTMRule(hidden_size=4, num_layers=1)
        >>> meta.run_losses(rule, meta.tasks.Quadratic(dim=3), runs=2, horizon=5).shape
        torch.Size([6, 2])
    """
    progress = start(rule, task.sample(runs, torch.Generator().manual_seed(seed), dtype))
    pieces = [progress.losses.unsqueeze(0)]
    while progress.step < horizon:
        window = run_window(rule, progress, min(_CHUNK, horizon - progress.step))
        pieces.append(window.losses[1:])
    return torch.cat(pieces)


@dataclass(frozen=True)
class Validation:
    """How often and on what a trainer validates its rule; the best rule so far is kept.

    The score, lower is better, is the mean over tasks and runs of

    - ``"sum"``: f_0 + ... + f_{horizon-1}, as the reproductions report;
    - ``"final"``: the mean of the losses of the last tenth of the run, which is f_horizon without
      the noise of one minibatch;
    - ``"log"``: the mean over t of log(f_t / f_0).

    A rule that diverges on any run scores infinity.

    Args:
        every: outer steps between validations.
        runs: runs of each task.
        horizon: inner steps of a run; the trainer's longest horizon by default.
        metric: which score.
        tasks: what to validate on; each training task's ``held_out()`` by default.
        seed: of the fixed runs; apart from any training seed.

    Example:
        >>> Validation(every=50, runs=16, metric="sum").metric
        'sum'
    """

    every: int = 100
    runs: int = 8
    horizon: int | None = None
    metric: str = "sum"
    tasks: Sequence[Task] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("every", self.every, minimum=1, integer=True)
        check_number("runs", self.runs, minimum=1, integer=True)
        check_choice("metric", self.metric, ("sum", "final", "log"))
        check_seed(self.seed)
        if self.horizon is not None:
            check_number("horizon", self.horizon, minimum=1, integer=True)

    def config(self) -> dict[str, Any]:
        """Constructor arguments, JSON-able."""
        names = ("every", "runs", "horizon", "metric", "seed")
        tasks = None if self.tasks is None else [repr(task) for task in self.tasks]
        return {**{name: getattr(self, name) for name in names}, "tasks": tasks}

    def score(self, rule: Rule, tasks: Sequence[Task], horizon: int, dtype: torch.dtype) -> float:
        """Score ``rule`` on ``tasks`` at ``horizon``, unless the validation names its own."""
        horizon = horizon if self.horizon is None else self.horizon
        chosen = list(self.tasks) if self.tasks is not None else [task.held_out() for task in tasks]
        total = 0.0
        for index, task in enumerate(chosen):
            seed = (_SEED_OFFSET + 1000 * self.seed + index) % 2**63
            losses = run_losses(rule, task, runs=self.runs, horizon=horizon, seed=seed, dtype=dtype)
            total += self._metric(losses.double())
        score = total / len(chosen)
        return score if math.isfinite(score) else math.inf

    def _metric(self, losses: Tensor) -> float:
        if self.metric == "sum":
            value = losses[:-1].sum(dim=0)
        elif self.metric == "final":
            value = losses[-max(1, (len(losses) - 1) // 10) :].mean(dim=0)
        else:
            value = torch.log((losses[1:] + 1e-12) / (losses[0] + 1e-12)).mean(dim=0)
        return float(value.mean())
