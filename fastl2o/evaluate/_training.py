"""Runs of a task under a rule or a hand-designed optimizer.

R runs of a task advance as one ``(R, D)`` tensor: coordinates of different runs do not interact, in
hand-designed optimizers and coordinate-wise rules because none do, in a hierarchical rule because
each run is a problem of its own.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm

from .. import _ops_hierarchical as hierarchical
from ..optim import LearnedOptimizer
from ..rules import HierarchicalRule, Rule

if TYPE_CHECKING:
    from ._optimizers import BuildOptimizer

__all__ = [
    "MakeOptimizer",
    "Point",
    "Stepper",
    "Task",
    "TaskRun",
    "Trained",
    "hand_designed_stepper",
    "learned_stepper",
    "threads",
    "train",
    "training",
    "warm_up",
]


class TaskRun(Protocol):
    """What is needed of ``fastl2o.meta.tasks.TaskRun``, which is not imported here.

    Example:
        >>> from fastl2o import meta
        >>> run: TaskRun = meta.tasks.Quadratic(dim=3).sample(2, torch.Generator())
        >>> run.loss_and_grad(run.params, run.next_batch())[1].shape
        torch.Size([2, 3])
    """

    generator: torch.Generator

    @property
    def params(self) -> Tensor: ...
    @property
    def tensor_sizes(self) -> Sequence[int]: ...
    def next_batch(self) -> Any: ...
    def loss_and_grad(self, params: Tensor, batch: Any) -> tuple[Tensor, Tensor]: ...


class Task(Protocol):
    """What is needed of ``fastl2o.meta.tasks.Task``.

    Example:
        >>> from fastl2o import meta
        >>> task: Task = meta.tasks.Quadratic(dim=3)
        >>> task.sample(2, torch.Generator()).params.shape
        torch.Size([2, 3])
    """

    def sample(self, num_runs: int, generator: torch.Generator) -> TaskRun: ...


class Stepper(Protocol):
    """What steps the runs: a torch optimizer, or a rule on problems."""

    def step(self) -> Any: ...


MakeOptimizer: TypeAlias = Callable[[Tensor, TaskRun], Stepper]
"""Builds what steps ``params (R, D)`` of a run, as ``Entrant.at`` gives it."""
Bar: TypeAlias = "tqdm[Any]"


class _HierarchicalRuns:
    """Steps ``params (R, D)``, whose ``.grad`` is set, each run as a problem of its own."""

    def __init__(self, rule: HierarchicalRule, params: Tensor, run: TaskRun) -> None:
        self.rule, self.params, self.sizes = rule, params, run.tensor_sizes
        self.state = rule.init_runs(params.detach(), self.sizes, run.generator)
        self.taken = 0

    def step(self) -> None:
        grads = self.params.grad
        assert grads is not None
        hierarchical.runs_step_(
            self.rule, self.params.detach(), grads, self.state, self.taken, self.sizes, 1.0, 0.0
        )
        self.taken += 1


def learned_stepper(params: Tensor, run: TaskRun, rule: Rule) -> Stepper:
    """A rule, applied with ``lr=1``; gradients that are not finite are fed to it.

    Example:
        >>> from fastl2o import LSTMRule, meta
        >>> run = meta.tasks.Quadratic(dim=3).sample(2, torch.Generator())
        >>> params = run.params.clone().requires_grad_()
        >>> stepper = learned_stepper(params, run, LSTMRule.as_sgd(1.0, num_layers=0))
        >>> params.grad = torch.ones_like(params)
        >>> stepper.step()
        >>> bool((params == run.params - 1).all())
        True
    """
    if isinstance(rule, HierarchicalRule):
        return _HierarchicalRuns(rule, params, run)
    return LearnedOptimizer([params], rule, nonfinite="pass")


def hand_designed_stepper(
    params: Tensor, run: TaskRun, build: BuildOptimizer, lr: float
) -> Stepper:
    """A hand-designed optimizer at a learning rate.

    Example:
        >>> from fastl2o import evaluate, meta
        >>> run = meta.tasks.Quadratic(dim=3).sample(2, torch.Generator())
        >>> params = run.params.clone().requires_grad_()
        >>> stepper = hand_designed_stepper(params, run, evaluate.OPTIMIZERS["SGD"], lr=1.0)
        >>> params.grad = torch.ones_like(params)
        >>> stepper.step()
        >>> bool((params == run.params - 1).all())
        True
    """
    return build([params], lr=lr)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Use ``count`` torch threads in the block.

    One is right for small networks: their operations are too short to share, and two threads that
    wait for each other on a busy machine are many times slower than one.

    Raises:
        ValueError: fewer than one, or more than the machine has processors.

    Example:
        >>> with threads(1):
        ...     torch.get_num_threads()
        1
    """
    most = os.cpu_count() or 1
    if not 1 <= count <= most:
        raise ValueError(
            f"threads must be from 1 to {most}, this machine's processors; got {count}"
        )
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Point(NamedTuple):
    """Where the runs are after ``step`` steps."""

    step: int
    losses: Tensor  # (R,), on the minibatch of this step
    params: Tensor  # (R, D), stepped in place by what follows
    seconds: float  # spent on losses, gradients and steps so far, for all runs together


def training(run: TaskRun, make: MakeOptimizer, horizon: int) -> Iterator[Point]:
    """Train runs for ``horizon`` steps: one point a step, the first before any.

    Ends early where every run has gone non-finite.
    """
    params = run.params.detach().clone().requires_grad_()
    seconds, begun = 0.0, perf_counter()
    optimizer = make(params, run)
    for step in range(horizon + 1):
        losses, params.grad = run.loss_and_grad(params.detach(), run.next_batch())
        seconds += perf_counter() - begun
        yield Point(step, losses, params.detach(), seconds)
        if step == horizon or not losses.isfinite().any():
            return
        begun = perf_counter()
        optimizer.step()


class _SmallRun:
    """A linear loss of two coordinates."""

    tensor_sizes = (2,)

    def __init__(self) -> None:
        self.params, self.generator = torch.zeros(1, 2), torch.Generator()

    def next_batch(self) -> tuple[Tensor, ...]:
        return ()

    def loss_and_grad(self, params: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        return params.sum(1), torch.ones_like(params)


def warm_up(make: MakeOptimizer) -> None:
    """Take one step of a small run: the first loads and compiles what is no part of a training."""
    for _ in training(_SmallRun(), make, 1):
        pass


class Trained(NamedTuple):
    """What R runs did; NaN from where every run has gone non-finite.

    Example:
        >>> from fastl2o import evaluate, meta
        >>> adam = evaluate.Entrant.fixed("Adam", 0.1).at(0.1)
        >>> trained = train(meta.tasks.Quadratic(dim=3), adam, horizon=5, runs=2, seed=0)
        >>> trained.losses.shape, trained.seconds.shape
        (torch.Size([6, 2]), torch.Size([6]))
    """

    losses: Tensor  # (horizon + 1, R); row t is the loss after t steps on the minibatch of step t
    seconds: Tensor  # (horizon + 1,), elapsed for all runs together


def train(
    task: Task,
    make: MakeOptimizer,
    *,
    horizon: int,
    runs: int,
    seed: int,
    bar: Bar | None = None,
) -> Trained:
    """Train ``runs`` runs of the task for ``horizon`` steps with one optimizer.

    Args:
        make: builds the optimizer for the ``(R, D)`` parameter tensor of a run.
        seed: fixes initial parameters and minibatches, so that optimizers can be compared.
        bar: progress bar that counts inner steps.

    Example:
        >>> from fastl2o import evaluate, meta
        >>> adam = evaluate.Entrant.fixed("Adam", 0.1).at(0.1)
        >>> train(meta.tasks.Quadratic(dim=3), adam, horizon=5, runs=2, seed=0).losses.shape
        torch.Size([6, 2])
    """
    run = task.sample(runs, torch.Generator().manual_seed(seed))
    losses = torch.full((horizon + 1, runs), math.nan)
    seconds = torch.full((horizon + 1,), math.nan, dtype=torch.float64)
    last = 0
    for point in training(run, make, horizon):
        losses[point.step], seconds[point.step] = point.losses, point.seconds
        if bar is not None:
            bar.update(point.step - last)
        last = point.step
    if bar is not None:
        bar.update(horizon - last)
    return Trained(losses, seconds)
