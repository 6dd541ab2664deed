"""Which gradients hold NaN or Inf, found before a step changes anything."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from ._optim_state import describe_param

if TYPE_CHECKING:
    from ._optim_plan import Groups, Plan


def unchecked(plan: Plan, groups: Groups) -> list[int]:
    """Return which gradients no list op can refuse in time, so must be checked beforehand.

    A step that raises changes nothing. The op of the first bucket sees to that for its own
    tensors; other buckets would come too late, and states must not be created first.
    """
    if plan.missing:
        indices = list(range(len(plan.active)))
    else:
        indices = [i for bucket in plan.buckets[1:] for i in bucket.where]
    return [i for i in indices if groups[plan.owners[i][0]]["nonfinite"] == "raise"]


def first_nonfinite(grads: list[Tensor]) -> int | None:
    """Return the index of the first gradient that holds NaN or Inf, or None."""
    real = [torch.view_as_real(g.resolve_conj()) if g.is_complex() else g for g in grads]
    filled = [g for g in real if g.numel()]
    if not filled or get_total_norm(filled, norm_type=float("inf")).isfinite():
        return None
    return next(i for i, g in enumerate(real) if not g.isfinite().all())


def raise_nonfinite(
    plan: Plan, groups: Groups, grads: list[Tensor], cause: Exception | None = None
) -> None:
    """Raise the RuntimeError that names the first parameter whose gradient holds NaN or Inf."""
    policies = [groups[group_idx]["nonfinite"] for group_idx, _ in plan.owners]
    raising = [i for i, policy in enumerate(policies) if policy == "raise"]
    index = first_nonfinite([grads[i] for i in raising])
    if index is None:
        raise cause or AssertionError("no gradient holds NaN or Inf")
    name = describe_param(groups, *plan.owners[raising[index]])
    raise RuntimeError(
        f"the gradient of {name} holds NaN or Inf; nothing was changed. Skip this step, or build "
        'the optimizer with nonfinite="skip" (leave such parameters alone) or "pass"'
    ) from cause
