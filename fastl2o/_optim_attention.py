"""Rules with attention, which take gradients at a point ahead of the parameters.

Between steps such a rule's parameters are ahead of where they belong, by the group's lr times the
last plane of their state. ``group["ahead"]`` is the factor that they are ahead by at the moment:
the lr after a step, 0 while the model is evaluated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ._optim_state import as_float
from .rules import HierarchicalRule

if TYPE_CHECKING:
    from ._optim_plan import Groups, State


def has_attention(group: Mapping[str, Any]) -> bool:
    """Whether a group's rule looks ahead."""
    rule = group["rule"]
    return isinstance(rule, HierarchicalRule) and rule.attention


def refuse_evaluating(groups: Groups) -> None:
    """Raise RuntimeError where parameters were taken back for an evaluation."""
    if any(group["evaluating"] and has_attention(group) for group in groups):
        raise RuntimeError("step() while evaluating: call optimizer.train() before training on")


def lr_changed(groups: Groups) -> bool:
    """Whether parameters are ahead by another lr than that of the step to come."""
    return any(has_attention(group) and group["ahead"] != as_float(group["lr"]) for group in groups)


def set_evaluating(groups: Groups, state: State, to: bool) -> None:
    """Take parameters back to where they belong, or ahead again."""
    for group in groups:
        if has_attention(group) and group["evaluating"] != to:
            _put_ahead(group, state, 0.0 if to else as_float(group["lr"]))
            group["evaluating"] = to


def follow_lr(groups: Groups, state: State) -> None:
    """Put parameters ahead by the lr of the step to come."""
    for group in groups:
        if has_attention(group):
            _put_ahead(group, state, as_float(group["lr"]))


def _put_ahead(group: dict[str, Any], state: State, factor: float) -> None:
    change = factor - group["ahead"]
    group["ahead"] = factor
    if change == 0.0:
        return
    with torch.set_grad_enabled(group["differentiable"] and torch.is_grad_enabled()):
        for param in group["params"]:
            planes = state.get(param, {}).get("planes")
            if planes is not None:
                real = torch.view_as_real(param) if param.is_complex() else param
                real.add_(planes[-1].to(real.dtype), alpha=change)
