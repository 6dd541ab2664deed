"""Runs of a task under a rule or a hand-designed optimizer, for ``fastl2o eval``.

R runs of a task advance as one ``(R, D)`` tensor: coordinates of different runs do not interact, in
hand-designed optimizers and coordinate-wise rules because none do, in a hierarchical rule because
each run is a problem of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from . import _ops_hierarchical as hierarchical
from .optim import LearnedOptimizer
from .rules import HierarchicalRule, Rule


def _sgd(params: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=lr)


def _nesterov(params: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=lr, momentum=0.9, nesterov=True)


def _rmsprop(params: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(params, lr=lr)


def _adam(params: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=lr)


class BuildOptimizer(Protocol):
    """Builds a hand-designed optimizer for parameters and a learning rate."""

    def __call__(self, params: Iterable[Tensor], lr: float) -> torch.optim.Optimizer: ...


HAND_DESIGNED: dict[str, BuildOptimizer] = {
    "SGD": _sgd,
    "Nesterov": _nesterov,
    "RMSprop": _rmsprop,
    "Adam": _adam,
}
"""Baselines by name: torch's defaults but for the learning rate, and Nesterov's momentum 0.9."""


class TaskRun(Protocol):
    """What is needed of ``fastl2o.meta.tasks.TaskRun``, which is not imported here."""

    generator: torch.Generator

    @property
    def params(self) -> Tensor: ...
    @property
    def tensor_sizes(self) -> Sequence[int]: ...
    def next_batch(self) -> Any: ...
    def loss_and_grad(self, params: Tensor, batch: Any) -> tuple[Tensor, Tensor]: ...


class Task(Protocol):
    """What is needed of ``fastl2o.meta.tasks.Task``."""

    def sample(self, num_runs: int, generator: torch.Generator) -> TaskRun: ...


class Stepper(Protocol):
    """What steps the runs: a torch optimizer, or a rule on problems."""

    def step(self) -> Any: ...


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
    """A rule, applied with ``lr=1``; gradients that are not finite are fed to it."""
    if isinstance(rule, HierarchicalRule):
        return _HierarchicalRuns(rule, params, run)
    return LearnedOptimizer([params], rule, nonfinite="pass")


def hand_designed_stepper(
    params: Tensor, run: TaskRun, build: BuildOptimizer, lr: float
) -> Stepper:
    """A hand-designed optimizer at a learning rate."""
    return build([params], lr=lr)


MakeOptimizer = Callable[[Tensor, TaskRun], Stepper]


def train_losses(task: Task, make: MakeOptimizer, *, horizon: int, runs: int, seed: int) -> Tensor:
    """Train ``runs`` runs of the task for ``horizon`` steps with one optimizer.

    Args:
        make: builds the optimizer for the ``(R, D)`` parameter tensor of a run.
        seed: fixes initial parameters and minibatches, so that optimizers can be compared.

    Returns:
        ``(horizon + 1, R)``; row t is the loss after t steps on the minibatch of step t, NaN from
        where every run has gone non-finite.
    """
    run = task.sample(runs, torch.Generator().manual_seed(seed))
    params = run.params.detach().clone().requires_grad_()
    optimizer = make(params, run)
    losses = torch.full((horizon + 1, params.shape[0]), math.nan)
    for step in range(horizon + 1):
        loss, params.grad = run.loss_and_grad(params.detach(), run.next_batch())
        losses[step] = loss
        if step == horizon or not loss.isfinite().any():
            break
        optimizer.step()
    return losses
