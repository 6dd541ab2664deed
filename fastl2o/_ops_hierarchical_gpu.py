"""GPU implementations of the hierarchical rule's ops: what each backend takes, and the calls.

The dispatcher's CUDA key leads here. Triton is imported by the first call that needs it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from . import backends
from ._ops_gpu import capability_refusal
from ._ops_nonfinite import first_nonfinite, scratch
from ._ops_reference import NONFINITE, nonfinite_message
from .rules import HierarchicalRule

Named = dict[str, Any]

_LISTS = ("params", "grads", "planes", "tensor_states", "steps", "lr", "weight_decay")
# The kernels write a unit's products out, so more of them compile for minutes.
_MAX_TRITON_UNITS = 16


def refusal(backend: str, rule: HierarchicalRule, device: torch.device) -> str:
    """Why a backend that is present has no kernels for this rule on this device, "" if it has."""
    if backend == "triton" and rule.param_size > _MAX_TRITON_UNITS:
        return f"its kernels take param_size up to {_MAX_TRITON_UNITS}, not {rule.param_size}"
    if backend == "cuda" and device.type == "cuda":
        return _cuda_refuses(cuda_sizes(rule), torch.device(device))
    return ""


def cuda_sizes(rule: HierarchicalRule) -> tuple[int, int, int, int]:
    """What the CUDA ops are told of a rule."""
    return (rule.param_size, rule.tensor_size, rule.global_size, rule.num_scales)


@functools.lru_cache(maxsize=1024)
def _cuda_refuses(sizes: tuple[int, int, int, int], device: torch.device) -> str:
    if not torch.ops.fastl2o_cuda.hierarchical_supported(*sizes):
        names = ("param_size", "tensor_size", "global_size", "num_scales")
        given = ", ".join(f"{name}={size}" for name, size in zip(names, sizes, strict=True))
        return f"its kernels take the default sizes, not {given} ('triton' takes others)"
    return capability_refusal(device)


def objections(rule: HierarchicalRule, device: torch.device) -> Callable[[str], str]:
    """`refusal` as a function of the backend, for `backends.choose`."""
    return lambda backend: refusal(backend, rule, device)


def step_(backend: str, rule: HierarchicalRule, named: Named) -> None:
    """The in-place step; `named` holds the arguments of the op's schema, shapes checked."""
    if named["meta"].dim() == 2:
        for one in _each_problem(_looked_at(named)):
            step_(backend, rule, one)
        return
    lists = ("params", "grads", "planes", "tensor_states", "steps", "global_states", "problems")
    options = ("lr", "weight_decay", "maximize", "nonfinite")
    before = [named[name] for name in (*lists, "meta")]
    after = [named[name] for name in (*options, "grad_scale", "found_inf", "rounding_seed")]
    if backend == "cuda":
        torch.ops.fastl2o_cuda.hierarchical_step_(*before, *cuda_sizes(rule), *after)
        return
    step = import_module("fastl2o.kernels.hierarchical.step")
    step.step_(rule, *before, *after)


def _looked_at(named: Named) -> Named:
    """A step of several calls, none of which is to refuse a gradient after another has stepped."""
    if named["nonfinite"] != NONFINITE["raise"]:
        return named
    found_inf = named["found_inf"]
    if found_inf is None or found_inf.item() == 0.0:
        index = first_nonfinite(named["grads"], scratch())
        if index is not None:
            raise RuntimeError(nonfinite_message(index))
    return {**named, "nonfinite": NONFINITE["pass"]}


def _each_problem(named: Named) -> Iterator[Named]:
    """The calls of a step whose meta-parameters are a row for each problem."""
    count = len(named["params"])
    problems = named["problems"] or [0] * count
    for number, meta in enumerate(named["meta"]):
        mine = [index for index in range(count) if problems[index] == number]
        if mine:
            lists = {name: [named[name][index] for index in mine] for name in _LISTS}
            hidden = named["global_states"][number : number + 1]
            yield {**named, **lists, "problems": [], "global_states": hidden, "meta": meta}


def check_unroll(rule: HierarchicalRule, named: Named) -> None:
    """What kernels that get raw pointers need."""
    grads, steps, sizes = named["grads"], named["steps"], list(named["sizes"])
    if grads.dim() != 3 or steps < 0 or grads.shape[0] not in (steps, steps + 1):
        raise ValueError(
            f"grads: expected shape (K, R, D) with K = steps or steps + 1, got "
            f"{tuple(grads.shape)} with steps = {steps}"
        )
    if sum(sizes) != grads.shape[2] or min(sizes, default=0) < 0:
        raise ValueError(
            f"sizes: expected numbers of coordinates that add up to {grads.shape[2]}, got {sizes}"
        )
    shapes = {
        "grads": grads.shape,
        "state": rule.runs_shape(grads.shape[1], sizes),
        "loss_weights": grads.shape[:2],
        "meta": (rule.num_meta_parameters,),
    }
    if named.get("d_updates") is not None:
        shapes["d_updates"] = torch.Size((steps, *grads.shape[1:]))
    for name, shape in shapes.items():
        given: Tensor = named[name]
        same = (torch.float32, grads.device)
        if (given.dtype, given.device) != same or not given.is_contiguous():
            raise ValueError(
                f"{name}: expected contiguous float32 on {grads.device}, got {given.dtype} with "
                f"strides {given.stride()} on {given.device}"
            )
        if given.shape != shape:
            raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(given.shape)}")


def unroll_backward(
    backend: str, rule: HierarchicalRule, named: Named
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The window backward; `named` holds the arguments of the op's schema, checked."""
    names = ("grads", "state", "step", "meta", "loss_weights", "steps", "sizes")
    before = [named[name] for name in names]
    scales = (named["lr"], named["weight_decay"], named.get("d_updates"))
    result: tuple[Tensor, Tensor]
    if backend == "cuda":
        cuda = torch.ops.fastl2o_cuda.hierarchical_unroll_backward
        result = cuda(*before, *cuda_sizes(rule), *scales)
    else:
        window = import_module("fastl2o.kernels.hierarchical.window")
        result = window.unroll_backward(rule, *before, *scales)
    return result


def dispatched(
    function: Callable[[str, HierarchicalRule, Named], Any],
    rule_of: Callable[[Named], HierarchicalRule],
    check: Callable[[HierarchicalRule, Named], None],
    default: Callable[[Named], Any],
) -> Callable[[Named], Any]:
    """The CUDA-key implementation of an op: the fastest backend that takes the call.

    Args:
        function: one of this module.
        rule_of: the rule that an op's arguments describe.
        check: raises for tensors that do not fit the rule.
        default: the op in plain torch.
    """

    def kernel(named: Named) -> Any:
        rule, device = rule_of(named), named["meta"].device
        unsupported = ""
        floats: list[Tensor] = [named["meta"]]
        if any(tensor.dtype != torch.float32 for tensor in floats):
            unsupported = "its kernels take float32 (planes also bfloat16): convert the tensors"
        chosen = backends.choose(device, unsupported, refuses=objections(rule, device))
        if chosen == "reference":
            return default(named)
        check(rule, named)
        return function(chosen, rule, named)

    return kernel
