"""The step that autograd runs through.

One functional op per parameter; parameters that a hierarchical rule steps together go through its
reference step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import backends, ops
from ._optim_attention import follow_lr, lr_changed, refuse_evaluating
from ._optim_nonfinite import first_nonfinite, raise_nonfinite
from ._optim_plan import Groups, Plan, State, create_missing, gather
from ._optim_problem import place_globals
from ._optim_shards import is_split
from ._optim_state import as_float, describe_param
from .rules import CoordinateRule, HierarchicalRule
from .rules.hierarchical import ProblemState

_Entry = dict[str, Any]  # the state of a parameter, or what parameters share
_Change = Callable[[], None]


def differentiable_step(groups: Groups, state: State) -> None:
    """Step every parameter that has a gradient and keep the graph.

    Gradients flow from the new parameters and states to the old ones, to the gradients, to a tensor
    ``lr`` and to the rules' meta-parameters, learned initial states included. States are replaced,
    not overwritten: the old ones are part of the graph.

    Raises:
        RuntimeError: a leaf parameter that requires grad (autograd cannot record a change of it),
            a forced backend that has no such step, or what every step raises. Nothing is changed
            then.
    """
    refuse_evaluating(groups)
    plan, grads = gather(groups, state, None)
    _check(plan, groups, state)
    policies = [groups[group_idx]["nonfinite"] for group_idx, _ in plan.owners]
    checked = [grad for grad, policy in zip(grads, policies, strict=True) if policy == "raise"]
    if first_nonfinite(checked) is not None:
        raise_nonfinite(plan, groups, grads)
    if plan.missing:
        missing, known = plan.missing, list(state.values())
        with torch.no_grad():
            create_missing(plan, groups, state, grads)
        _attach_starts(plan, groups, missing, known)
    follow_lr(groups, state)
    stepped = {
        i
        for i, (grad, policy) in enumerate(zip(grads, policies, strict=True))
        if policy != "skip" or first_nonfinite([grad]) is None
    }
    changes: list[_Change] = []
    for bucket in plan.buckets:
        where = [i for i in bucket.where if i in stepped]
        owners = [groups[plan.owners[i][0]] for i in where]
        params, entries = [plan.active[i] for i in where], [plan.states[i] for i in where]
        mine = [grads[i] for i in where]
        if bucket.shared is None:
            changes += map(_step_one, owners, params, mine, entries)
        elif where:
            changes += _step_together(owners, params, mine, entries, bucket.shared)
    for change in changes:
        change()
    place_globals(groups, state)  # where a shared state was replaced


def _check(plan: Plan, groups: Groups, state: State) -> None:
    for index, group in enumerate(groups):
        learned = isinstance(group["lr"], Tensor) and group["lr"].requires_grad
        if learned and lr_changed([group]) and any(state.get(p) for p in group["params"]):
            raise RuntimeError(
                f"group {index}: its rule has attention, and lr, which requires grad, was changed "
                "since the last step: the graph has no record of how parameters follow it. Keep "
                "the lr, or give one that does not require grad"
            )
    for p, owner in zip(plan.active, plan.owners, strict=True):
        if isinstance(groups[owner[0]]["rule"], HierarchicalRule):
            backends.choose(p.device, "it has no differentiable step of hierarchical rules")
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


def _attach_starts(plan: Plan, groups: Groups, missing: list[int], known: list[Any]) -> None:
    """Make the new states of rules that learn where to start depend on the meta-parameters."""
    for i in missing:
        rule, entry = groups[plan.owners[i][0]]["rule"], plan.states[i]
        if isinstance(rule, HierarchicalRule):
            planes, tensor = entry["planes"], entry["tensor"]
            start = rule.param_start.to(planes).view(-1, *(1,) * (planes.dim() - 1))
            start = start.expand(-1, *planes.shape[1:])
            entry["planes"] = torch.cat((start, planes[rule.param_size :]))
            entry["tensor"] = torch.cat((rule.tensor_start.to(tensor), tensor[-1:]))
    for bucket in plan.buckets:
        shared = bucket.shared
        if shared is not None and not any(shared is entry for entry in known):
            rule = groups[bucket.group_idx]["rule"]
            shared["hidden"] = rule.global_start.to(shared["hidden"], copy=True)


def _step_one(group: dict[str, Any], p: Tensor, grad: Tensor, entry: _Entry) -> _Change:
    rule: CoordinateRule = group["rule"]
    planes: Tensor = entry["planes"]
    update, new_planes = ops.step(
        rule,
        _seen(group, grad, planes.dtype),
        planes.to(torch.promote_types(planes.dtype, torch.float32)).contiguous(),
        int(as_float(entry.get("step", 0))),
    )
    new = {"planes": new_planes.to(planes.dtype)}
    if "step" in entry:
        new["step"] = entry["step"] + 1
    return _change(group, p, update, entry, new)


def _step_together(
    owners: Groups, params: list[Tensor], grads: list[Tensor], entries: list[_Entry], shared: _Entry
) -> list[_Change]:
    rule: HierarchicalRule = owners[0]["rule"]
    planes = [entry["planes"] for entry in entries]
    hidden: Tensor = shared["hidden"]
    wide = torch.promote_types(planes[0].dtype, torch.float32)
    steps = [int(as_float(entry["step"])) for entry in entries]
    old = ProblemState(planes, [entry["tensor"] for entry in entries], steps, hidden.to(wide))
    updates, new = rule.reference_step(
        [_seen(group, grad, wide) for group, grad in zip(owners, grads, strict=True)],
        old,
        rule.flat_parameters().to(hidden.device),
    )
    changes = [lambda: shared.update(hidden=new.hidden.to(hidden.dtype))]
    for i, (group, p, update) in enumerate(zip(owners, params, updates, strict=True)):
        if update is None or not p.numel():
            continue
        step = entries[i]["step"] + 1
        own = {"planes": new.planes[i], "tensor": new.tensors[i], "step": step}
        changes.append(_change(group, p, update, entries[i], own))
    return changes


def _seen(group: dict[str, Any], grad: Tensor, dtype: torch.dtype) -> Tensor:
    """What the rule sees of a gradient, where its state is of ``dtype``."""
    grad = torch.view_as_real(grad.resolve_conj()) if grad.is_complex() else grad
    grad = -grad if group["maximize"] else grad
    return grad.to(torch.promote_types(dtype, torch.float32)).contiguous()


def _change(
    group: dict[str, Any], p: Tensor, update: Tensor, entry: _Entry, new: dict[str, Tensor]
) -> _Change:
    """What puts the new parameter and state in place, computed ahead."""
    is_complex = p.is_complex()
    theta = p.clone()  # p is written in place later, but may be saved for the backward here
    theta = torch.view_as_real(theta.resolve_conj()) if is_complex else theta
    lr = group["lr"].reshape(()) if isinstance(group["lr"], Tensor) else group["lr"]
    wide = torch.promote_types(theta.dtype, torch.float32)
    moved = (1 - lr * group["weight_decay"]) * theta.to(wide) + lr * update.to(wide)
    moved = moved.to(theta.dtype)
    value = torch.view_as_complex(moved.contiguous()) if is_complex else moved

    def put() -> None:
        p.copy_(value)
        entry.update(new)

    return put
