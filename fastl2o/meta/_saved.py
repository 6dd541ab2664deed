"""Checks of a saved training: what a damaged one would put in place of its numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ._checks import check_number

__all__ = [
    "check_alike",
    "check_counters",
    "check_optimizer_state",
    "check_tensor",
    "differences",
]


def differences(text: object, own: Mapping[str, Any]) -> list[str]:
    """How the settings in a saved fingerprint differ from a trainer's own.

    Raises:
        TypeError: ``text`` is no fingerprint.
    """
    try:
        theirs = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        theirs = None
    if not isinstance(theirs, dict):
        raise TypeError("state is not of a MetaTrainer: give what its state_dict() returned")
    ours = json.loads(json.dumps(own))
    return [
        f"{key}: here {ours[key]!r}, saved {theirs.get(key)!r}"
        for key in ours
        if ours[key] != theirs.get(key)
    ]


def check_counters(saved: object, names: Sequence[str]) -> dict[str, Any]:
    """Return ``saved`` if it has just these counters: scores are numbers, the others count.

    Raises:
        TypeError, ValueError: it has not.
    """
    if not isinstance(saved, dict) or set(saved) != set(names):
        raise ValueError(f"counters must be {', '.join(names)}")
    for name, value in saved.items():
        if name.endswith("_score"):
            if type(value) is not float:
                raise TypeError(f"{name} must be a float, got {type(value).__name__}")
        elif name != "best_step" or value is not None:
            check_number(name, value, minimum=0, integer=True, below=2**63)
    return saved


def check_alike(name: str, saved: object, like: Mapping[str, Any]) -> None:
    """Refuse ``saved`` unless it has the tensors of ``like``: names, shapes and types.

    Raises:
        ValueError: it has not.
    """
    if not isinstance(saved, Mapping) or saved.keys() != like.keys():
        raise ValueError(f"{name} must hold {', '.join(like)}")
    for key, own in like.items():
        check_tensor(f"{name}[{key!r}]", saved[key], own)


def check_tensor(name: str, value: object, like: Tensor) -> None:
    """Refuse ``value`` unless it is a tensor of the shape and type of ``like``, with numbers.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(value).__name__}")
    found = (tuple(value.shape), value.dtype, value.layout, value.device.type)
    wanted = (tuple(like.shape), like.dtype, torch.strided, like.device.type)
    if found != wanted:
        raise ValueError(f"{name} must be {wanted}, got {found}")


def check_optimizer_state(saved: object, optimizer: torch.optim.Optimizer) -> None:
    """Refuse an outer optimizer's state that torch would load, and fail with at the next step.

    Raises:
        ValueError: the numbers of a parameter have another shape than it, or are none.
    """
    if not isinstance(saved, Mapping) or not isinstance(saved.get("state"), Mapping):
        raise ValueError("an optimizer's state must hold 'state' and 'param_groups'")
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for index, entry in saved["state"].items():
        if type(index) is not int or not 0 <= index < len(params) or not isinstance(entry, Mapping):
            raise ValueError(f"an optimizer's state has no parameter {index!r}")
        for key, value in entry.items():
            if isinstance(value, Tensor) and value.numel() != 1:
                check_tensor(f"an optimizer's state of {key!r}", value, params[index])
