"""What is read off losses: means, steps to a loss, gaps at a loss, distances."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Spread",
    "gap_at_level",
    "log_spaced",
    "majority",
    "mean_std",
    "nan_last",
    "normalised_distance",
    "pick_learning_rate",
    "steps_to_reach",
    "trailing_mean",
]


class Spread(NamedTuple):
    """Mean and standard deviation over runs.

    Example:
        >>> str(Spread(mean=0.25, std=0.01))
        '0.25 ±0.01'
    """

    mean: float
    std: float

    def __str__(self) -> str:
        return f"{self.mean:.4g} ±{self.std:.2g}"


def mean_std(values: Tensor) -> Spread:
    """Mean and standard deviation (unbiased; 0 for a single value) of ``values (R,)``.

    Example:
        >>> mean_std(torch.tensor([1.0, 3.0]))
        Spread(mean=2.0, std=1.4142135623730951)
    """
    exact = values.double()
    std = exact.std().item() if len(exact) > 1 else 0.0
    return Spread(exact.mean().item(), std)


def nan_last(value: float) -> float:
    """``value``, or infinity for NaN: for orders in which smaller is better."""
    return math.inf if math.isnan(value) else value


def pick_learning_rate(scores: Mapping[float, float]) -> float:
    """The rate with the smallest score; scores that are not finite count as infinitely bad.

    Example:
        >>> pick_learning_rate({0.1: 2.0, 1.0: 1.0, 10.0: float("nan")})
        1.0
    """
    return min(scores, key=lambda lr: nan_last(scores[lr]))


def log_spaced(horizon: int, per_decade: int = 10) -> tuple[int, ...]:
    """0, the horizon, and steps between them that grow geometrically.

    Example:
        >>> log_spaced(100, per_decade=3)
        (0, 1, 2, 5, 10, 22, 46, 100)
    """
    count = math.floor(per_decade * math.log10(horizon)) if horizon > 1 else 0
    steps = {round(10 ** (k / per_decade)) for k in range(count + 1)}
    return tuple(sorted({0, horizon, *(step for step in steps if step <= horizon)}))


def trailing_mean(losses: Tensor, window: int) -> Tensor:
    """Means of ``window`` consecutive losses, ``(P - window + 1, R)`` float64, of ``(P, R)``."""
    return losses.double().unfold(0, window, 1).mean(-1)


def steps_to_reach(losses: Tensor, targets: Tensor, window: int = 1) -> Tensor:
    """First step at which the mean of the last ``window`` losses is at most the target.

    Minibatch losses are noisy: a single one at the target says little, hence the window; no step
    before the first whole window counts.

    Args:
        losses: ``(horizon + 1, R)``.
        targets: ``(R,)``, one for each run; one that is not finite is reached by nobody.

    Returns:
        ``(R,)`` float64, infinity for runs that never get there.

    Example:
        >>> losses = torch.tensor([[4.0, 4.0], [2.0, 3.0], [1.0, 3.0]])
        >>> steps_to_reach(losses, torch.tensor([2.5, 2.5])).tolist()
        [1.0, inf]
    """
    there = (trailing_mean(losses, window) <= targets) & targets.isfinite()
    first = (there.int().argmax(0) + window - 1).double()
    return torch.where(there.any(0), first, math.inf)


def majority(values: Tensor) -> float:
    """The smallest of ``values (R,)`` that more than half of them do not exceed.

    The median for odd R, the upper of the two middle values for even R; never an average, so that
    values may be infinite.

    Example:
        >>> majority(torch.tensor([3.0, 1.0, float("inf"), 2.0]))
        3.0
    """
    return values.sort().values[len(values) // 2].item()


def gap_at_level(train: Tensor, test: Tensor, levels: Tensor) -> Tensor:
    """Test minus training loss where the training loss first falls to a level.

    Between the points the losses are linear. ``train`` and ``test`` are ``(P, R)``, ``levels``
    ``(R,)``; returns ``(R,)``, NaN for runs that never get there.

    Example:
        >>> train, test = torch.tensor([[4.0], [2.0]]), torch.tensor([[4.0], [3.0]])
        >>> gap_at_level(train, test, torch.tensor([3.0])).item()
        0.5
    """
    there = train <= levels
    first = there.int().argmax(0)
    before = (first - 1).clamp(min=0)

    def at(values: Tensor, index: Tensor) -> Tensor:
        return values.double().gather(0, index.unsqueeze(0)).squeeze(0)

    high, low = at(train, before), at(train, first)
    # At the first point there is nothing to interpolate from: its own gap stands.
    share = torch.where(first > 0, (high - levels) / (high - low), 1.0)
    gap = torch.lerp(at(test - train, before), at(test - train, first), share)
    return torch.where(there.any(0), gap, math.nan)


def normalised_distance(one: Tensor, other: Tensor) -> Tensor:
    """sqrt(|w - w'|^2 / (|w|^2 + |w'|^2)) of parameters ``(R, D)``, ``(R,)`` float64.

    The distance in the experiments of arXiv 1509.01240; 0 where both are zero.

    Example:
        >>> one, other = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]])
        >>> normalised_distance(one, other).item()
        1.0
    """
    one, other = one.double(), other.double()
    size = one.square().sum(1) + other.square().sum(1)
    ratio = (one - other).square().sum(1) / size
    return torch.where(size == 0, 0.0, ratio).sqrt()
