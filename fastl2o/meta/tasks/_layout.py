"""How a network's tensors lie in the flat parameters of a run, and where they start."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import check_num_runs

__all__ = ["Layout", "Slot", "affine"]


class Slot(NamedTuple):
    """One tensor: its shape, and initial values of U(centre - bound, centre + bound)."""

    shape: tuple[int, ...]
    bound: float = 0.0
    centre: float = 0.0


def affine(n_out: int, n_in: int, *kernel: int) -> tuple[Slot, Slot]:
    """Weight ``(out, in, *kernel)`` and bias, initialised as ``nn.Linear`` and ``nn.Conv`` do."""
    bound = 1 / math.sqrt(n_in * math.prod(kernel))
    return Slot((n_out, n_in, *kernel), bound), Slot((n_out,), bound)


class Layout:
    """Tensors one after the other, in the order of the module's ``parameters()``.

    Example:
        >>> layout = Layout(affine(3, 5))
        >>> params = layout.draw(2, torch.Generator().manual_seed(0), torch.float32)
        >>> [tuple(tensor.shape) for tensor in layout.split(params)]
        [(2, 3, 5), (2, 3)]
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.slots = tuple(slots)
        self.sizes = tuple(math.prod(slot.shape) for slot in self.slots)

    @property
    def dim(self) -> int:
        """Number of coordinates of one run."""
        return sum(self.sizes)

    def split(self, params: Tensor) -> list[Tensor]:
        """Views ``(R, *shape)`` of ``params (R, D)``."""
        # One split, not a slice for each: its backward is one concatenation.
        pieces = params.split(self.sizes, dim=1)
        return [
            piece.unflatten(1, slot.shape) for piece, slot in zip(pieces, self.slots, strict=True)
        ]

    def draw(self, num_runs: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        """Initial parameters ``(R, D)``."""
        check_num_runs(num_runs)
        params = torch.rand(num_runs, self.dim, generator=generator, dtype=dtype)
        for piece, slot in zip(params.split(self.sizes, dim=1), self.slots, strict=True):
            piece.mul_(2 * slot.bound).add_(slot.centre - slot.bound)
        return params
