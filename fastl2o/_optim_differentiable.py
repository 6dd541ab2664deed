"""The step that autograd runs through: one functional op per parameter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops
from ._optim_nonfinite import first_nonfinite, raise_nonfinite
from ._optim_plan import Groups, State, create_missing, gather
from ._optim_shards import is_split
from ._optim_state import as_float, describe_param
from .rules import CoordinateRule


def differentiable_step(groups: Groups, state: State) -> None:
    """Step every parameter that has a gradient and keep the graph.

    Gradients flow from the new parameters and states to the old ones, to the gradients, to a tensor
    ``lr`` and to the rules' meta-parameters. States are replaced, not overwritten: the old ones are
    part of the graph.

    Raises:
        RuntimeError: a leaf parameter that requires grad (autograd cannot record a change of it),
            or what every step raises. Nothing is changed then.
    """
    plan, grads = gather(groups, state, None)
    names = plan.owners
    for p, owner in zip(plan.active, names, strict=True):
        if not isinstance(groups[owner[0]]["rule"], CoordinateRule):
            raise RuntimeError(
                f"{describe_param(groups, *owner)}: differentiable=True needs a coordinate-wise "
                "rule. Differentiate through rule.reference_step, which steps tensors together"
            )
        if is_split(p):
            raise RuntimeError(
                f"{describe_param(groups, *owner)} is a DTensor, which differentiable=True does "
                "not take. Gather it first: p.full_tensor()"
            )
        if p.is_leaf and p.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{describe_param(groups, *owner)} is a leaf that requires grad: autograd cannot "
                "step through it. Give the optimizer p.clone() and set the clone's .grad"
            )
        step = state.get(p, {}).get("step")
        if isinstance(step, Tensor) and step.requires_grad:
            raise RuntimeError("`requires_grad` is not supported for `step` in differentiable mode")
    policies = [groups[group_idx]["nonfinite"] for group_idx, _ in names]
    checked = [grad for grad, policy in zip(grads, policies, strict=True) if policy == "raise"]
    if first_nonfinite(checked) is not None:
        raise_nonfinite(plan, groups, grads)
    if plan.missing:
        with torch.no_grad():
            create_missing(plan, groups, state, grads)
    results = []
    for p, grad, (group_idx, _), policy in zip(plan.active, grads, names, policies, strict=True):
        if policy == "skip" and first_nonfinite([grad]) is not None:
            continue
        results.append((p, state[p], *_step_one(groups[group_idx], p, grad, state[p])))
    for p, entry, new_param, new_planes in results:
        p.copy_(new_param)
        entry["planes"] = new_planes
        if "step" in entry:
            entry["step"] = entry["step"] + 1


def _step_one(
    group: dict[str, Any], p: Tensor, grad: Tensor, entry: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    rule: CoordinateRule = group["rule"]
    is_complex = p.is_complex()
    theta = p.clone()  # p is written in place later, but may be saved for the backward here
    theta = torch.view_as_real(theta.resolve_conj()) if is_complex else theta
    grad = torch.view_as_real(grad.resolve_conj()) if is_complex else grad
    planes: Tensor = entry["planes"]
    dtype = torch.promote_types(planes.dtype, torch.float32)  # of the maths
    update, new_planes = ops.step(
        rule,
        (-grad if group["maximize"] else grad).to(dtype).contiguous(),
        planes.to(dtype).contiguous(),
        int(as_float(entry.get("step", 0))),
    )
    lr = group["lr"].reshape(()) if isinstance(group["lr"], Tensor) else group["lr"]
    wide = torch.promote_types(theta.dtype, torch.float32)
    new_param = (1 - lr * group["weight_decay"]) * theta.to(wide) + lr * update.to(wide)
    new_param = new_param.to(theta.dtype)
    if is_complex:
        new_param = torch.view_as_complex(new_param.contiguous())
    return new_param, new_planes.to(planes.dtype)
