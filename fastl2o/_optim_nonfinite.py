"""Which gradients hold NaN or Inf, found before a step changes anything."""

from __future__ import annotations

from collections.abc import Set
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import ops
from ._ops_nonfinite import scratch
from ._optim_attention import lr_changed
from ._optim_shards import local, nonfinite_flags
from ._optim_state import describe_param

if TYPE_CHECKING:
    from ._optim_plan import Groups, Plan


def unchecked(plan: Plan, groups: Groups) -> list[int]:
    """Return which gradients no list op can refuse in time, so must be checked beforehand.

    A step that raises changes nothing. The op of the first bucket sees to that for its own
    tensors; other buckets would come too late, and states must not be created first. Nor can an op
    know of the gradients that other ranks hold parts of, whether to raise or to skip.
    """
    moved = plan.missing or lr_changed(groups)
    if not moved and len(plan.buckets) == 1 and not plan.split:
        return []
    if moved:
        indices = list(range(len(plan.active)))
    else:
        indices = [i for bucket in plan.buckets[1:] for i in bucket.where]
    policies = [groups[group_idx]["nonfinite"] for group_idx, _ in plan.owners]
    raising = {i for i in (*indices, *plan.split) if policies[i] == "raise"}
    return sorted(raising.union(i for i in plan.split if policies[i] == "skip"))


def refuse(plan: Plan, groups: Groups, grads: list[Tensor], to_check: list[int]) -> Set[int]:
    """Raise for the first gradient of ``to_check`` that holds NaN or Inf under "raise".

    Returns:
        Those of split parameters that are to be skipped, the same on every rank.
    """
    split = set(plan.split)
    whole = [i for i in to_check if i not in split]
    if whole and first_nonfinite([grads[i] for i in whole], plan.found) is not None:
        raise_nonfinite(plan, groups, grads)
    parts = [i for i in to_check if i in split]
    if not parts:
        return frozenset()
    flags = nonfinite_flags([plan.active[i] for i in parts], [grads[i] for i in parts])
    bad = [i for i, flag in zip(parts, flags, strict=True) if flag]
    for i in bad:
        if groups[plan.owners[i][0]]["nonfinite"] == "raise":
            raise _refusal(plan, groups, i)
    return frozenset(bad)


def first_nonfinite(grads: list[Tensor], found: Tensor | None = None) -> int | None:
    """Return the index of the first gradient that holds NaN or Inf, or None.

    Args:
        grads: gradients, also complex ones and DTensors, of which this rank's parts count.
        found: kept scratch; made anew where it is None.
    """
    grads = [local(grad).resolve_neg() for grad in grads]
    real = [torch.view_as_real(g.resolve_conj()) if g.is_complex() else g for g in grads]
    return ops.first_nonfinite(real, scratch() if found is None else found)


def raise_nonfinite(
    plan: Plan, groups: Groups, grads: list[Tensor], cause: Exception | None = None
) -> None:
    """Raise the RuntimeError that names the first parameter whose gradient holds NaN or Inf."""
    policies = [groups[group_idx]["nonfinite"] for group_idx, _ in plan.owners]
    raising = [i for i, policy in enumerate(policies) if policy == "raise"]
    index = first_nonfinite([grads[i] for i in raising])
    if index is None:
        raise cause or AssertionError("no gradient holds NaN or Inf")
    raise _refusal(plan, groups, raising[index]) from cause


def _refusal(plan: Plan, groups: Groups, index: int) -> RuntimeError:
    name = describe_param(groups, *plan.owners[index])
    return RuntimeError(
        f"the gradient of {name} holds NaN or Inf; nothing was changed. Skip this step, or build "
        'the optimizer with nonfinite="skip" (leave such parameters alone) or "pass"'
    )
