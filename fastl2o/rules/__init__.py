"""Rules: WHAT a learned optimizer computes, as config, meta-parameters and reference step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ._base import Rule
from ._coordinate import CoordinateRule
from .hierarchical import HierarchicalRule
from .lstm import LSTMRule
from .rnnprop import RNNPropRule

FAMILIES: dict[str, type[Rule]] = {
    cls.family: cls for cls in (LSTMRule, RNNPropRule, HierarchicalRule)
}


def from_config(family: str, config: Mapping[str, Any]) -> Rule:
    """Build a freshly initialised rule of `family` from what `rule.config()` returned.

    Raises:
        ValueError: the family or an argument is unknown or out of range.
        TypeError: an argument has the wrong type.

    Example:
        >>> from_config("lstm", {"hidden_size": 4, "num_layers": 1})
        LSTMRule(hidden_size=4, num_layers=1, preprocess='log_sign', p=10.0, eps=0.0,
        output_scale=0.1)
    """
    if family not in FAMILIES:
        raise ValueError(
            f"Invalid family: {family!r}; this version knows {', '.join(sorted(FAMILIES))}"
        )
    cls = FAMILIES[family]
    known = set(cls.__init__.__annotations__) - {"return"}
    unknown = sorted(set(config) - known)
    if unknown:
        raise ValueError(
            f"Invalid config for family {family!r}: unknown {', '.join(unknown)}; known are "
            f"{sorted(known)}"
        )
    return cls(**config)


__all__ = [
    "FAMILIES",
    "CoordinateRule",
    "HierarchicalRule",
    "LSTMRule",
    "RNNPropRule",
    "Rule",
    "from_config",
]
