"""The hierarchical rule's ops: schemas, implementations in plain torch, and their dispatch.

A call steps one or several *problems*: all tensors of a problem share its global state. An
optimizer is one problem; each run of a meta-training is one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from . import _ops_hierarchical_gpu as gpu
from . import backends
from ._ops_families import Named, define
from ._ops_reference import NONFINITE, check_lists, nonfinite_message
from ._rounding import check_seed, round_planes
from .rules import HierarchicalRule, _runs
from .rules.hierarchical import ProblemState

_CONFIG = ("param_size", "tensor_size", "global_size", "num_scales")
_CONFIG_SCHEMA = ", ".join(f"int {name}" for name in _CONFIG)


def step_(
    rule: HierarchicalRule,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    planes: Sequence[Tensor],
    tensors: Sequence[Tensor],
    steps: Sequence[Tensor],
    hidden: Tensor,
    *,
    problems: Sequence[int] = (),
    lr: Sequence[float],
    weight_decay: Sequence[float],
    maximize: bool = False,
    nonfinite: str = "raise",
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    meta: Tensor | None = None,
    rounding_seed: int | None = None,
) -> None:
    """Take one step of a hierarchical rule in place on lists of tensors.

    A call that raises has changed nothing.

    Args:
        rule: the rule, whose meta-parameters are read now.
        params, grads: as for `fastl2o.ops.step_`.
        planes, tensors: states as `HierarchicalRule.init_tensor` makes them: `(state_planes,
            *param.shape)` in float32 or bfloat16 (the reference backend also takes float64), and
            `(tensor_size + 1,)`.
        steps: 0-dim float32 tensors, steps that each tensor has taken; incremented.
        hidden: global states `(problems, global_size)`.
        problems: the problem of each tensor; empty: all belong to the only one.
        lr, weight_decay: of each tensor.
        maximize, nonfinite, grad_scale, found_inf, rounding_seed: as for `fastl2o.ops.step_`; a
            tensor that is skipped takes no part in the means. Stochastic rounding is of the planes.
        meta: flat meta-parameters `(M,)` in place of the rule's own, or a row for each problem,
            `(problems, M)`.

    Raises:
        As `fastl2o.ops.step_`.
    """
    mode = NONFINITE.get(nonfinite)
    if mode is None:
        raise ValueError(
            f"Invalid nonfinite: {nonfinite!r}; pass one of {', '.join(map(repr, NONFINITE))}"
        )
    if not params:
        return
    if rounding_seed is not None:
        check_seed(rounding_seed, planes, "planes")
    dtype = planes[0].dtype
    unsupported = ""
    if dtype not in (torch.float32, torch.bfloat16):
        unsupported = f"its step takes state in float32 or bfloat16, not {dtype}: convert the state"
    unsupported = _no_kernels(rule, unsupported)
    device = params[0].device
    refuses = gpu.objections(rule, device)
    chosen = backends.choose(device, unsupported, refuses)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if meta is None:
        meta = rule.flat_buffer(device, wide)
    else:
        _check_meta(rule, meta, hidden.shape[0], rounding_seed)
        meta = meta.detach().to(device, wide).contiguous()
    arguments = (
        *(list(params), list(grads), list(planes), list(tensors), list(steps), hidden),
        *(list(problems), meta, *_numbers(rule)),
        *(list(map(float, lr)), list(map(float, weight_decay)), maximize, mode),
        *(grad_scale, found_inf, rounding_seed),
    )
    # entering no_grad again costs more than asking
    with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
        if chosen == "reference":
            _default_step_({**dict(zip(_STEP_NAMES, arguments, strict=True)), "rule": rule})
        elif chosen == "triton" and device.type == "cpu":  # its interpreter
            named = dict(zip(_STEP_NAMES, arguments, strict=True))
            _check_step(rule, named)
            gpu.step_(chosen, rule, named)
        else:
            _STEP(*arguments)
    # The kernel writes through raw pointers: autograd must learn that these tensors have changed.
    torch.autograd.graph.increment_version([*params, *planes, *tensors, hidden])


def runs_step_(
    rule: HierarchicalRule,
    params: Tensor,
    grads: Tensor,
    state: Tensor,
    step: int,
    sizes: Sequence[int],
    lr: float,
    weight_decay: float,
    meta: Tensor | None = None,
) -> None:
    """Step a batch of runs in place, each a problem of one list op.

    Args:
        rule: the rule, whose meta-parameters are read now.
        params, grads: `(R, D)`, contiguous; gradients that are not finite are passed on.
        state: `(R, W)`, as `rule.init_runs` makes it.
        step: steps that the runs have taken.
        sizes: how many of the D coordinates each tensor of a run has.
        lr, weight_decay: as for `fastl2o.ops.step_`.
        meta: as for `step_`, a problem a run.
    """
    runs, count = params.shape[0], len(sizes)
    rows = [_runs.views(rule, row, sizes) for row in state]
    hidden = torch.stack([row[2] for row in rows])
    step_(
        rule,
        [piece for run in params for piece in run.split(list(sizes))],
        [piece for run in grads for piece in run.split(list(sizes))],
        [planes for row in rows for planes in row[0]],
        [tensor for row in rows for tensor in row[1]],
        list(torch.full((runs * count,), float(step), dtype=params.dtype).unbind()),
        hidden,
        problems=[run for run in range(runs) for _ in range(count)],
        lr=[lr] * (runs * count),
        weight_decay=[weight_decay] * (runs * count),
        nonfinite="pass",
        meta=meta,
    )
    for row, new in zip(rows, hidden, strict=True):
        row[2].copy_(new)


def unroll_backward(
    rule: HierarchicalRule,
    grads: Tensor,
    state: Tensor,
    loss_weights: Tensor,
    *,
    steps: int,
    step: int,
    sizes: Sequence[int],
    lr: float,
    weight_decay: float,
    meta: Tensor,
    d_updates: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`fastl2o.ops.unroll_backward` for this rule, arguments checked, runs' states `(R, W)`."""
    unsupported = ""
    if {grads.dtype, state.dtype, meta.dtype} != {torch.float32}:
        unsupported = "its functional ops take float32 tensors: convert them"
    unsupported = _no_kernels(rule, unsupported)
    refuses = gpu.objections(rule, grads.device)
    chosen = backends.choose(grads.device, unsupported, refuses=refuses)
    arguments = (
        *(grads.contiguous(), state.contiguous(), int(step), meta),
        *(loss_weights.to(meta.dtype).contiguous(), int(steps), list(sizes)),
        *(*_numbers(rule), float(lr), float(weight_decay)),
        None if d_updates is None else d_updates.to(meta.dtype).contiguous(),
    )
    with torch.no_grad():
        if chosen == "reference":
            named = dict(zip(_UNROLL_NAMES, arguments, strict=True))
            return _default_unroll({**named, "rule": rule})
        if chosen == "triton" and grads.device.type == "cpu":  # its interpreter
            named = dict(zip(_UNROLL_NAMES, arguments, strict=True))
            gpu.check_unroll(rule, named)
            return gpu.unroll_backward(chosen, rule, named)
        d_meta, d_state = _UNROLL(*arguments)
    return d_meta, d_state


def _numbers(rule: HierarchicalRule) -> tuple[int, ...]:
    return tuple(getattr(rule, name) for name in _CONFIG)


@functools.lru_cache(maxsize=64)
def _maths(sizes: tuple[int, int, int, int]) -> HierarchicalRule:
    """A rule to run the reference maths with; its own meta-parameters take no memory."""
    with torch.device("meta"):
        return HierarchicalRule(*sizes)


def _rule(named: Named) -> HierarchicalRule:
    rule = named.get("rule")  # of a call that is not by the op, which cannot say all of a rule
    if rule is not None:
        return rule
    return _maths(tuple(named[name] for name in _CONFIG))


def _no_kernels(rule: HierarchicalRule, problem: str) -> str:
    if rule.attention:
        return f"it has no kernels for {rule!r}, whose attention=True"
    return problem


def _default_step_(named: Named) -> None:
    rule = _rule(named)
    _check_step(rule, named)
    found_inf = named["found_inf"]
    if found_inf is not None and found_inf.item() != 0.0:
        return
    grads: list[Tensor] = named["grads"]
    finite = [True] * len(grads)
    if named["nonfinite"] != NONFINITE["pass"]:
        finite = [bool(torch.isfinite(grad).all()) for grad in grads]
        if named["nonfinite"] == NONFINITE["raise"] and not all(finite):
            raise RuntimeError(nonfinite_message(finite.index(False)))
    problems = named["problems"] or [0] * len(grads)
    for number in range(named["global_states"].shape[0]):
        mine = [i for i, problem in enumerate(problems) if problem == number and finite[i]]
        _step_problem(rule, named, number, mine)


def _step_problem(rule: HierarchicalRule, named: Named, number: int, mine: list[int]) -> None:
    hidden = named["global_states"][number]
    params, planes, steps = named["params"], named["planes"], named["steps"]
    tensors = named["tensor_states"]
    dtype = torch.promote_types(planes[mine[0]].dtype if mine else hidden.dtype, torch.float32)
    seen = []
    for i in mine:
        grad = named["grads"][i].to(dtype)
        if named["grad_scale"] is not None:
            grad = grad / named["grad_scale"].to(dtype)
            named["grads"][i].copy_(grad)
        seen.append(-grad if named["maximize"] else grad)
    seed = named["rounding_seed"]
    state = ProblemState(
        [planes[i] if seed is None else planes[i].float() for i in mine],
        [tensors[i] for i in mine],
        [int(steps[i]) for i in mine],
        hidden.to(dtype),
    )
    meta = named["meta"]
    updates, new = rule.reference_step(seen, state, meta if meta.dim() == 1 else meta[number])
    for place, i in enumerate(mine):
        update, param = updates[place], params[i]
        if update is None or not param.numel():
            continue
        new_planes = new.planes[place]
        if seed is not None:
            new_planes = round_planes(new_planes, seed, i)
            if rule.attention:  # as it is stored, so that taking it back gives the parameters
                update = update + (new_planes[-1].to(dtype) - new.planes[place][-1])
        lr = named["lr"][i]
        wide = torch.promote_types(param.dtype, torch.float32)
        keep = 1.0 - lr * named["weight_decay"][i]
        param.copy_(keep * param.to(wide) + lr * update.to(wide))
        planes[i].copy_(new_planes)
        tensors[i].copy_(new.tensors[place])
        steps[i].add_(1)
    hidden.copy_(new.hidden)


def _check_meta(
    rule: HierarchicalRule, meta: Tensor, problems: int, rounding_seed: int | None
) -> None:
    size = rule.num_meta_parameters
    if meta.shape not in ((size,), (problems, size)):
        raise ValueError(
            f"meta: expected shape ({size},), or ({problems}, {size}) with a row for each problem, "
            f"got {tuple(meta.shape)}"
        )
    if meta.dim() == 2 and rounding_seed is not None:
        raise ValueError(
            "meta with a row for each problem takes no rounding_seed: round to nearest, or step "
            "each problem in a call of its own"
        )


def _check_step(rule: HierarchicalRule, named: Named) -> None:
    params, tensors = named["params"], named["tensor_states"]
    count = len(params)
    names = ("grads", "planes", "tensor_states", "steps", "lr", "weight_decay")
    lengths = [len(named[name]) for name in names]
    if any(length != count for length in lengths) or len(named["problems"]) not in (0, count):
        raise ValueError(
            f"{', '.join(names)}: expected lists as long as params, {count}, got {lengths}, and "
            f"problems empty or as long, got {len(named['problems'])}"
        )
    check_lists(rule, params, named["grads"], named["planes"], named["steps"])
    hidden = named["global_states"]
    if hidden.dim() != 2 or hidden.shape[1] != rule.global_size:
        raise ValueError(
            f"global_states: expected shape (problems, {rule.global_size}), got "
            f"{tuple(hidden.shape)}"
        )
    for index, tensor in enumerate(tensors):
        if tensor.shape != (rule.tensor_size + 1,):
            raise ValueError(
                f"tensor_states[{index}]: expected shape ({rule.tensor_size + 1},), got "
                f"{tuple(tensor.shape)}; make it with rule.init_tensor(param, generator)"
            )
    for index, problem in enumerate(named["problems"]):
        if not 0 <= problem < hidden.shape[0]:
            raise ValueError(
                f"problems[{index}]: {problem}; there are global states of {hidden.shape[0]}"
            )


def _default_unroll(named: Named) -> tuple[Tensor, Tensor]:
    """The window's gradient, one step's vector-Jacobian product at a time."""
    rule, grads, weights = _rule(named), named["grads"], named["loss_weights"]
    steps, step, sizes, lr = (named[name] for name in ("steps", "step", "sizes", "lr"))
    meta: Tensor = named["meta"]
    given: Tensor | None = named.get("d_updates")
    states = [named["state"]]
    for t in range(steps - 1):
        states.append(rule.reference_runs_step(grads[t], states[t], step + t, sizes, meta)[1])
    adjoint = torch.zeros_like(grads[0])
    if grads.shape[0] > steps:
        adjoint = weights[steps, :, None] * grads[steps]
    d_state, d_meta = torch.zeros_like(states[0]), torch.zeros_like(meta)
    for t in reversed(range(steps)):
        leaves = (states[t].detach().requires_grad_(), meta.detach().requires_grad_())
        with torch.enable_grad():
            results = rule.reference_runs_step(grads[t], leaves[0], step + t, sizes, leaves[1])
        d_update = lr * adjoint if given is None else given[t]
        d_state, d_step = torch.autograd.grad(
            results, leaves, (d_update, d_state), materialize_grads=True
        )
        d_meta += d_step
        adjoint = weights[t, :, None] * grads[t] + (1.0 - lr * named["weight_decay"]) * adjoint
    return d_meta, d_state


def _fake_unroll(named: Named) -> tuple[Tensor, Tensor]:
    return torch.empty_like(named["meta"]), torch.empty_like(named["state"])


def _define(
    name: str, schema: str, default: Any, fake: Any, on_gpu: Any
) -> tuple[Any, tuple[str, ...]]:
    op = define(name, schema, default, fake, on_gpu)
    return op, tuple(argument.name for argument in op._schema.arguments)


_STEP, _STEP_NAMES = _define(
    "hierarchical_step_",
    "(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] planes, Tensor(d!)[] tensor_states, "
    "Tensor(e!)[] steps, Tensor(f!) global_states, int[] problems, Tensor meta, "
    f"{_CONFIG_SCHEMA}, float[] lr, float[] weight_decay, bool maximize, int nonfinite, "
    "Tensor? grad_scale=None, Tensor? found_inf=None, int? rounding_seed=None) -> ()",
    _default_step_,
    lambda named: None,
    gpu.dispatched(gpu.step_, _rule, _check_step, _default_step_),
)
_UNROLL, _UNROLL_NAMES = _define(
    "hierarchical_unroll_backward",
    "(Tensor grads, Tensor state, int step, Tensor meta, Tensor loss_weights, int steps, "
    f"int[] sizes, {_CONFIG_SCHEMA}, float lr, float weight_decay, Tensor? d_updates=None) "
    "-> (Tensor, Tensor)",
    _default_unroll,
    _fake_unroll,
    gpu.dispatched(gpu.unroll_backward, _rule, gpu.check_unroll, _default_unroll),
)
