"""Batches of runs in flight while a rule is meta-trained: started, carried over windows, saved and restored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .imitation import Imitation
from .schedules import Horizon, draw_horizon
from .unroll import Progress, start

if TYPE_CHECKING:
    from ..rules import Rule
    from .estimators import MetaGradient, TruncatedBPTT
    from .tasks import Task

__all__ = ["Group", "GroupStarter"]


@dataclass
class Group:
    """R runs of one task that advance together until their horizon.

    Attributes:
        task: index into the trainer's tasks.
        horizon: inner steps after which new runs are drawn.
        progress: where the runs stand.
        moments: Adam's moments ``(2, R, D)`` where the runs imitate Adam, else None.
    """

    task: int
    horizon: int
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
        steps = min(estimator.unroll, self.horizon - self.progress.step)
        if self.moments is not None and imitation is not None:
            return imitation.window(rule, self.progress, self.moments, steps)
        return estimator.window(rule, self.progress, steps)

    def state_dict(self) -> dict[str, Any]:
        """All of it, for a checkpoint."""
        return {
            "task": self.task,
            "horizon": self.horizon,
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
    imitation: Imitation | None
    dtype: torch.dtype

    def start(self, rule: Rule, outer_step: int, generator: torch.Generator) -> Group:
        """A fresh batch of runs at its first evaluation."""
        task = 0
        if len(self.tasks) > 1:
            task = int(torch.multinomial(self.weights, 1, generator=generator))
        horizon = draw_horizon(self.horizon, outer_step, generator)
        run = self.tasks[task].sample(self.runs, generator, self.dtype)
        progress = start(rule, run)
        moments = None
        if (
            self.imitation is not None
            and float(torch.rand((), generator=generator)) < self.imitation.probability
        ):
            moments = self.imitation.moments(progress)
        return Group(task, horizon, progress, moments)

    def restore(self, saved: dict[str, Any]) -> Group:
        """A batch of runs as it was saved by ``Group.state_dict``."""
        # The draw below is thrown away: the run's tensors and generator are replaced by the saved ones.
        run = self.tasks[saved["task"]].sample(
            self.runs, torch.Generator().manual_seed(0), self.dtype
        )
        moments = None if saved["moments"] is None else saved["moments"].clone()
        progress = Progress.from_state_dict(run, saved["progress"])
        return Group(saved["task"], saved["horizon"], progress, moments)
