"""What LearnedOptimizer keeps: checked options, per-parameter state and its checkpoint form."""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from ._hub import is_address
from ._optim_shards import is_split, local, part_of, planes_of
from ._rounding import step_seed
from .rules import CoordinateRule, HierarchicalRule, Rule

NONFINITE_POLICIES = ("raise", "skip", "pass")
STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
PARAM_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Looked at on every step for values assigned since the last.
CHECKED_OPTIONS = (
    *("rule", "lr", "weight_decay", "maximize", "nonfinite", "state_dtype", "foreach", "fused"),
    *("stochastic_rounding", "seed"),
)

# What a group of an older checkpoint, or one unpickled from it, is completed with.
GROUP_DEFAULTS: dict[str, Any] = {
    "lr": 1.0,
    "weight_decay": 0.0,
    "maximize": False,
    "nonfinite": "raise",
    "state_dtype": torch.float32,
    "foreach": None,
    "fused": None,
    "capturable": False,
    "differentiable": False,
    "stochastic_rounding": False,
    "seed": 0,
    "rounding_step": 0,
    "ahead": 0.0,
    "evaluating": False,
}

# What a parameter's state holds that torch's load_state_dict must not cast or share.
OWN_ENTRIES = ("planes", "step", "tensor", "global")

_HOOKS = (
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


@contextmanager
def without_hooks(optimizer: Optimizer) -> Iterator[None]:
    """Keep the base class from calling checkpoint hooks: the caller does, at the right moments."""
    kept = {name: getattr(optimizer, name) for name in _HOOKS}
    optimizer.__dict__.update({name: OrderedDict() for name in _HOOKS})
    try:
        yield
    finally:
        optimizer.__dict__.update(kept)


def resolve_rule(rule: Rule | str | os.PathLike[str]) -> Rule:
    """Return ``rule`` itself, or the one a shipped name or a .safetensors path stands for."""
    if isinstance(rule, Rule):
        return rule
    if isinstance(rule, (str, os.PathLike)):
        from . import load  # the package imports this module, so only at call time

        if is_address(rule):
            raise ValueError(
                f"Invalid rule: {rule!r}. An optimizer downloads nothing: give it what "
                f"fastl2o.load({rule!r}) returns"
            )
        return load(rule)
    raise TypeError(
        f"Invalid rule: {type(rule).__name__}. Give a fastl2o Rule such as fastl2o.LSTMRule(), "
        "the name of a shipped rule (fastl2o.zoo.names()) or a path to a .safetensors file"
    )


def check_options(options: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the option and its value, unless a group's options are usable.

    Only the options that are present are looked at, so it serves constructor arguments, new
    groups and the groups of a checkpoint alike.
    """
    lr = options.get("lr", 1.0)
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(
                f"Invalid lr: tensor of shape {tuple(lr.shape)}. Tensor lr must be 1-element"
            )
        if options.get("foreach") and not options.get("capturable"):
            raise ValueError(
                "lr as a Tensor is not supported for capturable=False and foreach=True"
            )
    _check_number("lr", lr)
    _check_number("weight_decay", options.get("weight_decay", 0.0))
    nonfinite = options.get("nonfinite", "raise")
    if nonfinite not in NONFINITE_POLICIES:
        raise ValueError(f"Invalid nonfinite: {nonfinite!r}. Accepted: {NONFINITE_POLICIES}")
    state_dtype = options.get("state_dtype", torch.float32)
    if state_dtype not in STATE_DTYPES:
        raise ValueError(f"Invalid state_dtype: {state_dtype}. Accepted: {STATE_DTYPES}")
    for name in ("maximize", "capturable", "differentiable", "evaluating"):
        if not isinstance(options.get(name, False), bool):
            raise ValueError(f"Invalid {name}: {options[name]!r}. Accepted: True and False")
    for name in ("foreach", "fused"):
        if not isinstance(options.get(name), (bool, NoneType)):
            raise ValueError(f"Invalid {name}: {options[name]!r}. Accepted: True, False and None")
    _check_number("ahead", options.get("ahead", 0.0))
    check_flags(options)
    _check_rounding(options, state_dtype)


def check_state_dtype(group: Mapping[str, Any], index: int, state: Mapping[Any, Any]) -> None:
    """Raise ValueError if a group asks for another dtype than the one its states were made in."""
    made = next((state[p]["planes"] for p in group["params"] if "planes" in state.get(p, ())), None)
    if isinstance(made, Tensor) and made.dtype != group["state_dtype"]:
        raise ValueError(
            f"Invalid state_dtype: {group['state_dtype']} for group {index}, but its states were "
            f"made in {made.dtype} and are not converted. Set it back, or delete their entries of "
            "optimizer.state, which begins them anew"
        )


def plain_numbers(options: dict[str, Any]) -> None:
    """Turn numbers of other kinds into Python's, which are all that ``weights_only`` reads."""
    for name in ("lr", "weight_decay"):
        value = options.get(name, 0.0)
        if not isinstance(value, Tensor) and type(value) not in (int, float):
            options[name] = float(value)


def _check_rounding(options: Mapping[str, Any], state_dtype: torch.dtype) -> None:
    for name in ("seed", "rounding_step"):
        value = options.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
            raise ValueError(f"Invalid {name}: {value!r}. Accepted: an int from 0 to 2^63 - 1")
    rounding = options.get("stochastic_rounding", False)
    if not isinstance(rounding, bool):
        raise ValueError(f"Invalid stochastic_rounding: {rounding!r}. Accepted: True and False")
    if rounding and state_dtype != torch.bfloat16:
        raise ValueError(
            f"stochastic_rounding=True with state_dtype={state_dtype}. Give "
            "state_dtype=torch.bfloat16, the only state that is rounded"
        )
    if rounding and options.get("differentiable"):
        raise ValueError(
            "stochastic_rounding=True with differentiable=True: rounding at random has no "
            "derivative. Keep one of them"
        )


def check_flags(options: Mapping[str, Any]) -> None:
    """Raise RuntimeError for a pair of implementation flags that exclude each other."""
    if options.get("fused") and options.get("foreach"):
        raise RuntimeError("`fused` and `foreach` cannot be `True` together. Keep one of them")
    for name in ("fused", "foreach"):
        if options.get(name) and options.get("differentiable"):
            raise RuntimeError(f"`{name}` does not support `differentiable`. Keep one of them")


def as_float(number: float | Tensor) -> float:
    """Return a number or the value of a 1-element tensor; float() warns of one that needs grad."""
    return float(number.detach()) if isinstance(number, Tensor) else float(number)


def _check_number(name: str, value: Any) -> None:
    # float() takes text and booleans too.
    usable = isinstance(value, Real) and not isinstance(value, bool)
    if isinstance(value, Tensor):
        usable = value.dtype != torch.bool
    try:
        number = as_float(value) if usable else math.nan
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not 0.0 <= number < math.inf:
        raise ValueError(f"Invalid {name}: {value}. Accepted: a finite number >= 0")


def uses_reference(group: Mapping[str, Any]) -> bool:
    """Whether a group asked for the reference loop, with the meaning torch gives the flags."""
    foreach, fused = group["foreach"], group["fused"]
    return not (foreach or fused or (foreach is None and fused is None))


def describe_param(groups: list[dict[str, Any]], group_idx: int, position: int) -> str:
    """Return a phrase that tells a user which parameter is meant."""
    group = groups[group_idx]
    shape = tuple(group["params"][position].shape)
    if "param_names" in group:
        name = group["param_names"][position]
        return f"parameter {name!r} (group {group_idx}, position {position}, shape {shape})"
    return f"parameter {position} of group {group_idx} (shape {shape})"


class Layout(NamedTuple):
    """How a parameter that is not a plain contiguous real tensor is shown to a list op.

    Attributes:
        is_complex: it is taken as a real tensor with a last dimension of two.
        order: its dimensions from slowest to fastest, if it is dense in that order (a
            channels_last or transposed parameter): then a permuted view needs no copy.
            None: no such order, so it is stepped in a contiguous copy.
    """

    is_complex: bool
    order: tuple[int, ...] | None

    def view(self, tensor: Tensor, planes: int = 0) -> Tensor:
        """View ``tensor`` of the parameter's shape, behind ``planes`` leading dimensions."""
        if self.is_complex and tensor.is_complex():
            tensor = torch.view_as_real(tensor.resolve_conj())
        if self.order is None:
            return tensor
        return tensor.permute(*range(planes), *(planes + d for d in self.order))


def layout_of(param: Tensor) -> Layout | None:
    """Return how ``param`` must be viewed, or None if it can be used as it is."""
    if param.is_complex():
        return Layout(True, _dense_order(torch.view_as_real(param.detach().resolve_conj())))
    if param.is_contiguous():
        return None
    return Layout(False, _dense_order(param))


def _dense_order(tensor: Tensor) -> tuple[int, ...] | None:
    strides = tensor.stride()
    order = tuple(sorted(range(tensor.dim()), key=lambda d: -strides[d]))
    return order if tensor.permute(order).is_contiguous() else None


def new_planes(rule: Rule, param: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a fresh state (S, *param.shape), its planes laid out in memory as ``param`` is.

    A hierarchical rule's is zeros, to be filled in.

    A complex parameter gives (S, *param.shape, 2), one that is split over ranks a DTensor.
    """
    param = param.detach()
    if is_split(param):
        return planes_of(new_planes(rule, local(param), dtype), param)
    layout = layout_of(param)
    if layout is None:
        return _blank(rule, param, dtype)
    real = torch.view_as_real(param.resolve_conj()) if layout.is_complex else param
    order = layout.order or tuple(range(real.dim()))
    planes = _blank(rule, real.permute(order), dtype)
    inverse = sorted(range(real.dim()), key=lambda d: order[d])
    return planes.permute(0, *(1 + d for d in inverse))


def _blank(rule: Rule, like: Tensor, dtype: torch.dtype) -> Tensor:
    if isinstance(rule, CoordinateRule):
        return rule.init_state(like, dtype)
    return like.new_zeros((rule.state_planes, *like.shape), dtype=dtype)


def new_entry(group: Mapping[str, Any], param: Tensor, index: int) -> dict[str, Tensor]:
    """Return the state of a parameter before its first step.

    ``index``, its place among all parameters, and the group's seed decide what is random about it.
    """
    rule: Rule = group["rule"]
    entry = {"planes": new_planes(rule, param, group["state_dtype"])}
    if rule.needs_step:
        entry["step"] = new_step(0.0, param.device)
    if isinstance(rule, HierarchicalRule):
        generator = torch.Generator().manual_seed(step_seed(group["seed"], 0, index))
        real = param.detach()
        real = torch.view_as_real(real.resolve_conj()) if real.is_complex() else real
        planes, entry["tensor"] = rule.init_tensor(
            local(real),
            generator,
            group["state_dtype"],
            shape=real.shape,
            part=(lambda rates: part_of(rates, real)) if is_split(real) else None,
        )
        local(entry["planes"]).copy_(planes)
    return entry


def laid_out(planes: Tensor, rule: Rule, param: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a copy of ``planes`` in ``dtype`` on the device and in the layout of ``param``.

    For a parameter that is split over ranks, ``planes`` may be whole or split like it.
    """
    if is_split(param):
        fresh = new_planes(rule, param, dtype)
        own = local(planes) if is_split(planes) else part_of(planes, param, ahead=1)
        local(fresh).copy_(own)
        return fresh
    return new_planes(rule, param, dtype).copy_(planes)


def state_problem(state: Mapping[str, Any], rule: Rule, param: Tensor) -> str | None:
    """Return what keeps ``state`` from being the state of ``rule`` for ``param``, or None."""
    wanted = (rule.state_planes, *param.shape, *((2,) if param.is_complex() else ()))
    planes = state.get("planes")
    if not isinstance(planes, Tensor):
        return f"holds {sorted(map(str, state))} but no 'planes' tensor"
    for name, value in state.items():
        if isinstance(value, Tensor) and not _has_numbers(value):
            return f"has {name!r} as a {value.layout} tensor on {value.device}, without its numbers"
    if tuple(planes.shape) != wanted:
        return f"has planes of shape {tuple(planes.shape)}, not {wanted}"
    if planes.dtype not in STATE_DTYPES:
        return f"has planes of dtype {planes.dtype}, not one of {STATE_DTYPES}"
    if isinstance(rule, HierarchicalRule):
        tensor = state.get("tensor")
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != (rule.tensor_size + 1,):
            return f"has no 'tensor' of shape ({rule.tensor_size + 1},)"
    if rule.needs_step != ("step" in state):
        return "has no 'step'" if rule.needs_step else "has a 'step', which this rule has not"
    if rule.needs_step and not (
        isinstance(step := state["step"], (int, float, Tensor))
        and (not isinstance(step, Tensor) or (step.numel() == 1 and not step.is_complex()))
        and 0 <= as_float(step) < math.inf
    ):
        return f"has an impossible 'step': {step}"
    return None


def _has_numbers(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.device.type != "meta"


def new_step(value: float | Tensor, device: torch.device) -> Tensor:
    """Return a step counter: a new 0-dim float32 tensor."""
    return torch.tensor(as_float(value), dtype=torch.float32, device=device)
