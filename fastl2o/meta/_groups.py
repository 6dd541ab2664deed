"""Batches of runs in flight during meta-training: started, carried over windows, restored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ._checks import check_number, check_type
from .imitation import Imitation, Lesson
from .schedules import Horizon, draw_horizon, longest
from .tasks import Task
from .unroll import Progress

if TYPE_CHECKING:
    from ..rules import Rule
    from .distributed import Ranks
    from .estimators import Estimator, MetaGradient

__all__ = [
    "Group",
    "GroupStarter",
    "Groups",
    "Outcome",
    "check_groups",
    "check_optimizer",
    "check_tasks",
    "check_weights",
]

# What the training log says of a window, in the order in which processes tell each other.
_DESCRIBED = ("task", "inner_step", "horizon", "imitation", "meta_loss", "first_loss", "last_loss")
_MEANS = ("meta_loss", "first_loss", "last_loss")


@dataclass
class Group:
    """R runs of one task that advance together until their horizon.

    Attributes:
        task: index into the trainer's tasks.
        horizon: inner steps after which new runs are drawn.
        unroll: inner steps of a window.
        progress: where the runs stand.
        lesson: what runs that imitate Adam carry along, else None.
    """

    task: int
    horizon: int
    unroll: int
    progress: Progress
    lesson: Lesson | None = None

    @property
    def finished(self) -> bool:
        """Whether the horizon is reached."""
        return self.progress.step >= self.horizon

    def advance(
        self, rule: Rule, estimator: Estimator, imitation: Imitation | None
    ) -> MetaGradient:
        """One window and its meta-gradient; the last window of a run may be shorter."""
        steps = min(self.unroll, self.horizon - self.progress.step)
        if self.lesson is not None and imitation is not None:
            return imitation.window(rule, self.progress, self.lesson, steps)
        return estimator.window(rule, self.progress, steps)

    def describe(self, result: MetaGradient) -> dict[str, float]:
        """What the training log says of a window of these runs."""
        return {
            "task": self.task,
            "inner_step": self.progress.step,
            "horizon": self.horizon,
            "imitation": int(self.lesson is not None),
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
            "lesson": None if self.lesson is None else self.lesson.state_dict(),
        }


@dataclass(frozen=True)
class GroupStarter:
    """Draws what the next batch of runs is, from the trainer's one generator."""

    tasks: Sequence[Task]
    weights: Tensor
    runs: int
    estimator: Estimator
    horizon: Horizon
    unroll: Horizon | None
    imitation: Imitation | None
    dtype: torch.dtype

    def start(self, rule: Rule, outer_step: int, generator: torch.Generator) -> Group:
        """A fresh batch of runs at its first evaluation."""
        task = 0
        if len(self.tasks) > 1:
            task = int(torch.multinomial(self.weights, 1, generator=generator))
        horizon = draw_horizon(self.horizon, outer_step, generator)
        unroll = horizon
        if self.unroll is not None:
            unroll = draw_horizon(self.unroll, outer_step, generator)
        run = self.estimator.sample(self.tasks[task], self.runs, generator, self.dtype)
        progress = self.estimator.begin(rule, run)
        lesson = None
        if (
            self.imitation is not None
            and float(torch.rand((), generator=generator)) < self.imitation.probability
        ):
            lesson = self.imitation.begin(rule, progress, generator)
        return Group(task, horizon, unroll, progress, lesson)

    def restore(self, rule: Rule, saved: dict[str, Any]) -> Group:
        """A batch of runs as it was saved by ``Group.state_dict``.

        Raises:
            Exception: of any kind, where it was damaged.
        """
        check_number("task", saved["task"], minimum=0, integer=True, below=len(self.tasks))
        most = longest(self.horizon) + 1
        check_number("horizon", saved["horizon"], minimum=1, integer=True, below=most)
        check_number("unroll", saved["unroll"], minimum=1, integer=True, below=2**63)
        check_number("step", saved["progress"]["step"], minimum=0, integer=True, below=most)
        # The draw below is thrown away: the run's tensors and generator are replaced by the saved
        # ones.
        run = self.estimator.sample(
            self.tasks[saved["task"]], self.runs, torch.Generator().manual_seed(0), self.dtype
        )
        # A start of the saved runs shows what shapes go with them.
        run.load_state_dict(saved["progress"]["run"])
        like = self.estimator.begin(rule, run)
        lesson = None
        if saved["lesson"] is not None:
            lesson = Lesson.from_state_dict(saved["lesson"], like.params)
            lesson.begin(rule, like)
        progress = Progress.from_state_dict(run, saved["progress"], like)
        return Group(saved["task"], saved["horizon"], saved["unroll"], progress, lesson)


@dataclass(frozen=True)
class Outcome:
    """What the windows of one update came to, the same in all processes.

    Attributes:
        usable: whether any of the windows was.
        gradient: ``(M,)``, the mean over usable windows.
        described: what the training log says: of the first window, and means.
        inner_steps: of all their runs.
    """

    usable: bool
    gradient: Tensor
    described: dict[str, float]
    inner_steps: int

    @property
    def meta_loss(self) -> float:
        """The mean over usable windows."""
        return self.described["meta_loss"]

    @property
    def imitating(self) -> bool:
        """Whether the runs imitate Adam."""
        return bool(self.described["imitation"])


class Groups:
    """The batches of runs in flight, each in a slot of one of the processes.

    What starts in a slot is drawn from a generator of its own, whose seed is made from the
    training's, the slot and how often it was filled: so it does not depend on the processes.

    Args:
        starter: makes what fills an empty slot.
        count: number of slots; slot i belongs to process i % ranks.size.
        seed: the training's.
        divergence: a loss beyond this factor times the first is not usable; None: any is.
        ranks: the processes.
    """

    def __init__(
        self,
        starter: GroupStarter,
        count: int,
        seed: int,
        divergence: float | None,
        ranks: Ranks,
    ) -> None:
        self.count = count
        self._starter, self._seed, self._divergence, self._ranks = starter, seed, divergence, ranks
        self._groups: dict[int, Group | None] = {
            slot: None for slot in range(count) if slot % ranks.size == ranks.rank
        }
        self._starts = dict.fromkeys(self._groups, 0)

    def advance(
        self,
        rule: Rule,
        estimator: Estimator,
        imitation: Imitation | None,
        outer_step: int,
        windows: int,
    ) -> Outcome:
        """One window of each of the next ``windows`` slots; unusable batches are dropped."""
        rows = []
        for slot in self._own(outer_step, windows):
            group = self._groups[slot]
            if group is None or group.finished:
                group = self._starter.start(rule, outer_step, self._generator(slot))
            before = group.progress.step
            result = group.advance(rule, estimator, imitation)
            usable = self._usable(result, group)
            self._groups[slot] = group if usable else None
            described = group.describe(result)
            steps = (group.progress.step - before) * result.losses.shape[1]
            numbers = [float(usable), float(steps), *(described[name] for name in _DESCRIBED)]
            rows.append(torch.cat((torch.tensor(numbers).double(), result.gradient.double())))
        table = self._ranks.gather(torch.stack(rows))
        good = table[:, 0] > 0
        head = 2 + len(_DESCRIBED)
        described = dict(zip(_DESCRIBED, table[0, 2:head].tolist(), strict=True))
        chosen = table[good] if bool(good.any()) else table
        means = chosen.sum(dim=0) / len(chosen)
        described |= {n: float(means[2 + _DESCRIBED.index(n)]) for n in _MEANS}
        for name in ("task", "inner_step", "horizon", "imitation"):
            described[name] = int(described[name])
        gradient = means[head:].to(next(rule.parameters()).dtype)
        return Outcome(bool(good.any()), gradient, described, int(table[:, 1].sum()))

    def drop(self, outer_step: int, windows: int) -> None:
        """Empty the slots of an update that could not be used."""
        for slot in self._own(outer_step, windows):
            self._groups[slot] = None

    def _own(self, outer_step: int, windows: int) -> list[int]:
        """The slots of an update that are this process's."""
        first = outer_step * windows
        slots = [(first + i) % self.count for i in range(windows)]
        return [slot for slot in slots if slot in self._groups]

    def _generator(self, slot: int) -> torch.Generator:
        key = np.random.SeedSequence([self._seed, slot, self._starts[slot]])
        self._starts[slot] += 1
        return torch.Generator().manual_seed(int(key.generate_state(1, np.uint64)[0] >> 1))

    def _usable(self, result: MetaGradient, group: Group) -> bool:
        numbers = (result.loss, result.losses, result.gradient)
        if not all(bool(torch.isfinite(tensor).all()) for tensor in numbers):
            return False
        if self._divergence is None:
            return True
        # The added 1 keeps runs that happen to start at a tiny loss from counting as diverged.
        bound = self._divergence * (group.progress.first_losses + 1.0)
        return bool((result.losses[-1] <= bound).all())

    def state_dict(self) -> list[dict[str, Any]]:
        """Every slot's batch and number of starts; whole in the main process."""
        own = {
            slot: {
                "starts": self._starts[slot],
                "group": None if group is None else group.state_dict(),
            }
            for slot, group in self._groups.items()
        }
        collected = self._ranks.collect(own)
        return [collected[slot] for slot in sorted(collected)]

    def parsed(
        self, rule: Rule, state: list[dict[str, Any]]
    ) -> dict[int, tuple[Group | None, int]]:
        """This process's slots of what the main one saved: each one's batch and starts.

        Raises:
            Exception: of any kind, where it was damaged. Nothing is changed.
        """
        slots = {}
        for slot in self._groups:
            saved, starts = state[slot]["group"], state[slot]["starts"]
            check_number("starts", starts, minimum=0, integer=True, below=2**63)
            slots[slot] = (None if saved is None else self._starter.restore(rule, saved), starts)
        return slots

    def take(self, slots: dict[int, tuple[Group | None, int]]) -> None:
        """Go on from what was ``parsed``."""
        for slot, (group, starts) in slots.items():
            self._groups[slot], self._starts[slot] = group, starts


def check_groups(groups: int | None, accumulate: int, ranks: int, imitation: object) -> int:
    """The number of batches in flight, or a refusal of numbers that do not divide."""
    groups = accumulate if groups is None else groups
    check_number("groups", groups, minimum=1, integer=True)
    if groups % accumulate:
        raise ValueError(
            f"groups must be a multiple of accumulate={accumulate}, the windows of an update; got "
            f"{groups}"
        )
    if accumulate % ranks:
        raise ValueError(
            f"accumulate must be a multiple of the {ranks} processes, which share an update's "
            f"windows; got {accumulate}"
        )
    if imitation is not None and accumulate > 1:
        raise ValueError(
            "imitation needs accumulate=1: an update is either of imitation or of the meta-loss"
        )
    return groups


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
