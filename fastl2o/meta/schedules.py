"""Schedules of meta-training: how long runs are, and how the meta-optimizer's rate moves.

They are pure functions of the outer step, so that a resumed training needs only that number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ._checks import check_choice, check_number

__all__ = ["Curriculum", "Horizon", "LRSchedule", "draw_horizon"]

Range = int | tuple[int, int]


@dataclass(frozen=True)
class Curriculum:
    """Horizons by stage.

    ``stages`` are (first outer step, horizon) pairs, the first of them at outer step 0.

    A horizon is an int, or a (low, high) pair that is drawn log-uniformly. A batch of runs keeps
    the horizon of the stage in which it starts.

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


def as_horizon(horizon: Any) -> Horizon:
    """Check a horizon: an int, a (low, high) pair, a ``Curriculum`` or a list of its stages."""
    if isinstance(horizon, Curriculum):
        return horizon
    if isinstance(horizon, Sequence) and not isinstance(horizon, str):
        if horizon and all(isinstance(stage, Sequence) and len(stage) == 2 for stage in horizon):
            stages = tuple(
                (int(first), tuple(h) if isinstance(h, Sequence) else h) for first, h in horizon
            )
            return Curriculum(stages)
        horizon = tuple(horizon)
    _check_range(horizon)
    checked: Range = horizon
    return checked


def _check_range(horizon: Any) -> None:
    if isinstance(horizon, tuple):
        if len(horizon) != 2:
            raise ValueError(f"horizon must be an int or a (low, high) pair, got {horizon!r}")
        for bound in horizon:
            check_number("horizon", bound, minimum=1, integer=True)
        if horizon[0] > horizon[1]:
            raise ValueError(f"horizon (low, high) must have low <= high, got {horizon!r}")
    else:
        check_number("horizon", horizon, minimum=1, integer=True)


def draw_horizon(horizon: Horizon, outer_step: int, generator: torch.Generator) -> int:
    """The number of inner steps of a batch of runs that starts at ``outer_step``."""
    range_ = horizon.horizon(outer_step) if isinstance(horizon, Curriculum) else horizon
    if isinstance(range_, int):
        return range_
    low, high = range_
    uniform = float(torch.rand((), generator=generator, dtype=torch.float64))
    return min(high, int(low * ((high + 1) / low) ** uniform))


def longest(horizon: Horizon) -> int:
    """The longest run that a horizon can give."""
    stages: tuple[Range, ...] = (
        tuple(h for _, h in horizon.stages) if isinstance(horizon, Curriculum) else (horizon,)
    )
    return max(h if isinstance(h, int) else h[1] for h in stages)


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
