"""Numbers that meta-training draws: checked ranges, and log-uniform integers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ._checks import check_number

__all__ = ["as_range", "check_range", "draw_log_uniform"]


def check_range(name: str, bounds: tuple[Any, ...]) -> None:
    """Refuse ``bounds`` unless they are two ints, 1 <= low <= high."""
    if len(bounds) != 2:
        raise ValueError(f"{name} must be an int or a (low, high) pair, got {bounds!r}")
    for bound in bounds:
        check_number(name, bound, minimum=1, integer=True)
    if bounds[0] > bounds[1]:
        raise ValueError(f"{name} (low, high) must have low <= high, got {bounds!r}")


def as_range(name: str, given: Any) -> tuple[int, int]:
    """An int, or a (low, high) pair of ints, as a checked pair."""
    is_pair = isinstance(given, Sequence) and not isinstance(given, str)
    bounds = tuple(given) if is_pair else (given, given)
    check_range(name, bounds)
    return bounds[0], bounds[1]


def draw_log_uniform(low: int, high: int, generator: torch.Generator) -> int:
    """An int from ``low`` to ``high``, both included, whose logarithm is nearly uniform."""
    uniform = float(torch.rand((), generator=generator, dtype=torch.float64))
    return min(high, int(low * ((high + 1) / low) ** uniform))
