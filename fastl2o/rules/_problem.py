"""What a hierarchical rule keeps of the tensors that it optimizes together."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ._base import check_number
from ._hierarchy import LOG_RATE_LIMIT

# Initial learning rates lie between these unless a rule says otherwise.
LOWEST_RATE, HIGHEST_RATE = 1e-6, 1e-2


def check_rates(lowest: object, highest: object) -> tuple[float, float]:
    """Return two rates, the first at most the second, else raise naming the argument."""
    low, high = math.exp(-LOG_RATE_LIMIT), math.exp(LOG_RATE_LIMIT)
    least = check_number("lowest_rate", lowest, f"from {low:.2g} to {high:.2g}", low, high)
    accepted = f"from lowest_rate = {least} to {high:.2g}"
    return least, check_number("highest_rate", highest, accepted, least, high)


class ProblemState(NamedTuple):
    """State of all tensors that are optimized together.

    Attributes:
        planes: of each tensor, `(state_planes, *shape)`: the parameter GRU's h, then the gradient's
            averages, their squares, the log learning rate and, with attention, how far the
            parameters are ahead.
        tensors: of each tensor, `(tensor_size + 1,)`: the tensor GRU's k, then the mean of the
            tensor's log rates.
        steps: of each tensor, the steps it has taken.
        hidden: the global GRU's z, `(global_size,)`.
    """

    planes: list[Tensor]
    tensors: list[Tensor]
    steps: list[int]
    hidden: Tensor


class Sweep(NamedTuple):
    """What the first half of a step leaves of a tensor, or of a part of one.

    Attributes:
        raw: the step exp(log rate + o) d before it is normalised, shaped like the gradient.
        planes: the new planes; with attention, the last is exp(log rate) d_att, not yet normalised.
        sums: over the coordinates, `(num_sums,)`: the new h, the features, d^2, the new log rate
            and, with attention, d_att^2.
    """

    raw: Tensor
    planes: Tensor
    sums: Tensor


def draw_log_rates(
    shape: torch.Size, lowest: float, highest: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Initial log rates of a tensor, on the CPU, and their offset.

    An offset for the tensor plus a number for each element, both uniform between half the
    logarithms of the rates ``lowest`` and ``highest``. In float32: other dtypes would draw other
    numbers.
    """
    bounds = (0.5 * math.log(lowest), 0.5 * math.log(highest))
    offset = torch.empty((), dtype=torch.float32).uniform_(*bounds, generator=generator)
    rates = torch.empty(shape, dtype=torch.float32).uniform_(*bounds, generator=generator)
    return rates + offset, offset
