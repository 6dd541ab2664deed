"""Parameters that a hierarchical rule optimizes together: which they are, and their shared state.

The rule's global state belongs to no parameter: it lies in ``optimizer.state["global/<n>"]``. What
torch has for parallel training (distributed checkpoints, ZeroRedundancyOptimizer) moves the states
of parameters only, so the same tensor is also an entry of one parameter's state, and that one is
what a state_dict holds.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ._optim_state import uses_reference
from .rules import HierarchicalRule

PREFIX = "global/"
# Under this name one parameter of a problem holds what all of them share.
ENTRY = "global"


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


def _members(
    groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Any]
) -> Iterator[tuple[str, Mapping[str, Any], Tensor, Any]]:
    """Problem, group, parameter and state of each parameter that has a problem and a state."""
    names = problem_names(groups)
    for group in groups if names else ():
        for param in group["params"]:
            name, entry = names.get(problem_key(group, param)), state.get(param)
            if name is not None and entry:
                yield name, group, param, entry


def place_globals(groups: Sequence[Mapping[str, Any]], state: MutableMapping[Any, Any]) -> None:
    """Let the first parameter of each problem that has state hold what the problem shares.

    A shared state that only a parameter holds, because something else than load_state_dict put it
    there, is taken up.
    """
    members: dict[str, list[dict[str, Any]]] = {}
    for name, _, _, entry in _members(groups, state):
        members.setdefault(name, []).append(entry)
    for name, entries in members.items():
        held = [entry.pop(ENTRY) for entry in entries if ENTRY in entry]
        if name not in state and held:
            state[name] = {"hidden": held[0]}
        if name in state:
            entries[0][ENTRY] = state[name]["hidden"]


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
    states = {
        param: saved.get(param_id)
        for group, saved_group in zip(loaded, saved_groups, strict=True)
        for param_id, param in zip(saved_group["params"], group["params"], strict=True)
    }
    firsts: dict[str, tuple[Mapping[str, Any], Tensor]] = {}
    held: dict[str, Any] = {}
    for name, group, param, entry in _members(loaded, states):
        firsts.setdefault(name, (group, param))
        if ENTRY in entry:
            held.setdefault(name, {"hidden": entry[ENTRY]})
    restored: dict[str, dict[str, Tensor]] = {}
    for name, (group, param) in firsts.items():
        shared: Any = held.get(name, saved.get(name))  # older checkpoints have it under its name
        problem = global_problem(shared, group["rule"])
        if problem is not None:
            raise ValueError(
                f"loaded state dict: {name!r}, what its parameters share, {problem}. It belongs to "
                "another rule, or to an optimizer whose parameters were on other devices"
            )
        hidden = shared["hidden"]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        restored[name] = {"hidden": hidden.detach().to(param.device, wide, copy=True)}
    return restored
