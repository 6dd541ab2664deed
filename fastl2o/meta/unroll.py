"""Inner training under a rule, window by window, with the gradients kept for the meta-gradient.

A window of T steps visits theta_0 .. theta_T. Loss and gradient at theta_T are evaluated at the end
of the window (on a minibatch of their own) and carried over: they close this window's meta-gradient
and are the next window's first input, so that no evaluation of the optimizee is spent on the
meta-gradient alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import _ops_hierarchical as hierarchical
from .. import ops
from .._ops_runs import runs_step_
from ..rules import HierarchicalRule
from ._checks import check_number
from ._saved import check_tensor
from .tasks._base import fork_generator

if TYPE_CHECKING:
    from ..rules import Rule
    from .tasks import TaskRun

__all__ = ["Perturbations", "Progress", "Window", "roll", "run_window", "start"]


@dataclass
class Perturbations:
    """Normal numbers that disturb meta-parameters, made from counters and so never stored.

    Attributes:
        seed: tells these runs' numbers from all others'.
        windows: how many windows of the runs have been disturbed.
        steps: of the first of them.
    """

    seed: int
    windows: int = 0
    steps: int = 0
    _sum: Tensor | None = field(default=None, repr=False, compare=False)

    @classmethod
    def parsed(cls, saved: list[int], taken: int) -> Perturbations:
        """Those of runs that have taken so many inner steps, as a checkpoint holds them.

        Raises:
            ValueError, TypeError: it does not.
        """
        seed, windows, steps = saved
        check_number("seed", seed, minimum=0, integer=True, below=2**62)
        check_number("windows", windows, minimum=0, integer=True, below=taken + 1)
        check_number("steps", steps, minimum=min(windows, 1), integer=True, below=taken + 1)
        return cls(seed, windows, steps)

    def noise(self, window: int, pairs: int, size: int) -> Tensor:
        """The numbers ``(pairs, size)``, float32, of one window: the same at every call."""
        # The counter's highest word holds the window: the windows' numbers cannot overlap.
        source = np.random.Philox(key=self.seed, counter=[0, 0, 0, window])
        drawn = np.random.Generator(source).standard_normal((pairs, size), dtype=np.float32)
        return torch.from_numpy(drawn)

    def add(self, drawn: Tensor) -> Tensor:
        """The sum ``(pairs, size)`` over the windows so far and ``drawn``, the present one's."""
        if self._sum is None:
            # Zero for runs that start; for restored ones the numbers are made again.
            self._sum = torch.zeros_like(drawn)
            for window in range(self.windows):
                self._sum += self.noise(window, *drawn.shape).to(drawn)
        self._sum += drawn
        return self._sum


@dataclass
class Progress:
    """Where R runs stand: everything that one window hands to the next.

    Attributes:
        run: the runs' task, data and generator.
        params: current parameters ``(R, D)``, stepped in place.
        state: the rule's state, as ``rule.init_runs`` lays it out (``(S, R, D)`` for rules whose
            coordinates do not talk to each other), stepped in place.
        step: number of inner steps taken.
        losses: f at ``params`` ``(R,)``.
        grads: gradient at ``params`` ``(R, D)`` that the next step uses.
        first_losses: f at the initial parameters ``(R,)``.
        perturbations: of the meta-parameters, where the estimator disturbs them.
        held_out: the same runs on held-out data, where f is measured on that.

    Example:
        >>> import fastl2o, torch
        >>> from fastl2o import meta
        >>> rule = fastl2o.LSTMRule(hidden_size=4, num_layers=1)
        >>> run = meta.tasks.Quadratic(dim=3).sample(2, torch.Generator().manual_seed(0))
        >>> progress = meta.start(rule, run)
        >>> _ = meta.run_window(rule, progress, steps=5)
        >>> progress.step, progress.params.shape, progress.state.shape
        (5, torch.Size([2, 3]), torch.Size([8, 2, 3]))
    """

    run: TaskRun
    params: Tensor
    state: Tensor
    step: int
    losses: Tensor
    grads: Tensor
    first_losses: Tensor
    perturbations: Perturbations | None = None
    held_out: TaskRun | None = None

    @property
    def two_gradients(self) -> bool:
        """Whether the gradients of f are others than those that the rule sees."""
        return self.held_out is not None or self.run.changes_gradients

    def evaluate(self) -> tuple[Tensor, Tensor]:
        """f ``(R,)`` and the next step's gradient ``(R, D)``, on minibatches drawn anew."""
        losses, grads = self.run.loss_and_grad(self.params, self.run.next_batch())
        if self.held_out is not None:
            with torch.no_grad():
                losses = self.held_out.losses(self.params, self.held_out.next_batch())
        return losses, grads

    def generators(self) -> list[torch.Generator]:
        """All that ``evaluate`` draws from."""
        apart = [] if self.held_out is None else self.held_out.generators()
        return [*self.run.generators(), *apart]

    def state_dict(self) -> dict[str, Any]:
        """All of it, for a checkpoint."""
        names = ("params", "state", "step", "losses", "grads", "first_losses")
        noise, apart = self.perturbations, self.held_out
        return {
            "run": self.run.state_dict(),
            "perturbations": None if noise is None else [noise.seed, noise.windows, noise.steps],
            # All else of it is the run's.
            "held_out": None if apart is None else apart.generator.get_state(),
            **{name: getattr(self, name) for name in names},
        }

    @classmethod
    def from_state_dict(cls, run: TaskRun, saved: dict[str, Any], like: Progress) -> Progress:
        """Put a saved position back; ``run`` is any run of the same task, with as many runs.

        Raises:
            ValueError, TypeError: it does not have the shapes of ``like``.
        """
        run.load_state_dict(saved["run"])
        names = ("params", "state", "losses", "grads", "first_losses")
        for name in names:
            check_tensor(name, saved[name], getattr(like, name))
        noise, held_out = saved["perturbations"], None
        for name in ("perturbations", "held_out"):
            if (saved[name] is None) != (getattr(like, name) is None):
                raise ValueError(f"{name} is of runs of another estimator")
        if saved["held_out"] is not None:
            held_out = run.held_out(torch.Generator().set_state(saved["held_out"]))
        return cls(
            run=run,
            held_out=held_out,
            step=saved["step"],
            perturbations=None if noise is None else Perturbations.parsed(noise, saved["step"]),
            **{name: saved[name].clone() for name in names},
        )


class Window(NamedTuple):
    """The record of T inner steps of R runs.

    Example:
        >>> import fastl2o, torch
        >>> from fastl2o import meta
        >>> rule = fastl2o.LSTMRule(hidden_size=4, num_layers=1)
        >>> run = meta.tasks.Quadratic(dim=3).sample(2, torch.Generator().manual_seed(0))
        >>> window = meta.run_window(rule, meta.start(rule, run), steps=5)
        >>> window.grads.shape, window.step
        (torch.Size([6, 2, 3]), 0)
    """

    grads: Tensor  # (T + 1, R, D): g_0 .. g_T, which the rule sees
    losses: Tensor  # (T + 1, R): f_0 .. f_T
    state: Tensor  # the rule's state before the window, as rule.init_runs lays it out
    step: int  # inner steps taken before the window
    loss_grads: Tensor | None = None  # (T, R, D): of f_1 .. f_T, where the rule sees others


def start(
    rule: Rule, run: TaskRun, state: Tensor | None = None, *, held_out: bool = False
) -> Progress:
    """Begin the runs: initial state, and the first evaluation at the initial parameters.

    What is random about the state follows from the run's generator, which it leaves as it is.

    Args:
        rule: the rule that will step them.
        run: what they train.
        state: to start from in place of ``rule.init_runs``.
        held_out: measure f on minibatches of held-out data; they are drawn from a generator of
            their own, seeded by the run's.

    Raises:
        ValueError: with ``held_out``, if the run's task holds out no data.

    Example:
        >>> import fastl2o, torch
        >>> from fastl2o import meta
        >>> run = meta.tasks.Quadratic(dim=3).sample(2, torch.Generator().manual_seed(0))
        >>> progress = start(fastl2o.LSTMRule(), run)
        >>> progress.step, bool((progress.losses == progress.first_losses).all())
        (0, True)
    """
    params = run.params.clone(memory_format=torch.contiguous_format)
    if state is None:
        state = rule.init_runs(params, run.tensor_sizes, run.generator)
    losses, grads = run.loss_and_grad(params, run.next_batch())
    apart = None
    if held_out:
        apart = run.held_out(fork_generator(run.generator))
        with torch.no_grad():
            losses = apart.losses(params, apart.next_batch())
    return Progress(run, params, state, 0, losses, grads, losses.clone(), held_out=apart)


def run_window(
    rule: Rule, progress: Progress, steps: int, *, lr: float = 1.0, weight_decay: float = 0.0
) -> Window:
    """Advance ``progress`` by ``steps`` inner steps, in place, and record them.

    Each step is one op call for all runs. Non-finite gradients are passed on: the
    caller sees them in the losses and decides.

    Args:
        rule: the rule that takes the steps; no graph is built.
        progress: where the runs stand; advanced in place.
        steps: T, at least 1.
        lr, weight_decay: theta' = (1 - lr * weight_decay) * theta + lr * u.

    Example:
        >>> import fastl2o, torch
        >>> from fastl2o import meta
        >>> rule = fastl2o.LSTMRule.as_sgd(0.01, num_layers=0)
        >>> run = meta.tasks.Quadratic(dim=3).sample(2, torch.Generator().manual_seed(0))
        >>> window = run_window(rule, start(rule, run), steps=5)
        >>> window.losses.shape, bool((window.losses[5] < window.losses[0]).all())
        (torch.Size([6, 2]), True)
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    params, state = progress.params, progress.state
    grads = params.new_empty((steps + 1, *params.shape))
    losses = progress.losses.new_empty((steps + 1, params.shape[0]))
    grads[0], losses[0] = progress.grads, progress.losses
    run, apart = progress.run, progress.held_out
    of_losses = params.new_empty((steps, *params.shape)) if progress.two_gradients else None
    window = Window(grads, losses, state.clone(), progress.step, of_losses)
    with torch.no_grad():
        for t in range(steps):
            taken = progress.step + t
            step_runs(rule, params, grads[t], state, taken, run.tensor_sizes, lr, weight_decay)
            batch = run.next_batch()
            if of_losses is None or apart is not None:
                losses[t + 1], grads[t + 1] = run.loss_and_grad(params, batch)
            else:
                losses[t + 1], grads[t + 1], of_losses[t] = run.loss_and_grads(params, batch)
            if of_losses is not None and apart is not None:
                losses[t + 1], of_losses[t] = apart.loss_and_grad(params, apart.next_batch())
    progress.step += steps
    progress.losses, progress.grads = losses[steps].clone(), grads[steps].clone()
    return window


def roll(
    rule: Rule,
    progress: Progress,
    steps: int,
    meta: Tensor | None = None,
    *,
    lr: float = 1.0,
    weight_decay: float = 0.0,
) -> Tensor:
    """Advance ``progress`` by ``steps``, in place, and record the losses alone.

    Args:
        rule: the rule that takes the steps.
        progress: where the runs stand; advanced in place.
        steps: T, at least 1.
        meta: ``(R, M)``, flat meta-parameters of each run in place of the rule's.
        lr, weight_decay: theta' = (1 - lr * weight_decay) * theta + lr * u.

    Returns:
        The losses ``(T + 1, R)``, f_0 .. f_T. Gradients are not kept.
    """
    apart = meta is not None and not isinstance(rule, HierarchicalRule)
    state = progress.state
    if apart:
        # A run's planes lie together once it is stepped by meta-parameters of its own: here they
        # are copied in the first of several windows only.
        state = state.transpose(0, 1).contiguous()
        progress.state = state.transpose(0, 1)
    losses, grads = [progress.losses], progress.grads
    sizes = progress.run.tensor_sizes
    with torch.no_grad():
        for t in range(steps):
            taken = progress.step + t
            step_runs(rule, progress.params, grads, state, taken, sizes, lr, weight_decay, meta)
            loss, grads = progress.evaluate()
            losses.append(loss)
    progress.step += steps
    progress.losses, progress.grads = losses[-1].clone(), grads.contiguous()
    return torch.stack(losses)


def step_runs(
    rule: Rule,
    params: Tensor,
    grads: Tensor,
    state: Tensor,
    step: int,
    sizes: Sequence[int],
    lr: float,
    weight_decay: float,
    meta: Tensor | None = None,
) -> None:
    """Take one step of all runs in place, with ``meta (R, M)`` each by a row of its own.

    Those of a coordinate-wise rule then have their ``state`` as ``(R, S, D)``.
    """
    if isinstance(rule, HierarchicalRule):
        hierarchical.runs_step_(rule, params, grads, state, step, sizes, lr, weight_decay, meta)
        return
    rule = ops.coordinate_wise(rule)
    if meta is not None:
        runs_step_(rule, params, grads, state, step, meta, lr=lr, weight_decay=weight_decay)
        return
    counts = [torch.tensor(float(step))]
    ops.step_(
        rule, [params], [grads], [state], counts,
        lr=lr, weight_decay=weight_decay, nonfinite="pass",
    )  # fmt: skip
