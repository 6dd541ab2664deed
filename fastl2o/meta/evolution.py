"""Evolution strategies: meta-gradients from losses alone, by disturbing the meta-parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..rules import Rule
from . import objectives
from ._checks import check_choice, check_number
from .estimators import Estimator, MetaGradient
from .tasks import Batch, Task, TaskRun
from .tasks._transforms import WrappedRun
from .unroll import Perturbations, Progress, roll, start

__all__ = ["ES", "PES"]


class _PairedRun(WrappedRun):
    """P runs twice: run p and run P + p are one problem and see the same minibatches and noise."""

    def __init__(self, inner: TaskRun) -> None:
        super().__init__(inner, {"params": _twice(inner.params)}, inner.generator)

    def losses(self, params: Tensor, batch: Batch) -> Tensor:
        return torch.cat([self.inner.losses(half, batch) for half in params.chunk(2)])

    def loss_and_grad(self, params: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        losses, grads = self.inner.loss_and_grad_at(params.unflatten(0, (2, -1)), batch)
        return losses.flatten(), grads.flatten(0, 1)

    def held_out(self, generator: torch.Generator) -> TaskRun:
        return _PairedRun(self.inner.held_out(generator))

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self.inner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state["inner"])
        # A drawn task's run may have taken another size, and another generator.
        self.tensors, self.generator = {"params": _twice(self.inner.params)}, self.inner.generator


def _twice(tensor: Tensor, axis: int = 0) -> Tensor:
    return torch.cat((tensor, tensor), axis)


class ES(Estimator):
    """Antithetic evolution strategies: the gradient of the meta-loss smoothed by a Gaussian.

    Runs come in pairs that share problem and minibatches. Over a window one is stepped by
    meta-parameters phi + sigma e, the other by phi - sigma e, e ~ N(0, 1); the estimate is the mean
    over pairs of e (L+ - L-) / (2 sigma) (Salimans et al. 2017, arXiv 1703.03864). No gradient goes
    through the rule or the optimizee: chaotic or non-differentiable unrolls do no harm, and memory
    does not grow with the window.

    All runs of a window are stepped by one kernel call a step, each by a row of meta-parameters of
    its own.

    Args:
        unroll: T, the inner steps of a window; None for a window as long as the horizon, whose
            estimate is not truncated. Between shorter windows both runs of a pair go on from where
            the first one stood (as truncated ES is biased towards short horizons, see ``PES``).
        sigma: standard deviation of the disturbance of each meta-parameter.
        objective: the meta-loss, see ``objectives.per_run``; it is not differentiated.
        held_out: whether f is taken on minibatches of data that the runs do not train on.

    Example:
        >>> import fastl2o
        >>> from fastl2o import meta
        >>> rule = fastl2o.LSTMRule(hidden_size=4, num_layers=1)
        >>> generator = torch.Generator().manual_seed(0)
        >>> estimator = meta.ES(unroll=5)
        >>> run = estimator.sample(meta.tasks.Quadratic(dim=3), 8, generator, torch.float32)
        >>> result = estimator.window(rule, estimator.begin(rule, run))
        >>> result.losses.shape, result.gradient.numel() == rule.num_meta_parameters
        (torch.Size([6, 8]), True)
    """

    kind = "es"
    persistent = False

    def __init__(
        self,
        unroll: int | None = None,
        sigma: float = 0.01,
        objective: str = "log",
        held_out: bool = False,
    ) -> None:
        if unroll is not None:
            check_number("unroll", unroll, minimum=1, integer=True)
        check_number("sigma", sigma, minimum=0, exclusive=True)
        check_choice("objective", objective, tuple(objectives.OBJECTIVES))
        self.unroll, self.sigma, self.objective = unroll, float(sigma), objective
        self.held_out = bool(held_out)

    def config(self) -> dict[str, Any]:
        """Constructor arguments, JSON-able."""
        names = ("unroll", "sigma", "objective", "held_out")
        return {name: getattr(self, name) for name in names}

    def check_runs(self, runs: int) -> None:
        """Refuse an odd number: runs come in pairs."""
        if runs < 2 or runs % 2:
            raise ValueError(
                f"runs must be even for {type(self).__name__}, which steps them in pairs; "
                f"got {runs}"
            )

    def sample(
        self, task: Task, runs: int, generator: torch.Generator, dtype: torch.dtype
    ) -> TaskRun:
        """Draw ``runs / 2`` problems, each of which two runs train."""
        self.check_runs(runs)
        return _PairedRun(task.sample(runs // 2, generator, dtype))

    def begin(self, rule: Rule, run: TaskRun) -> Progress:
        """Start the runs that ``sample`` drew; the seed of their disturbances is drawn too."""
        if not isinstance(run, _PairedRun):
            raise TypeError(
                f"{type(self).__name__} needs runs in pairs: draw them with "
                f"{type(self).__name__}().sample(task, runs, generator, dtype)"
            )
        # What is random about a state is the same for both runs of a pair.
        state = rule.init_runs(run.inner.params, run.tensor_sizes, run.generator)
        progress = start(rule, run, _twice(state, rule.runs_axis), held_out=self.held_out)
        seed = int(torch.randint(2**62, (), generator=run.generator))
        progress.perturbations = Perturbations(seed)
        return progress

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
        steps, noise = self.window_steps(steps), progress.perturbations
        if noise is None:
            raise TypeError(f"progress was not started by {type(self).__name__}.begin")
        self.check_held_out(progress)
        center = rule.flat_parameters().detach()
        pairs = progress.params.shape[0] // 2
        drawn = noise.noise(noise.windows, pairs, len(center)).to(center)
        meta = self._disturbed(center, drawn)
        if rule.learned_start and progress.step == 0:
            rule.shift_start(progress.state, meta - center, progress.run.tensor_sizes)
        losses = roll(rule, progress, steps, meta, lr=lr, weight_decay=weight_decay)
        loss = objectives.per_run(self.objective, losses, progress.first_losses)
        plus, minus = loss.chunk(2)
        directions = noise.add(drawn) if self.persistent else drawn
        if noise.windows == 0:
            noise.steps = steps
        noise.windows += 1
        if not self.persistent:
            _follow_first(rule, progress)
        gradient = (plus - minus) @ directions / (2 * self.sigma * pairs)
        if self.persistent and self.objective == "log":
            # A run's last window may be shorter: its steps count no more than those of the others.
            gradient *= steps / noise.steps
        return MetaGradient(loss.mean(), gradient, losses)

    def _disturbed(self, center: Tensor, drawn: Tensor) -> Tensor:
        """phi + sigma e of all pairs, then phi - sigma e ``(2 pairs, M)``."""
        # Written in place: new memory for each of the terms takes ten times as long as the sums.
        meta = center.new_empty((2 * len(drawn), len(center)))
        plus, minus = meta.chunk(2)
        torch.mul(drawn, self.sigma, out=minus)
        torch.add(center, minus, out=plus)
        torch.sub(center, minus, out=minus)
        return meta


class PES(ES):
    """Persistent evolution strategies: truncated windows without truncation bias.

    As ``ES``, but both runs of a pair go on from where each of them stood, and what multiplies a
    window's loss difference is the sum of the pair's disturbances since its runs' start: the mean
    over a run's windows is an unbiased estimate of the smoothed gradient of the loss summed over
    the whole horizon (Vicol, Metz and Sohl-Dickstein 2021, arXiv 2112.13835, algorithm 2). The
    objective must therefore be a sum or mean over steps: ``"log"`` or ``"sum"``; of a shorter last
    window each step weighs as much as one of the others.

    Args:
        unroll: T, the inner steps of a window.
        sigma: standard deviation of the disturbance of each meta-parameter in each window.
        objective: ``"log"`` or ``"sum"``.
        held_out: as for ``ES``.

    Example:
        >>> from fastl2o import meta
        >>> meta.PES(unroll=10, sigma=0.02)
        PES(unroll=10, sigma=0.02, objective='log', held_out=False)
    """

    kind = "pes"
    persistent = True

    def __init__(
        self,
        unroll: int = 20,
        sigma: float = 0.01,
        objective: str = "log",
        held_out: bool = False,
    ) -> None:
        check_number("unroll", unroll, minimum=1, integer=True)
        check_choice("objective", objective, ("log", "sum"))
        super().__init__(unroll, sigma, objective, held_out)


def _follow_first(rule: Rule, progress: Progress) -> None:
    """Let both runs of every pair stand where the first one does."""
    for tensor in (progress.params, progress.losses, progress.grads):
        tensor.copy_(_twice(tensor.chunk(2)[0]))
    first, _ = progress.state.chunk(2, rule.runs_axis)
    progress.state.copy_(_twice(first, rule.runs_axis))
