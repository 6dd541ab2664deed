"""Imitation: teach a rule by showing it Adam's steps (Chen et al. 2020, arXiv 2010.09089)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..rules import CoordinateRule, Rule
from ._checks import check_choice, check_number
from ._saved import check_tensor
from .estimators import MetaGradient
from .unroll import Progress, step_runs

__all__ = ["Imitation", "Lesson"]

_EPS = 1e-8  # Adam's, as the authors use
_SCHEDULES = ("inverse_sqrt", "inverse", "linear")
_LOWEST_SHARE = 0.05  # of Adam's rate that a linear fall leaves, so that every step teaches


@dataclass
class Lesson:
    """What a batch of runs that imitates carries from window to window.

    Attributes:
        moments: Adam's two, ``(2, R, D)``.
        own_path: whether the runs take the rule's steps, not Adam's.
        picked: the coordinates ``(n,)`` that are compared, or None for all of them.
    """

    moments: Tensor
    own_path: bool = False
    picked: Tensor | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """The compared coordinates of ``(..., D)``."""
        return tensor if self.picked is None else tensor[..., self.picked]

    def begin(self, rule: Rule, progress: Progress) -> None:
        """Where only some coordinates follow Adam's path, give runs that start a state of those."""
        if self.picked is not None and not self.own_path:
            seen = self.of(progress.params)
            progress.state = ops.coordinate_wise(rule).init_state(seen, seen.dtype)

    def state_dict(self) -> dict[str, Any]:
        """All of it, for a checkpoint."""
        return {"moments": self.moments, "own_path": self.own_path, "picked": self.picked}

    @classmethod
    def from_state_dict(cls, saved: dict[str, Any], params: Tensor) -> Lesson:
        """Put a saved lesson back.

        Raises:
            ValueError: it is not one of runs with these parameters ``(R, D)``.
        """
        picked = saved["picked"]
        check_tensor("moments", saved["moments"], torch.stack((params, params)))
        if picked is not None:
            check_tensor("picked", picked, torch.empty(len(picked), dtype=torch.int64))
            if len(picked) and not 0 <= int(picked.min()) <= int(picked.max()) < params.shape[1]:
                raise ValueError(f"picked must be below {params.shape[1]}")
        if type(saved["own_path"]) is not bool:
            raise ValueError("own_path must be True or False")
        return cls(
            saved["moments"].clone(),
            saved["own_path"],
            None if picked is None else picked.clone(),
        )


@dataclass(frozen=True)
class Imitation:
    """Some batches of runs are lessons: the rule is fitted to Adam's steps.

    The gradients seen along a path are fed to the rule and to Adam; the loss of a step is
    1/2 mean over coordinates of (Adam's step - rule's step)^2, summed over the window, mean over
    the runs. By default the path is Adam's, as published; a rule that only ever saw Adam's path
    can drift from it when it takes the steps itself, which ``own_path`` mends (Ross et al. 2011,
    arXiv 1011.0686).

    Args:
        probability: chance that a batch of runs imitates.
        lr: Adam's rate, 0.01 in the paper's code.
        betas: Adam's decay rates.
        decay: how fast Adam's rate falls, in steps; None: it stays at lr.
        schedule: how it falls, at step t = 1, 2, ...: "inverse_sqrt", lr / sqrt(1 + t / decay), and
            "inverse", lr / (1 + t / decay), for runs of any length, or "linear",
            lr (1 - t / decay) but at least lr / 20, for runs of ``decay`` steps.
        relative: steps are compared in units of Adam's rate, so that late steps count as much.
        own_path: chance that a batch of runs that imitates takes the rule's steps, not Adam's.
        coordinates: compare as many coordinates, drawn for each batch of runs; None for all, which
            rules whose coordinates talk to each other need.
        nesterov: Adam looks one step of its momentum ahead (Dozat 2016, algorithm 8, with a
            constant decay).
        cautious: steps against the sign of the gradient at hand are left out (Liang et al. 2024,
            arXiv 2411.16085, algorithm 2, without the rescaling of the others, which is not a
            function of one coordinate: choose ``lr`` half as large again).

    Example:
        >>> Imitation(probability=0.3, decay=300.0).rate(300)
        0.0070...
    """

    probability: float = 0.3
    lr: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    decay: float | None = None
    relative: bool = False
    own_path: float = 0.0
    coordinates: int | None = None
    schedule: str = "inverse_sqrt"
    nesterov: bool = False
    cautious: bool = False

    def __post_init__(self) -> None:
        for name in ("probability", "own_path"):
            check_number(name, getattr(self, name), minimum=0)
            if getattr(self, name) > 1:
                raise ValueError(f"{name} must be at most 1, got {getattr(self, name)!r}")
        check_number("lr", self.lr, minimum=0, exclusive=True)
        if not isinstance(self.betas, tuple) or len(self.betas) != 2:
            raise ValueError(f"betas must be two numbers, got {self.betas!r}")
        for beta in self.betas:
            check_number("betas", beta, minimum=0, below=1)
        if self.decay is not None:
            check_number("decay", self.decay, minimum=0, exclusive=True)
        check_choice("schedule", self.schedule, _SCHEDULES)
        if self.decay is None and self.schedule != _SCHEDULES[0]:
            raise ValueError(
                f"schedule={self.schedule!r} needs decay, the steps over which Adam's rate falls; "
                "without it the rate stays at lr"
            )
        if self.coordinates is not None:
            check_number("coordinates", self.coordinates, minimum=1, integer=True)

    def config(self) -> dict[str, Any]:
        """Constructor arguments, JSON-able."""
        return {**asdict(self), "betas": list(self.betas)}

    def check_rule(self, rule: Rule) -> None:
        """Refuse to pick coordinates of a rule that must see them all.

        Raises:
            ValueError: its coordinates talk to each other.
        """
        if self.coordinates is not None and not isinstance(rule, CoordinateRule):
            raise ValueError(
                f"imitation of {self.coordinates} coordinates alone is for rules whose coordinates "
                f"do not talk to each other, and this one is of family {rule.family!r}; leave "
                "coordinates out"
            )

    def rate(self, count: int) -> float:
        """Adam's rate at its step number ``count`` = 1, 2, ..."""
        if self.decay is None:
            return self.lr
        if self.schedule == "linear":
            return self.lr * max(1 - count / self.decay, _LOWEST_SHARE)
        slower = 1 + count / self.decay
        return self.lr / (slower if self.schedule == "inverse" else math.sqrt(slower))

    def begin(self, rule: Rule, progress: Progress, generator: torch.Generator) -> Lesson:
        """A lesson for runs that start; where only some coordinates follow, so does the state."""
        params = progress.params
        own_path = self.own_path > 0 and float(torch.rand((), generator=generator)) < self.own_path
        picked = None
        if self.coordinates is not None and self.coordinates < params.shape[1]:
            drawn = torch.randperm(params.shape[1], generator=generator)
            picked = drawn[: self.coordinates].sort().values
        lesson = Lesson(params.new_zeros((2, *params.shape)), own_path, picked)
        lesson.begin(rule, progress)
        return lesson

    def window(self, rule: Rule, progress: Progress, lesson: Lesson, steps: int) -> MetaGradient:
        """Go along the lesson's path for ``steps``, in place, and differentiate the misfit."""
        grads, targets, losses = [], [], [progress.losses]
        # On Adam's path the state is advanced by the misfit's own evaluation of the rule.
        state = lesson.of(progress.state).clone() if lesson.own_path else progress.state
        for t in range(steps):
            target = self.adam_step(progress.grads, lesson.moments, progress.step + t + 1)
            grads.append(lesson.of(progress.grads))
            targets.append(lesson.of(target))
            if lesson.own_path:
                step_runs(
                    *(rule, progress.params, progress.grads.contiguous(), progress.state),
                    *(progress.step + t, progress.run.tensor_sizes, 1.0, 0.0),
                )
            else:
                progress.params.add_(target)
            loss, progress.grads = progress.evaluate()
            losses.append(loss)
        units = [self.rate(progress.step + t + 1) if self.relative else 1.0 for t in range(steps)]
        misfit, gradient = _misfit_gradient(
            *(rule, torch.stack(grads), torch.stack(targets), state, progress.step, units),
            progress.run.tensor_sizes if lesson.picked is None else (len(lesson.picked),),
        )
        progress.step += steps
        progress.losses = losses[-1].clone()
        return MetaGradient(misfit, gradient, torch.stack(losses))

    def adam_step(self, grads: Tensor, moments: Tensor, count: int) -> Tensor:
        """Adam's step, of the shape of ``grads``, at its step number ``count`` = 1, 2, ...

        Args:
            grads: any shape.
            moments: Adam's two, ``(2, *grads.shape)``, zero at first; advanced in place.

        Example:
            >>> grads, moments = torch.tensor([2.0, -0.5]), torch.zeros(2, 2)
            >>> Imitation(lr=0.01).adam_step(grads, moments, 1)
            tensor([-0.0100,  0.0100])
        """
        beta1, beta2 = self.betas
        moments[0].lerp_(grads, 1 - beta1)
        moments[1].lerp_(grads.square(), 1 - beta2)
        denominator = (moments[1] / (1 - beta2**count)).sqrt_().add_(_EPS)
        mean = moments[0] / (1 - beta1**count)
        if self.nesterov:
            mean = moments[0] * (beta1 / (1 - beta1 ** (count + 1)))
            mean.add_(grads, alpha=(1 - beta1) / (1 - beta1**count))
        if self.cautious:
            mean = torch.where(mean * grads > 0, mean, 0.0)
        return mean / denominator * -self.rate(count)


def _misfit_gradient(
    rule: Rule,
    grads: Tensor,
    targets: Tensor,
    state: Tensor,
    first_step: int,
    units: list[float],
    sizes: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Misfit (0-dim) and its gradient (M,); advances ``state``.

    ``grads`` and ``targets`` are ``(T, R, n)``, n the sum of ``sizes``; step t is measured in
    ``units[t]``.
    """
    steps, count = grads.shape[0], grads[0].numel()
    before, updates = state.clone(), torch.zeros_like(grads)
    with torch.no_grad():
        for t in range(steps):
            step_runs(rule, updates[t], grads[t], state, first_step + t, sizes, 1.0, 0.0)
    unit = grads.new_tensor(units).view(-1, 1, 1)
    apart = (updates - targets) / unit
    gradient, d_state = ops.unroll_backward(
        rule,
        grads,
        before,
        steps=steps,
        step=first_step,
        sizes=sizes,
        d_updates=apart / unit / count,
    )
    if rule.learned_start and first_step == 0:
        gradient = gradient + rule.start_gradient(d_state, sizes)
    return apart.square().sum() * (0.5 / count), gradient
