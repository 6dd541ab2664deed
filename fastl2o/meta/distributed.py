"""Data-parallel meta-training: several processes share the windows of each outer step."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Ranks", "from_torchrun"]


class Ranks:
    """The processes of a training: those of torch.distributed's default group, or this one alone.

    Attributes:
        size: their number.
        rank: this one's place.
    """

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.size = dist.get_world_size() if together else 1
        self.rank = dist.get_rank() if together else 0

    @property
    def main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def gather(self, rows: Tensor) -> Tensor:
        """All processes' rows, in order: row i of the result is row i // size of process i % size.

        Args:
            rows: ``(n, width)``, as many in every process.
        """
        if self.size == 1:
            return rows
        everyone = [torch.empty_like(rows) for _ in range(self.size)]
        dist.all_gather(everyone, rows.contiguous())
        return torch.stack(everyone, dim=1).flatten(0, 1)

    def collect(self, items: dict[int, Any]) -> dict[int, Any]:
        """The union of all processes' items in the main one; elsewhere, this process's own."""
        if self.size == 1:
            return items
        everyone: list[Any] | None = [None] * self.size if self.main else None
        dist.gather_object(items, everyone)
        return items if everyone is None else {k: v for part in everyone for k, v in part.items()}

    def agree(self, value: Any) -> Any:
        """The main process's value, in all of them; what the others give is not looked at."""
        if self.size == 1:
            return value
        shared = [value]
        dist.broadcast_object_list(shared, 0)
        return shared[0]


@contextmanager
def from_torchrun() -> Iterator[Ranks]:
    """The processes that ``torchrun`` started, joined while the block runs, or this one alone.

    Example:
        >>> with from_torchrun() as ranks:
        ...     ranks.size
        1
    """
    started = "TORCHELASTIC_RUN_ID" in os.environ and dist.is_available()
    if not started or dist.is_initialized():
        yield Ranks()
        return
    # Meta-gradients are gathered on the CPU, whichever device the runs are on.
    dist.init_process_group("gloo")
    try:
        yield Ranks()
    finally:
        dist.destroy_process_group()
