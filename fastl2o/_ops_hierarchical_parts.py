"""The hierarchical step on tensors that are split over ranks: two ops with a reduction between.

The sums of the first half are all that the parts of a tensor need to know of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends
from ._ops_families import Named, define
from ._ops_hierarchical import _CONFIG_SCHEMA as CONFIG_SCHEMA
from ._ops_hierarchical import _numbers as numbers
from ._ops_hierarchical import _rule as rule_of
from ._rounding import check_seed, round_planes
from .rules import HierarchicalRule


def step_(
    rule: HierarchicalRule,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    planes: Sequence[Tensor],
    tensors: Sequence[Tensor],
    steps: Sequence[Tensor],
    hidden: Tensor,
    *,
    counts: Sequence[int],
    reduce: Callable[[Tensor], None],
    lr: Sequence[float],
    weight_decay: Sequence[float],
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    rounding_seed: int | None = None,
) -> None:
    """One step of one problem, in place, on the parts of its tensors that are here.

    Every rank makes the call with its own parts, which may be empty, and with the same tensor and
    global states, which stay the same. Gradients are not looked at for NaN or Inf: the ranks must
    agree on that beforehand.

    Args:
        rule, tensors, steps, hidden, lr, weight_decay, maximize, grad_scale, rounding_seed: as for
            `_ops_hierarchical.step_`. Random bits are those of a coordinate's place in its part.
        params, grads, planes: contiguous parts and their planes.
        counts: of each tensor, the coordinates of the whole, not 0.
        reduce: adds up `(tensors, rule.num_sums)` float64 sums over the ranks, in place: the one
            communication of a step, of a size that does not depend on the parts.
    """
    if not params:
        return
    if rule.attention:
        raise RuntimeError(f"{rule!r} has attention, which is not there for sharded parameters")
    if rounding_seed is not None:
        check_seed(rounding_seed, planes, "planes")
    dtype = planes[0].dtype
    unsupported = ""
    if dtype not in (torch.float32, torch.bfloat16):
        unsupported = f"its step takes state in float32 or bfloat16, not {dtype}: convert the state"
    device = params[0].device
    chosen = backends.choose(device, unsupported, refuses=_no_gpu)
    wide = torch.promote_types(dtype, torch.float32)
    total = sum(param.numel() for param in params)
    shared: list[Any] = [list(tensors), list(steps), hidden, [], list(counts)]
    shared += [rule.flat_buffer(device, wide), *numbers(rule)]
    sums = torch.zeros((len(params), rule.num_sums), dtype=torch.float64, device=device)
    raw = torch.empty(total, dtype=wide, device=device)
    first = (list(grads), list(planes), *shared, maximize, grad_scale, sums, raw, rounding_seed)
    last = (list(params), *shared, list(map(float, lr)), list(map(float, weight_decay)), sums, raw)
    with torch.no_grad():
        if chosen == "reference":
            _default_sweep_(dict(zip(_SWEEP_NAMES, first, strict=True)))
        else:
            _SWEEP(*first)
        reduce(sums)
        if chosen == "reference":
            _default_finish_(dict(zip(_FINISH_NAMES, last, strict=True)))
        else:
            _FINISH(*last)
    torch.autograd.graph.increment_version([*params, *planes, *tensors, hidden])


def _no_gpu(backend: str) -> str:
    if backend in ("triton", "cuda"):
        return "it has no kernels for hierarchical rules on sharded parameters"
    return ""


def _weights(rule: HierarchicalRule, meta: Tensor) -> dict[str, Tensor]:
    return dict(rule.unflatten(meta))


def _of_problem(named: Named) -> list[tuple[int, list[int]]]:
    count = len(named["tensor_states"])
    problems = named["problems"] or [0] * count
    rows = range(named["global_states"].shape[0])
    listed = [(row, [i for i in range(count) if problems[i] == row]) for row in rows]
    return [(row, mine) for row, mine in listed if mine]


def _default_sweep_(named: Named) -> None:
    rule, meta = rule_of(named), named["meta"]
    weights = _weights(rule, meta)
    raw_steps = named["raw"].split([grad.numel() for grad in named["grads"]])
    seed = named["rounding_seed"]
    for row, mine in _of_problem(named):
        hidden = named["global_states"][row].to(meta.dtype)
        total = sum(named["counts"][i] for i in mine)
        rates = [named["tensor_states"][i][-1] * (named["counts"][i] / total) for i in mine]
        for i in mine:
            grad = named["grads"][i].to(meta.dtype)
            if named["grad_scale"] is not None:
                grad = grad / named["grad_scale"].to(meta.dtype)
                named["grads"][i].copy_(grad)
            swept = rule.reference_sweep(
                -grad if named["maximize"] else grad,
                named["planes"][i] if seed is None else named["planes"][i].float(),
                named["tensor_states"][i],
                int(named["steps"][i]) == 0,
                hidden,
                torch.stack(rates).sum(),
                weights,
            )
            new_planes = swept.planes if seed is None else round_planes(swept.planes, seed, i)
            named["planes"][i].copy_(new_planes)
            named["sums"][i].copy_(swept.sums)
            raw_steps[i].copy_(swept.raw.reshape(-1))


def _default_finish_(named: Named) -> None:
    rule, meta = rule_of(named), named["meta"]
    weights = _weights(rule, meta)
    raw_steps = named["raw"].split([param.numel() for param in named["params"]])
    for row, mine in _of_problem(named):
        hidden = named["global_states"][row].to(meta.dtype)
        for i in mine:
            param, tensor = named["params"][i], named["tensor_states"][i]
            means = (named["sums"][i] / named["counts"][i]).to(meta.dtype)
            new_tensor, rms = rule.reference_finish(means, tensor, hidden, weights)
            tensor.copy_(new_tensor)
            lr = named["lr"][i]
            wide = torch.promote_types(param.dtype, torch.float32)
            update = (-raw_steps[i] / rms).to(wide).view_as(param)
            param.copy_((1.0 - lr * named["weight_decay"][i]) * param.to(wide) + lr * update)
            named["steps"][i].add_(1)
        mine_now = [named["tensor_states"][i].to(meta.dtype) for i in mine]
        named["global_states"][row].copy_(rule.reference_global(mine_now, hidden, weights))


def _define(name: str, schema: str, default: Any) -> tuple[Any, tuple[str, ...]]:
    op = define(name, schema, default, lambda named: None, default)
    return op, tuple(argument.name for argument in op._schema.arguments)


_SWEEP, _SWEEP_NAMES = _define(
    "hierarchical_sweep_",
    "(Tensor(a!)[] grads, Tensor(b!)[] planes, Tensor[] tensor_states, Tensor[] steps, "
    f"Tensor global_states, int[] problems, int[] counts, Tensor meta, {CONFIG_SCHEMA}, "
    "bool maximize, Tensor? grad_scale, Tensor(c!) sums, Tensor(d!) raw, int? rounding_seed=None) "
    "-> ()",
    _default_sweep_,
)
_FINISH, _FINISH_NAMES = _define(
    "hierarchical_finish_",
    "(Tensor(a!)[] params, Tensor(b!)[] tensor_states, Tensor(c!)[] steps, "
    f"Tensor(d!) global_states, int[] problems, int[] counts, Tensor meta, {CONFIG_SCHEMA}, "
    "float[] lr, float[] weight_decay, Tensor sums, Tensor raw) -> ()",
    _default_finish_,
)
