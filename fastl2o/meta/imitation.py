"""Imitation: teach a rule by showing it Adam's steps (Chen et al. 2020, arXiv 2010.09089)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import ops
from ._checks import check_number
from .estimators import MetaGradient
from .unroll import Progress

if TYPE_CHECKING:
    from ..rules import Rule

__all__ = ["Imitation"]

_BETA1, _BETA2, _EPS = 0.9, 0.999, 1e-8  # Adam's defaults, as the authors use
# Coordinates whose unrolled graph is held at a time: 16 k x 20 steps x 80 floats are about 100 MB.
_BLOCK = 16_384


@dataclass(frozen=True)
class Imitation:
    """Some batches of runs follow Adam, and the rule is fitted to Adam's steps.

    The gradients seen along Adam's path are fed to the rule; the loss of a step is
    1/2 mean over coordinates of (Adam's step - rule's step)^2, summed over the window, mean over
    the runs.

    Args:
        probability: chance that a batch of runs imitates.
        lr: Adam's rate, 0.01 in the paper's code.

    Example:
        >>> Imitation(probability=0.3)
        Imitation(probability=0.3, lr=0.01)
    """

    probability: float = 0.3
    lr: float = 0.01

    def __post_init__(self) -> None:
        check_number("probability", self.probability, minimum=0)
        if self.probability > 1:
            raise ValueError(f"probability must be at most 1, got {self.probability!r}")
        check_number("lr", self.lr, minimum=0, exclusive=True)

    def config(self) -> dict[str, Any]:
        """Constructor arguments, JSON-able."""
        return asdict(self)

    def moments(self, progress: Progress) -> Tensor:
        """Adam's two moments for runs that start, ``(2, R, D)``."""
        return progress.params.new_zeros((2, *progress.params.shape))

    def window(self, rule: Rule, progress: Progress, moments: Tensor, steps: int) -> MetaGradient:
        """Follow Adam for ``steps`` steps, in place, and differentiate the rule's misfit."""
        grads, targets, losses = [], [], [progress.losses]
        for t in range(steps):
            grads.append(progress.grads)
            targets.append(self._adam_step(progress.grads, moments, progress.step + t + 1))
            progress.params.add_(targets[-1])
            loss, progress.grads = progress.run.loss_and_grad(
                progress.params, progress.run.next_batch()
            )
            losses.append(loss)
        misfit, gradient = _misfit_gradient(
            rule, torch.stack(grads), torch.stack(targets), progress
        )
        progress.step += steps
        progress.losses = losses[-1].clone()
        return MetaGradient(misfit, gradient, torch.stack(losses))

    def _adam_step(self, grads: Tensor, moments: Tensor, count: int) -> Tensor:
        moments[0].lerp_(grads, 1 - _BETA1)
        moments[1].lerp_(grads.square(), 1 - _BETA2)
        denominator = (moments[1] / (1 - _BETA2**count)).sqrt_().add_(_EPS)
        return moments[0] / denominator * (-self.lr / (1 - _BETA1**count))


def _misfit_gradient(
    rule: Rule, grads: Tensor, targets: Tensor, progress: Progress
) -> tuple[Tensor, Tensor]:
    """Misfit (0-dim) and its gradient (M,); advances ``progress.state``.

    ``grads`` and ``targets`` are ``(T, R, D)``.

    The rule acts on every coordinate alone, so blocks of coordinates are differentiated one after
    the other.
    """
    rule = ops.coordinate_wise(rule)
    meta = rule.flat_parameters().detach().requires_grad_()
    steps, count = grads.shape[0], grads[0].numel()
    flat_grads, flat_targets = grads.reshape(steps, count), targets.reshape(steps, count)
    flat_state = progress.state.view(progress.state.shape[0], count)
    total, gradient = meta.new_zeros(()), torch.zeros_like(meta)
    for begin in range(0, count, _BLOCK):
        block = slice(begin, begin + _BLOCK)
        state, misfit = flat_state[:, block].contiguous(), meta.new_zeros(())
        for t in range(steps):
            inputs = flat_grads[t, block].contiguous()
            update, state = ops.step(rule, inputs, state, progress.step + t, meta)
            misfit = misfit + (flat_targets[t, block] - update).square().sum() * (0.5 / count)
        gradient += torch.autograd.grad(misfit, meta)[0]
        total += misfit.detach()
        flat_state[:, block] = state.detach()
    return total, gradient
