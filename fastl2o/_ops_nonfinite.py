"""The op that looks for NaN and Inf in gradients before a step changes anything."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from ._ops_families import Named, define


def _default(named: Named) -> None:
    grads: list[Tensor] = named["grads"]
    filled = [grad for grad in grads if grad.numel()]
    index = -1
    # one wait for a GPU where all is well, which it nearly always is
    if filled and not get_total_norm(filled, norm_type=float("inf")).isfinite():
        index = next(i for i, grad in enumerate(grads) if not grad.isfinite().all())
    named["found"].fill_(index)


_FIRST_NONFINITE = define(
    "first_nonfinite_",
    "(Tensor[] grads, Tensor(a!) found) -> ()",
    _default,
    lambda named: None,
    _default,
)


def scratch() -> Tensor:
    """What `first_nonfinite` writes its result to: keep it, and no call allocates on the CPU."""
    return torch.empty((), dtype=torch.int64)


def first_nonfinite(grads: Sequence[Tensor], found: Tensor) -> int | None:
    """Return the index of the first of some real gradients that holds NaN or Inf, or None.

    Args:
        grads: of any floating dtype, layout in memory and device.
        found: from `scratch`.
    """
    if not grads:
        return None
    if all(grad.is_contiguous() for grad in grads):
        _FIRST_NONFINITE(grads, found)
    else:
        _default({"grads": grads, "found": found})
    index = int(found)
    return None if index < 0 else index
