"""Schedules of meta-training: how long runs are, and how the meta-optimizer's rate moves.

They are pure functions of the outer step, so that a resumed training needs only that number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ._checks import check_choice, check_number
from ._draws import check_range, draw_log_uniform

__all__ = ["Curriculum", "Exponential", "Horizon", "LRSchedule", "draw_horizon"]


@dataclass(frozen=True)
class Exponential:
    """A number of steps, ``minimum`` + round(Exp(mean)), at most ``maximum``.

    How the hierarchical rule's authors draw the lengths of runs and of unrolls
    (arXiv 1703.04813, released code).

    Args:
        mean: of the exponential part, before it is cut at ``maximum``.
        minimum, maximum: bounds.

    Example:
        >>> draw_horizon(Exponential(20, 10, 100), 0, torch.Generator().manual_seed(0))
        80
    """

    mean: float
    minimum: int
    maximum: int

    def __post_init__(self) -> None:
        check_number("mean", self.mean, minimum=0, exclusive=True)
        check_number("minimum", self.minimum, minimum=1, integer=True)
        check_number("maximum", self.maximum, minimum=self.minimum, integer=True)


Range = int | tuple[int, int] | Exponential


@dataclass(frozen=True)
class Curriculum:
    """Horizons by stage.

    ``stages`` are (first outer step, horizon) pairs, the first of them at outer step 0.

    A horizon is an int, a (low, high) pair that is drawn log-uniformly, or an ``Exponential``. A
    batch of runs keeps the horizon of the stage in which it starts.

    Example:
        >>> Curriculum(((0, 100), (2000, 500), (4000, (100, 2000)))).horizon(2500)
        500
    """

    stages: tuple[tuple[int, Range], ...]

    def __post_init__(self) -> None:
        firsts = [first for first, _ in self.stages]
        if not firsts or firsts[0] != 0 or firsts != sorted(set(firsts)):
            raise ValueError(
                "stages must be (first outer step, horizon) pairs whose first steps rise from 0, "
                f"got {self.stages!r}"
            )
        for _, horizon in self.stages:
            _check_range(horizon)

    def horizon(self, outer_step: int) -> Range:
        """The horizon, or its range, of runs that start at ``outer_step``."""
        return [horizon for first, horizon in self.stages if first <= outer_step][-1]


Horizon = Range | Curriculum


def as_horizon(horizon: Any, name: str = "horizon") -> Horizon:
    """Check a horizon, or a length of unrolls by that name.

    An int, a (low, high) pair, an ``Exponential`` or the dictionary of its arguments, a
    ``Curriculum`` or a list of its stages.
    """
    if isinstance(horizon, Curriculum):
        return horizon
    if isinstance(horizon, Mapping):
        try:
            return Exponential(**horizon)
        except TypeError:
            raise ValueError(
                f"{name} as a table must hold mean, minimum and maximum, got {dict(horizon)!r}"
            ) from None
    if isinstance(horizon, Sequence) and not isinstance(horizon, str):
        if horizon and all(isinstance(stage, Sequence) and len(stage) == 2 for stage in horizon):
            stages = tuple(
                (int(first), tuple(h) if isinstance(h, Sequence) else h) for first, h in horizon
            )
            return Curriculum(stages)
        horizon = tuple(horizon)
    _check_range(horizon, name)
    checked: Range = horizon
    return checked


def _check_range(horizon: Any, name: str = "horizon") -> None:
    if isinstance(horizon, tuple):
        check_range(name, horizon)
    elif not isinstance(horizon, Exponential):
        check_number(name, horizon, minimum=1, integer=True)


def draw_horizon(horizon: Horizon, outer_step: int, generator: torch.Generator) -> int:
    """The number of inner steps of a batch of runs that starts at ``outer_step``."""
    range_ = horizon.horizon(outer_step) if isinstance(horizon, Curriculum) else horizon
    if isinstance(range_, int):
        return range_
    if isinstance(range_, Exponential):
        uniform = float(torch.rand((), generator=generator, dtype=torch.float64))
        drawn = range_.minimum + round(-range_.mean * math.log1p(-uniform))
        return min(range_.maximum, drawn)
    return draw_log_uniform(*range_, generator)


def longest(horizon: Horizon) -> int:
    """The longest run that a horizon can give."""
    if isinstance(horizon, Curriculum):
        return max(longest(stage) for _, stage in horizon.stages)
    if isinstance(horizon, Exponential):
        return horizon.maximum
    return horizon if isinstance(horizon, int) else horizon[1]


@dataclass(frozen=True)
class LRSchedule:
    """Factor on the meta-optimizer's rate.

    Linear warm-up over ``warmup`` outer steps, then ``kind`` down to ``final``.

    Args:
        kind: ``"constant"``, ``"linear"``, ``"cosine"`` or ``"exponential"``.
        total: outer steps at which the factor reaches ``final``; it stays there.
        final: last factor; not used by ``"constant"``.
        warmup: outer steps of linear warm-up from 0.

    Example:
        >>> LRSchedule("cosine", total=100)(50)
        0.5
    """

    kind: str = "constant"
    total: int = 1
    final: float = 0.0
    warmup: int = 0

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, ("constant", "linear", "cosine", "exponential"))
        check_number("total", self.total, minimum=1, integer=True)
        check_number("final", self.final, minimum=0, exclusive=self.kind == "exponential")
        check_number("warmup", self.warmup, minimum=0, integer=True)

    def __call__(self, outer_step: int) -> float:
        """The factor at ``outer_step`` (0-based)."""
        if outer_step < self.warmup:
            return (outer_step + 1) / (self.warmup + 1)
        if self.kind == "constant":
            return 1.0
        done = min(1.0, (outer_step - self.warmup) / max(1, self.total - self.warmup))
        if self.kind == "linear":
            return 1.0 + (self.final - 1.0) * done
        if self.kind == "cosine":
            return self.final + (1.0 - self.final) * (1.0 + math.cos(math.pi * done)) / 2
        return math.exp(math.log(self.final) * done)
