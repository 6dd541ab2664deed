"""Parameters that are split over ranks (DTensor, as FSDP2 makes them).

Each rank steps the parts that it holds. Coordinate-wise rules need nothing else; a hierarchical
rule adds up its sums over the ranks, once a step; and ranks agree on which gradients hold NaN or
Inf, where the policy asks for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor


def is_split(tensor: Any) -> bool:
    """Whether a tensor is a DTensor; torch.distributed need not be there."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds, sharing its memory."""
    return tensor.to_local() if is_split(tensor) else tensor  # type: ignore[attr-defined]


def placement_problem(param: Any, grad: Any) -> str | None:
    """Return what keeps a DTensor from being stepped in parts, or None."""
    from torch.distributed.tensor import Replicate, Shard

    if any(type(placement) not in (Shard, Replicate) for placement in param.placements):
        return (
            f"is a DTensor placed as {param.placements}. Accepted are Shard and Replicate: "
            "redistribute it"
        )
    if param.is_complex():
        return "is a complex DTensor, which is not supported. Train its real view"
    if not is_split(grad) or grad.placements != param.placements:
        found = grad.placements if is_split(grad) else "a plain tensor"
        return (
            f"is placed as {param.placements}, its gradient as {found}. They must be alike: "
            "redistribute p.grad before step()"
        )
    return None


def part_of(whole: Tensor, param: Any, ahead: int = 0) -> Tensor:
    """This rank's part of a plain tensor shaped like ``param`` behind ``ahead`` dimensions."""
    mesh = param.device_mesh
    for mesh_dim, placement in enumerate(param.placements):
        if placement.is_shard():
            dim = placement.dim + ahead
            size, ranks = whole.shape[dim], mesh.size(mesh_dim)
            length = -(-size // ranks)
            start = min(length * mesh.get_local_rank(mesh_dim), size)
            whole = whole.narrow(dim, start, min(length, size - start))
    return whole


def planes_of(parts: Tensor, param: Any) -> Tensor:
    """The state of a DTensor from this rank's planes ``(S, *local shape)``: split like it."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    placements = [
        Shard(placement.dim + 1) if placement.is_shard() else Replicate()
        for placement in param.placements
    ]
    shape = torch.Size((parts.shape[0], *param.shape))
    strides = [1, *accumulate(reversed(shape[1:]), lambda a, b: a * b)]
    return DTensor.from_local(
        parts,
        param.device_mesh,
        placements,
        run_check=False,
        shape=shape,
        stride=tuple(reversed(strides)),
    )


def _sharing(params: Sequence[Tensor]) -> dict[tuple[Any, ...], list[int]]:
    """Indices of the split ones, by the mesh dimensions over which they are split."""
    sharing: dict[tuple[Any, ...], list[int]] = {}
    for index, param in enumerate(params):
        if is_split(param):
            mesh: Any = param.device_mesh  # type: ignore[attr-defined]
            placements = enumerate(param.placements)  # type: ignore[attr-defined]
            dims = tuple(dim for dim, placement in placements if placement.is_shard())
            if dims:
                sharing.setdefault((mesh, dims), []).append(index)
    return sharing


def all_reduce(rows: Tensor, params: Sequence[Tensor], *, largest: bool = False) -> None:
    """Add up (or take the largest of) each split parameter's row over its parts, in place.

    One collective where all are split over the same dimension of one mesh. The rows of parameters
    that every rank holds in full stay as they are.
    """
    from torch.distributed import ReduceOp
    from torch.distributed import all_reduce as over_ranks

    for (mesh, dims), indices in _sharing(params).items():
        everything = len(indices) == len(params)
        mine = rows if everything else rows[indices]
        for dim in dims:
            over_ranks(mine, ReduceOp.MAX if largest else ReduceOp.SUM, mesh.get_group(dim))
        if not everything:
            rows[indices] = mine


def nonfinite_flags(params: Sequence[Tensor], grads: Sequence[Tensor]) -> list[bool]:
    """Whether each gradient holds NaN or Inf on any rank: the same answer on all of them."""
    parts = [local(grad) for grad in grads]
    flags = torch.stack([(~part.isfinite()).any() for part in parts]).to(torch.int32)
    all_reduce(flags, params, largest=True)
    return [bool(flag) for flag in flags.tolist()]
