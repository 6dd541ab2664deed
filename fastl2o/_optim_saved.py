"""The groups of a state_dict: numbers, strings and tensors, all that torch's checkpoints carry.

torch.distributed.checkpoint gathers neither modules nor dtypes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ._optim_state import STATE_DTYPES, rule_identity

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in STATE_DTYPES}


def saved_groups(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The groups with each rule as its identity and each dtype by its name."""
    identities: dict[int, dict[str, Any]] = {}
    saved = []
    for group in groups:
        rule = group["rule"]
        if id(rule) not in identities:
            identities[id(rule)] = rule_identity(rule)
        dtype = str(group["state_dtype"]).removeprefix("torch.")
        saved.append({**group, "rule": dict(identities[id(rule)]), "state_dtype": dtype})
    return saved


def with_dtypes(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state_dict whose groups have dtypes again; what is malformed stays so."""
    groups = state_dict.get("param_groups")
    if not isinstance(groups, Sequence) or isinstance(groups, str):
        return state_dict
    return {**state_dict, "param_groups": [_with_dtype(group) for group in groups]}


def _with_dtype(group: Any) -> Any:
    dtype = group.get("state_dtype") if isinstance(group, Mapping) else None
    if isinstance(dtype, str) and dtype in _DTYPES:
        return {**group, "state_dtype": _DTYPES[dtype]}
    return group
