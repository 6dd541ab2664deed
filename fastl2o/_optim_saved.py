"""What a state_dict holds, and whether one that is to be loaded fits.

Its groups are numbers, strings and tensors: torch.distributed.checkpoint gathers neither modules
nor dtypes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch

from ._optim_state import STATE_DTYPES, check_options, describe_param, state_problem
from .rules import Rule

# By which a group of ours is told from one of another optimizer, whose lr would be taken over.
OWN_OPTIONS = frozenset(
    ("rule", "nonfinite", "state_dtype", "stochastic_rounding", "seed", "rounding_step")
)

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


def rule_identity(rule: Rule) -> dict[str, Any]:
    """Return family, config and a digest of the meta-parameters: plain JSON-able values.

    It stands for the rule in a state_dict: a state belongs to the meta-parameters it was made by.
    """
    flat = rule.flat_parameters().detach().to("cpu", torch.float32)
    digest = hashlib.sha256(flat.numpy().tobytes()).hexdigest()
    return {"family": rule.family, "config": dict(rule.config()), "digest": digest}


def identity_problem(saved: Any, rule: Rule) -> str | None:
    """Return how the rule noted in a checkpoint's group differs from ``rule``, or None."""
    if saved is None:
        return None
    if isinstance(saved, Rule):
        saved = rule_identity(saved)
    if not isinstance(saved, Mapping):
        return f"notes an unreadable rule: {saved!r}"
    own = rule_identity(rule)
    for key in ("family", "config"):
        if not _same(saved.get(key), own[key]):
            return f"was made by a rule of {key} {saved.get(key)}, this rule's is {own[key]}"
    if not _same(saved.get("digest"), own["digest"]):
        return "was made by a rule with other meta-parameters"
    return None


def _same(saved: Any, own: Any) -> bool:
    """Whether something read from a file, which may be anything, equals plain values."""
    if isinstance(own, Mapping):
        return (
            isinstance(saved, Mapping)
            and saved.keys() == own.keys()
            and all(_same(saved[key], own[key]) for key in own)
        )
    return isinstance(saved, (bool, int, float, str)) and saved == own


def check_state_dict(state_dict: Mapping[str, Any], groups: list[dict[str, Any]]) -> None:
    """Raise ValueError unless ``state_dict`` fits ``groups``; nothing is changed.

    Raises:
        ValueError: another rule, another shape, an impossible option. The message names the group
            and, where there is one, the parameter.
    """
    if not {"state", "param_groups"} <= set(state_dict):
        raise ValueError(
            f"loaded state dict has the keys {sorted(map(str, state_dict))[:5]}, not 'state' and "
            "'param_groups'. Give what an optimizer's state_dict() returned"
        )
    saved_groups = state_dict["param_groups"]
    if not (
        isinstance(state_dict["state"], Mapping)
        and isinstance(saved_groups, Sequence)
        and all(
            isinstance(group, Mapping) and isinstance(group.get("params"), (list, tuple))
            for group in saved_groups
        )
        and all(isinstance(entry, Mapping) for entry in state_dict["state"].values())
    ):
        raise ValueError(
            "loaded state dict is malformed: 'state' must map parameter ids to dictionaries, "
            "'param_groups' must be a list of dictionaries with a list of 'params'"
        )
    sizes = [len(group["params"]) for group in groups]
    saved_sizes = [len(group["params"]) for group in saved_groups]
    if sizes != saved_sizes:
        raise ValueError(
            f"loaded state dict has parameter groups of {saved_sizes} parameters, "
            f"this optimizer has groups of {sizes}"
        )
    for group_idx, (saved, group) in enumerate(zip(saved_groups, groups, strict=True)):
        rule = group["rule"]
        if not OWN_OPTIONS & set(saved):
            raise ValueError(
                f"loaded state dict: group {group_idx} has the options {sorted(map(str, saved))}, "
                "none of a LearnedOptimizer's own: it is of another optimizer. Give what a "
                "LearnedOptimizer's state_dict() returned"
            )
        try:
            check_options({**group, **saved})
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"group {group_idx} of the loaded state dict: {error}") from None
        problem = identity_problem(saved.get("rule"), rule)
        if problem is not None and sizes[group_idx]:
            name = describe_param(groups, group_idx, 0)
            raise ValueError(
                f"loaded state dict: the state of {name} {problem}. Load it with the rule it was "
                "saved with; to use the state with this rule all the same, delete 'rule' from the "
                "groups of the state dict"
            )
        for position, param_id in enumerate(saved["params"]):
            if not isinstance(param_id, Hashable):
                raise ValueError(
                    f"group {group_idx} of the loaded state dict: {param_id!r} in 'params'"
                )
            state = state_dict["state"].get(param_id)
            if not state:
                continue
            problem = state_problem(state, rule, group["params"][position])
            if problem is not None:
                name = describe_param(groups, group_idx, position)
                raise ValueError(
                    f"loaded state dict: the state of {name} {problem}. It belongs to another "
                    "rule, optimizer or model"
                )
