"""Meta-losses: what of a window's losses a rule is trained to make small."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["OBJECTIVES", "loss_weights", "per_run"]

# Added to losses under the logarithm: far below any loss of interest, and log stays finite at an
# exact zero.
_LOG_EPS = 1e-8


def _sum(losses: Tensor, first: Tensor) -> Tensor:
    return losses.sum(dim=0)


def _weighted(losses: Tensor, first: Tensor) -> Tensor:
    times = torch.arange(1, len(losses) + 1, dtype=losses.dtype, device=losses.device)
    return (times / len(losses)) @ losses


def _final(losses: Tensor, first: Tensor) -> Tensor:
    return losses[-1]


def _log(losses: Tensor, first: Tensor) -> Tensor:
    return torch.log((losses + _LOG_EPS) / (first + _LOG_EPS)).mean(dim=0)


def _best(losses: Tensor, first: Tensor) -> Tensor:
    return losses.amin(dim=0)


OBJECTIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": _sum,
    "weighted": _weighted,
    "final": _final,
    "log": _log,
    "best": _best,
}


def per_run(objective: str, losses: Tensor, first: Tensor, final_term: bool = True) -> Tensor:
    """The meta-loss of each run.

    Of a window theta_0 .. theta_T:

    - ``"sum"``: f_1 + ... + f_T (f_0 does not depend on the rule within the window);
    - ``"weighted"``: the same, f_t weighed by t / T;
    - ``"final"``: f_T alone;
    - ``"log"``: the mean over t of log((f_t + 1e-8) / (f at the run's start + 1e-8)), which weighs
      late, small losses as much as early, large ones and does not depend on the loss's scale;
    - ``"best"``: the smallest of f_1 .. f_T.

    Args:
        objective: one of these.
        losses: ``(T + 1, R)``, f_0 .. f_T.
        first: ``(R,)``, losses at the runs' start.
        final_term: whether f_T counts, unless it is the only one.

    Returns:
        ``(R,)``, differentiable.
    """
    counted = losses[1:] if final_term or len(losses) == 2 else losses[1:-1]
    return OBJECTIVES[objective](counted, first)


def loss_weights(objective: str, losses: Tensor, first: Tensor, final_term: bool = True) -> Tensor:
    """The derivatives ``(T + 1, R)`` of the meta-loss, the mean over the runs, by the losses."""
    with torch.enable_grad():
        leaf = losses.detach().requires_grad_()
        total = per_run(objective, leaf, first, final_term).mean()
        (weights,) = torch.autograd.grad(total, leaf)
    return weights
