"""Batches of runs in flight during meta-training: started, carried over windows, restored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._checks import check_number, check_type
from .imitation import Imitation
from .schedules import Horizon, draw_horizon
from .tasks import Task
from .unroll import Progress, start

if TYPE_CHECKING:
    from ..rules import Rule
    from .estimators import MetaGradient, TruncatedBPTT

__all__ = ["Group", "GroupStarter", "check_optimizer", "check_tasks", "check_weights"]


@dataclass
class Group:
    """R runs of one task that advance together until their horizon.

    Attributes:
        task: index into the trainer's tasks.
        horizon: inner steps after which new runs are drawn.
        unroll: inner steps of a window.
        progress: where the runs stand.
        moments: Adam's moments ``(2, R, D)`` where the runs imitate Adam, else None.
    """

    task: int
    horizon: int
    unroll: int
    progress: Progress
    moments: Tensor | None = None

    @property
    def finished(self) -> bool:
        """Whether the horizon is reached."""
        return self.progress.step >= self.horizon

    def advance(
        self, rule: Rule, estimator: TruncatedBPTT, imitation: Imitation | None
    ) -> MetaGradient:
        """One window and its meta-gradient; the last window of a run may be shorter."""
        steps = min(self.unroll, self.horizon - self.progress.step)
        if self.moments is not None and imitation is not None:
            return imitation.window(rule, self.progress, self.moments, steps)
        return estimator.window(rule, self.progress, steps)

    def describe(self, result: MetaGradient) -> dict[str, float]:
        """What the training log says of a window of these runs."""
        return {
            "task": self.task,
            "inner_step": self.progress.step,
            "horizon": self.horizon,
            "imitation": int(self.moments is not None),
            "meta_loss": float(result.loss),
            "first_loss": float(result.losses[0].mean()),
            "last_loss": float(result.losses[-1].mean()),
        }

    def state_dict(self) -> dict[str, Any]:
        """All of it, for a checkpoint."""
        return {
            "task": self.task,
            "horizon": self.horizon,
            "unroll": self.unroll,
            "progress": self.progress.state_dict(),
            "moments": self.moments,
        }


@dataclass(frozen=True)
class GroupStarter:
    """Draws what the next batch of runs is, from the trainer's one generator."""

    tasks: Sequence[Task]
    weights: Tensor
    runs: int
    horizon: Horizon
    unroll: Horizon
    imitation: Imitation | None
    dtype: torch.dtype

    def start(self, rule: Rule, outer_step: int, generator: torch.Generator) -> Group:
        """A fresh batch of runs at its first evaluation."""
        task = 0
        if len(self.tasks) > 1:
            task = int(torch.multinomial(self.weights, 1, generator=generator))
        horizon = draw_horizon(self.horizon, outer_step, generator)
        unroll = draw_horizon(self.unroll, outer_step, generator)
        run = self.tasks[task].sample(self.runs, generator, self.dtype)
        progress = start(rule, run)
        moments = None
        if (
            self.imitation is not None
            and float(torch.rand((), generator=generator)) < self.imitation.probability
        ):
            moments = self.imitation.moments(progress)
        return Group(task, horizon, unroll, progress, moments)

    def restore(self, saved: dict[str, Any]) -> Group:
        """A batch of runs as it was saved by ``Group.state_dict``."""
        # The draw below is thrown away: the run's tensors and generator are replaced by the saved
        # ones.
        run = self.tasks[saved["task"]].sample(
            self.runs, torch.Generator().manual_seed(0), self.dtype
        )
        moments = None if saved["moments"] is None else saved["moments"].clone()
        progress = Progress.from_state_dict(run, saved["progress"])
        return Group(saved["task"], saved["horizon"], saved["unroll"], progress, moments)


def check_tasks(tasks: Sequence[Task]) -> tuple[Task, ...]:
    """The tasks as a tuple, or a refusal of anything else."""
    if isinstance(tasks, Task) or not tasks or not all(isinstance(task, Task) for task in tasks):
        raise TypeError(
            f"tasks must be a sequence of at least one fastl2o.meta.tasks.Task, got {tasks!r}"
        )
    return tuple(tasks)


def check_weights(weights: Sequence[float] | None, count: int) -> Tensor:
    """Relative frequencies ``(count,)``, equal by default."""
    if weights is None:
        return torch.ones(count)
    if not isinstance(weights, Sequence) or len(weights) != count:
        raise ValueError(
            f"task_weights must hold one number for each of {count} tasks, got {weights!r}"
        )
    for weight in weights:
        check_number("task_weights", weight, minimum=0, exclusive=True)
    return torch.tensor([float(weight) for weight in weights])


def check_optimizer(optimizer: torch.optim.Optimizer, rule: Rule) -> None:
    """Refuse an optimizer that cannot train the rule: other parameters, or impossible rates."""
    example = "torch.optim.Adam(rule.parameters(), lr=1e-3)"
    check_type("optimizer", optimizer, torch.optim.Optimizer, example)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if held != {id(p) for p in rule.parameters()}:
        raise ValueError(f"optimizer must hold exactly rule.parameters(); build it as {example}")
    if not any(parameter.requires_grad for parameter in rule.parameters()):
        raise ValueError("every parameter of rule has requires_grad=False; leave some trainable")
    for group in optimizer.param_groups:
        check_number("the optimizer's lr", float(group["lr"]), minimum=0)
