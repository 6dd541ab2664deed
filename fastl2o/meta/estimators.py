"""Estimators of the meta-gradient: how a run's losses reach the rule's meta-parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..rules import CoordinateRule, Rule
from . import objectives
from ._checks import check_choice, check_number, check_type
from ._segments import SegmentedWindow, least_memory
from .tasks import Task, TaskRun
from .unroll import Progress, start

__all__ = ["Estimator", "MetaGradient", "TruncatedBPTT", "unroll_gradient"]


class MetaGradient(NamedTuple):
    """One window's outcome.

    Example:
        >>> import fastl2o
        >>> from fastl2o import meta
        >>> rule = fastl2o.LSTMRule(hidden_size=4, num_layers=1)
        >>> run = meta.tasks.Quadratic(dim=3).sample(2, torch.Generator().manual_seed(0))
        >>> estimator = meta.TruncatedBPTT(unroll=5)
        >>> loss, gradient, losses = estimator.window(rule, meta.start(rule, run))
        >>> loss.shape, gradient.shape == rule.flat_parameters().shape, losses.shape
        (torch.Size([]), True, torch.Size([6, 2]))
    """

    loss: Tensor  # 0-dim: the meta-loss, mean over the runs
    gradient: Tensor  # (M,): its gradient, in the order of rule.flat_parameters()
    losses: Tensor  # (T + 1, R): f_0 .. f_T of every run


class Estimator(ABC):
    """How a window of inner steps becomes a meta-gradient.

    Attributes:
        unroll: T, the inner steps of a window; None for a window as long as the horizon.
        objective: the meta-loss, one of ``objectives.OBJECTIVES``.
        held_out: whether it is taken on data that the runs do not train on.

    Example:
        >>> from fastl2o import meta
        >>> [estimator.kind for estimator in (meta.TruncatedBPTT(), meta.ES(), meta.PES())]
        ['bptt', 'es', 'pes']
    """

    kind: ClassVar[str]
    unroll: int | None
    objective: str
    held_out: bool = False

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Constructor arguments, JSON-able."""

    @abstractmethod
    def window(
        self,
        rule: Rule,
        progress: Progress,
        steps: int | None = None,
        *,
        lr: float = 1.0,
        weight_decay: float = 0.0,
    ) -> MetaGradient:
        """Advance ``progress`` by a window and differentiate it; ``steps`` replaces ``unroll``."""

    def check_runs(self, runs: int) -> None:  # noqa: B027  (most take any number)
        """Refuse a number of runs that the estimator cannot use."""

    def check_rule(self, rule: Rule) -> None:  # noqa: B027  (most take any rule)
        """Refuse a rule that the estimator cannot differentiate."""

    def check_task(self, task: Task) -> None:
        """Refuse a task that holds out no data where the meta-loss is to be taken on such."""
        if not self.held_out:
            return
        generator = torch.Generator().manual_seed(0)
        try:
            task.sample(1, generator).held_out(generator)
        except ValueError as error:
            raise ValueError(f"held_out=True, and {task!r}: {error}") from error

    def check_held_out(self, progress: Progress) -> None:
        """Refuse runs whose losses are not measured on the data that the meta-loss is of."""
        if self.held_out != (progress.held_out is not None):
            raise TypeError(
                f"progress was started with held_out={not self.held_out}, and the estimator has "
                f"held_out={self.held_out}; start the runs by its begin(rule, run)"
            )

    def sample(
        self, task: Task, runs: int, generator: torch.Generator, dtype: torch.dtype
    ) -> TaskRun:
        """Draw ``runs`` runs of a task that ``window`` can take."""
        return task.sample(runs, generator, dtype)

    def begin(self, rule: Rule, run: TaskRun) -> Progress:
        """Start the runs that ``sample`` drew."""
        return start(rule, run, held_out=self.held_out)

    def window_steps(self, steps: int | None) -> int:
        """``steps``, or else ``unroll``."""
        chosen = self.unroll if steps is None else steps
        if chosen is None:
            raise ValueError("steps must be given: an estimator with unroll=None has no length")
        return chosen

    def __repr__(self) -> str:
        arguments = ", ".join(f"{key}={value!r}" for key, value in self.config().items())
        return f"{type(self).__name__}({arguments})"


class TruncatedBPTT(Estimator):
    """Back-propagation through windows of ``unroll`` inner steps, cut between windows.

    The meta-loss of a window is the mean over its R runs of the ``objective``, see
    ``objectives.per_run``: ``"sum"``, ``"weighted"``, ``"final"``, ``"log"`` or ``"best"``.

    Gradients that enter the rule are constants (the usual first-order choice), unless
    ``second_order``. Noise and gaps that a task adds to them are not in the gradients of f.

    Args:
        unroll: T, the inner steps of a window; None for a window as long as the horizon, which
            cuts nothing and whose recorded gradients take T x R x D numbers.
        objective: which meta-loss, see above.
        final_term: whether f_T, taken on the next window's first minibatch, counts. Without it the
            sums end at f_{T-1}, and the window's last update gets no gradient, as in some published
            code.
        path: ``"fused"`` is one ``unroll_backward`` call on the recorded gradients; ``"autograd"``
            is the same window through eager autograd and the reference step, the check and the
            baseline.
        second_order: differentiate through the optimizee's gradients too; always takes the autograd
            path.
        full_data: whether f is the loss on all of a task's data, as the hierarchical rule's authors
            have it; the rule still sees gradients of minibatches. Then f's gradients are no longer
            those that the rule saw anyway: this always takes the autograd path.
        held_out: whether f is the loss on minibatches of data that the runs do not train on (with
            ``full_data``, on all of that data), for rules that train models which generalise. Its
            gradients are taken besides those that the rule sees: a window takes twice the
            evaluations and the memory.
        segments: keep no more of a window's gradients at a time than those of one of as many
            segments; of the others only the beginnings are kept, and their steps are taken again.
            ``"auto"`` is the number that takes the least memory, which then grows by the square
            root of ``unroll``. The gradient is the same but for rounding. For the fused path.

    Example:
        >>> import fastl2o
        >>> from fastl2o import meta
        >>> rule = fastl2o.LSTMRule(hidden_size=4, num_layers=1)
        >>> run = meta.tasks.Quadratic(dim=3).sample(2, torch.Generator().manual_seed(0))
        >>> result = meta.TruncatedBPTT(unroll=5).window(rule, meta.start(rule, run))
        >>> result.losses.shape, result.gradient.numel() == rule.num_meta_parameters
        (torch.Size([6, 2]), True)
    """

    kind = "bptt"

    def __init__(
        self,
        unroll: int | None = 20,
        objective: str = "sum",
        final_term: bool = True,
        path: str = "fused",
        second_order: bool = False,
        full_data: bool = False,
        held_out: bool = False,
        segments: int | str = 1,
    ) -> None:
        if unroll is not None:
            check_number("unroll", unroll, minimum=1, integer=True)
        check_choice("objective", objective, tuple(objectives.OBJECTIVES))
        check_choice("path", path, ("fused", "autograd"))
        if not final_term and unroll == 1:
            raise ValueError("unroll=1 with final_term=False leaves no loss; use final_term=True")
        self.unroll, self.objective, self.final_term = unroll, objective, bool(final_term)
        self.path = "autograd" if second_order or full_data else path
        self.second_order, self.full_data = bool(second_order), bool(full_data)
        self.held_out, self.segments = bool(held_out), segments
        if isinstance(segments, str):
            check_choice("segments", segments, ("auto",))
        else:
            check_number("segments", segments, minimum=1, integer=True)
        if segments != 1 and self.path == "autograd":
            raise ValueError(
                f"segments={segments!r} is for the fused path; second_order, full_data and "
                "path='autograd' keep whole graphs: use segments=1"
            )

    def config(self) -> dict[str, Any]:
        """Constructor arguments, JSON-able."""
        names = [
            *("unroll", "objective", "final_term", "path"),
            *("second_order", "full_data", "held_out", "segments"),
        ]
        return {name: getattr(self, name) for name in names}

    def window(
        self,
        rule: Rule,
        progress: Progress,
        steps: int | None = None,
        *,
        lr: float = 1.0,
        weight_decay: float = 0.0,
    ) -> MetaGradient:
        """See ``Estimator.window``."""
        steps = self.window_steps(steps)
        self.check_rule(rule)
        self.check_held_out(progress)
        if self.path == "autograd":
            return self._autograd_window(rule, progress, steps, lr, weight_decay)
        segments, first = self.segments, progress.step == 0
        if isinstance(segments, str):
            segments = least_memory(progress, steps)
        segments = max(1, min(segments, steps))
        window = SegmentedWindow(rule, progress, steps, segments, lr, weight_decay)
        losses = window.forward()
        loss = self.meta_loss(losses, progress.first_losses)
        weights = self.loss_weights(losses, progress.first_losses)
        gradient, d_state = window.backward(weights)
        if rule.learned_start and first:
            gradient = gradient + rule.start_gradient(d_state, progress.run.tensor_sizes)
        return MetaGradient(loss, gradient, losses)

    def check_rule(self, rule: Rule) -> None:
        """See ``Estimator.check_rule``."""
        if self.segments != 1 and not isinstance(rule, CoordinateRule):
            raise ValueError(
                f"segments={self.segments!r} is for rules whose coordinates do not talk to each "
                f"other, and this one is of family {rule.family!r}; use segments=1"
            )

    def meta_loss(self, losses: Tensor, first_losses: Tensor) -> Tensor:
        """The meta-loss, 0-dim, of ``losses (T + 1, R)`` and the runs' first losses ``(R,)``."""
        return objectives.per_run(self.objective, losses, first_losses, self.final_term).mean()

    def loss_weights(self, losses: Tensor, first_losses: Tensor) -> Tensor:
        """d meta-loss / d f_t, ``(T + 1, R)``: the weights of the recorded gradients."""
        return objectives.loss_weights(self.objective, losses, first_losses, self.final_term)

    def _autograd_window(
        self, rule: Rule, progress: Progress, steps: int, lr: float, weight_decay: float
    ) -> MetaGradient:
        meta = rule.flat_parameters().detach().requires_grad_()
        run = progress.run
        measured = run if progress.held_out is None else progress.held_out
        everything = measured.full_batch()
        if self.full_data and progress.step == 0:
            progress.first_losses = measured.losses(progress.params, everything)
            progress.losses = progress.first_losses.clone()
        params, state, grads = progress.params.clone(), progress.state, progress.grads
        losses, sizes = [progress.losses], run.tensor_sizes
        of_start = rule.learned_start and progress.step == 0
        first_state = state = state.clone().requires_grad_(of_start)
        for t in range(steps):
            update, state = rule.reference_runs_step(grads, state, progress.step + t, sizes, meta)
            params = (1.0 - lr * weight_decay) * params + lr * update
            batch = run.next_batch()
            if self.second_order:
                loss = run.losses(params, batch)
                (grads,) = torch.autograd.grad(
                    loss.sum(), params, retain_graph=True, create_graph=t + 1 < steps
                )
            else:
                # Not by autograd, which knows nothing of noise that a task adds to gradients.
                grads = run.loss_and_grad(params.detach(), batch)[1]
                loss = params.new_empty(0)
            if self.full_data:
                loss = measured.losses(params, everything)
            elif self.held_out:
                loss = measured.losses(params, measured.next_batch())
            elif not self.second_order:
                loss = run.losses(params, batch)
            losses.append(loss)
        all_losses = torch.stack(losses)
        meta_loss = self.meta_loss(all_losses, progress.first_losses)
        wanted = (meta, first_state) if of_start else (meta,)
        gradient, *d_first = torch.autograd.grad(meta_loss, wanted, materialize_grads=True)
        if of_start:
            gradient = gradient + rule.start_gradient(d_first[0], sizes)
        progress.step += steps
        progress.params.copy_(params.detach())
        progress.state.copy_(state.detach())
        progress.losses, progress.grads = all_losses[-1].detach().clone(), grads.detach().clone()
        return MetaGradient(meta_loss.detach(), gradient, all_losses.detach())


def unroll_gradient(
    rule: Rule,
    task_run: TaskRun,
    steps: int = 20,
    *,
    estimator: TruncatedBPTT | None = None,
    lr: float = 1.0,
    weight_decay: float = 0.0,
) -> tuple[dict[str, Tensor], Tensor]:
    """One unroll's exact meta-gradient, for a meta-training loop of one's own.

    The runs start at ``task_run.params``; minibatches are drawn from the run's generator.

    Args:
        rule: the rule; it is not changed, and no ``.grad`` is written.
        task_run: what to train, from ``task.sample(num_runs, generator)``.
        steps: T, the inner steps.
        estimator: objective and path; ``TruncatedBPTT(steps)`` by default.
        lr, weight_decay: of the inner steps.

    Returns:
        The gradient by parameter name, and the losses ``(T + 1, R)`` at theta_0 .. theta_T.

    Raises:
        TypeError, ValueError: an argument of another kind, or an impossible number.

    Example:
        >>> import fastl2o
        >>> from fastl2o import meta
        >>> rule = fastl2o.LSTMRule(hidden_size=4, num_layers=1)
        >>> run = meta.tasks.Quadratic(dim=3).sample(2, torch.Generator().manual_seed(0))
        >>> grads, losses = meta.unroll_gradient(rule, run, steps=5)
        >>> sorted(grads) == sorted(name for name, _ in rule.named_parameters()), losses.shape
        (True, torch.Size([6, 2]))
    """
    check_type("rule", rule, Rule, "fastl2o.LSTMRule()")
    check_type("task_run", task_run, TaskRun, "task.sample(num_runs, generator)")
    check_number("steps", steps, minimum=1, integer=True)
    estimator = TruncatedBPTT(steps) if estimator is None else estimator
    check_type("estimator", estimator, TruncatedBPTT, "TruncatedBPTT(unroll=20)")
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        check_number(name, value, minimum=0)
    progress = estimator.begin(rule, task_run)
    result = estimator.window(rule, progress, steps, lr=lr, weight_decay=weight_decay)
    return rule.unflatten(result.gradient), result.losses
