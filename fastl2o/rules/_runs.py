"""The hierarchical rule's state of a batch of runs, packed into one row of numbers a run.

A row of a run whose D coordinates are tensors of the given sizes holds each tensor's planes
`(state_planes, size)`, one tensor after the other, then each tensor's `(tensor_size + 1,)`, then
the global state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .hierarchical import HierarchicalRule, ProblemState


def widths(rule: HierarchicalRule, sizes: Sequence[int]) -> list[int]:
    """Lengths of the parts of a row, in order."""
    return [
        *(rule.state_planes * size for size in sizes),
        *([rule.tensor_size + 1] * len(sizes)),
        rule.global_size,
    ]


def views(
    rule: HierarchicalRule, row: Tensor, sizes: Sequence[int]
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Planes `(state_planes, size)` and tensor state of each tensor, and the global state."""
    parts = row.split(widths(rule, sizes))
    count = len(sizes)
    planes = [
        part.view(rule.state_planes, size) for part, size in zip(parts[:count], sizes, strict=True)
    ]
    return planes, list(parts[count:-1]), parts[-1]


def start_views(
    rule: HierarchicalRule, row: Tensor, sizes: Sequence[int]
) -> Iterator[tuple[str, Tensor]]:
    """The parts `(H, n)` of a row that start as n copies of a meta-parameter `(H,)`, and which."""
    planes, tensors, hidden = views(rule, row, sizes)
    for plane, tensor in zip(planes, tensors, strict=True):
        yield "param_start", plane[: rule.param_size]
        yield "tensor_start", tensor[:-1, None]
    yield "global_start", hidden[:, None]


def pack(state: ProblemState) -> Tensor:
    """The row of a problem's state."""
    planes = [planes.reshape(-1) for planes in state.planes]
    return torch.cat([*planes, *state.tensors, state.hidden])
