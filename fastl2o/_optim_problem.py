"""Parameters that a hierarchical rule optimizes together: which they are, and their shared state.

The rule's global state belongs to no parameter: it lies in ``optimizer.state["global/<n>"]``, a
name that torch's ``state_dict`` keeps as it is.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ._optim_state import uses_reference
from .rules import HierarchicalRule

PREFIX = "global/"


def problem_key(group: Mapping[str, Any], param: Tensor) -> Hashable | None:
    """What parameters of one problem share; None for a rule whose coordinates do not talk."""
    rule = group["rule"]
    if not isinstance(rule, HierarchicalRule):
        return None
    how = (group["maximize"], group["nonfinite"], uses_reference(group))
    state = (group["state_dtype"], group["stochastic_rounding"])
    return (id(rule), param.device, *state, *how)


def problem_names(groups: Sequence[Mapping[str, Any]]) -> dict[Hashable, str]:
    """The name of each problem's state, numbered in the order of the parameters."""
    names: dict[Hashable, str] = {}
    for group in groups:
        for param in group["params"]:
            key = problem_key(group, param)
            if key is not None:
                names.setdefault(key, f"{PREFIX}{len(names)}")
    return names


def new_global(rule: HierarchicalRule, param: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The shared state of a problem before its first step, where ``param`` is."""
    wide = torch.promote_types(dtype, torch.float32)
    return {"hidden": rule.init_global(param.device, wide)}


def global_problem(entry: Any, rule: HierarchicalRule) -> str | None:
    """Return what keeps ``entry`` from being a shared state of ``rule``, or None."""
    hidden = entry.get("hidden") if isinstance(entry, Mapping) else None
    if not isinstance(hidden, Tensor) or tuple(hidden.shape) != (rule.global_size,):
        return f"is no 'hidden' tensor of shape ({rule.global_size},)"
    return None


def restored_globals(
    saved: Mapping[Any, Any],
    saved_groups: Sequence[Mapping[str, Any]],
    groups: Sequence[Mapping[str, Any]],
) -> dict[str, dict[str, Tensor]]:
    """Copies of a checkpoint's shared states, each on the device of its problem.

    Args:
        saved, saved_groups: the checkpoint's states and groups; its options are what counts.
        groups: the optimizer's groups, whose rules and parameters stay.

    Raises:
        ValueError: a problem whose parameters have state has no shared state of its shape.
    """
    loaded = [
        {**options, "rule": group["rule"], "params": group["params"]}
        for options, group in zip(saved_groups, groups, strict=True)
    ]
    names = problem_names(loaded)
    restored: dict[str, dict[str, Tensor]] = {}
    for group, saved_group in zip(loaded, saved_groups, strict=True):
        for param_id, param in zip(saved_group["params"], group["params"], strict=True):
            name = names.get(problem_key(group, param))
            if name is None or name in restored or not saved.get(param_id):
                continue
            problem = global_problem(saved.get(name), group["rule"])
            if problem is not None:
                raise ValueError(
                    f"loaded state dict: state[{name!r}] {problem}. It belongs to another rule, or "
                    "to an optimizer whose parameters were on other devices"
                )
            hidden = saved[name]["hidden"]
            wide = torch.promote_types(hidden.dtype, torch.float32)
            restored[name] = {"hidden": hidden.detach().to(param.device, wide, copy=True)}
    return restored
