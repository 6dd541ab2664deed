"""GPU implementations of the hierarchical rule's ops: what each backend takes, and the calls.

The dispatcher's CUDA key leads here. Triton is imported by the first call that needs it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from . import backends
from .rules import HierarchicalRule

Named = dict[str, Any]

# The kernels write a unit's products out, so more of them compile for minutes.
_MAX_TRITON_UNITS = 16


def step_refusal(backend: str, rule: HierarchicalRule) -> str:
    """Why a backend that is present has no step for this rule, "" if it has."""
    if backend == "triton" and rule.param_size > _MAX_TRITON_UNITS:
        return f"its kernels take param_size up to {_MAX_TRITON_UNITS}, not {rule.param_size}"
    if backend == "cuda":
        return "it has no kernels for rules of family 'hierarchical'"
    return ""


def unroll_refusal(backend: str, rule: HierarchicalRule) -> str:
    """Why a backend that is present has no window backward for this rule, "" if it has."""
    if backend in ("triton", "cuda"):
        return "it has no kernels for the windows of rules of family 'hierarchical'"
    return ""


def objections(
    refusal: Callable[[str, HierarchicalRule], str], rule: HierarchicalRule
) -> Callable[[str], str]:
    """`refusal` as a function of the backend, for `backends.choose`."""
    return lambda backend: refusal(backend, rule)


def step_(backend: str, rule: HierarchicalRule, named: Named) -> None:
    """The in-place step; `named` holds the arguments of the op's schema, shapes checked."""
    lists = ("params", "grads", "planes", "tensor_states", "steps", "global_states", "problems")
    options = ("meta", "lr", "weight_decay", "maximize", "nonfinite", "grad_scale", "found_inf")
    step = import_module("fastl2o.kernels.hierarchical.step")
    step.step_(rule, *(named[name] for name in (*lists, *options)))


def dispatched(
    function: Callable[[str, HierarchicalRule, Named], Any],
    refusal: Callable[[str, HierarchicalRule], str],
    rule_of: Callable[[Named], HierarchicalRule],
    check: Callable[[HierarchicalRule, Named], None],
    default: Callable[[Named], Any],
) -> Callable[[Named], Any]:
    """The CUDA-key implementation of an op: the fastest backend that takes the call.

    Args:
        function: one of this module.
        refusal: what backends do not take of it.
        rule_of: the rule that an op's arguments describe.
        check: raises for lists that do not fit the rule.
        default: the op in plain torch.
    """

    def kernel(named: Named) -> Any:
        rule, device = rule_of(named), named["meta"].device
        unsupported = ""
        floats: list[Tensor] = [named["meta"]]
        if any(tensor.dtype != torch.float32 for tensor in floats):
            unsupported = "its kernels take float32 (planes also bfloat16): convert the tensors"
        chosen = backends.choose(device, unsupported, refuses=objections(refusal, rule))
        if chosen == "reference":
            return default(named)
        check(rule, named)
        return function(chosen, rule, named)

    return kernel
