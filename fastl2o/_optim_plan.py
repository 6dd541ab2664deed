"""How LearnedOptimizer.step turns parameters with gradients into few list-op calls.

A plan sorts the parameters that have gradients into buckets, one list op each. It is kept between
steps: the next step only makes sure, with a handful of list comparisons, that it still holds.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Set
from dataclasses import dataclass, field, replace
from itertools import accumulate
from operator import attrgetter, is_
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._ops_nonfinite import scratch
from ._optim_problem import global_problem, new_global, place_globals, problem_key, problem_names
from ._optim_shards import is_split, local, placement_problem
from ._optim_state import (
    PARAM_DTYPES,
    Layout,
    as_float,
    describe_param,
    laid_out,
    layout_of,
    new_entry,
    state_problem,
    uses_reference,
)
from .rules import HierarchicalRule, Rule

Groups = list[dict[str, Any]]
State = MutableMapping[Any, Any]

_grad_of = attrgetter("grad")
_dtype_of = attrgetter("dtype")
_shape_of = attrgetter("shape")


class Settings(NamedTuple):
    """What a list op is told besides its tensors; parameters in one bucket share it."""

    rule: Rule
    lr: float
    weight_decay: float
    maximize: bool
    nonfinite: str
    reference: bool
    rounding: tuple[int, int] | None  # seed and step, for stochastic rounding

    @classmethod
    def of(cls, group: dict[str, Any]) -> Settings:
        """Read a param group, a tensor ``lr`` by value."""
        return cls(
            group["rule"],
            as_float(group["lr"]),
            group["weight_decay"],
            group["maximize"],
            group["nonfinite"],
            uses_reference(group),
            (group["seed"], group["rounding_step"]) if group["stochastic_rounding"] else None,
        )

    @classmethod
    def shared_by(cls, group: dict[str, Any]) -> Settings:
        """What parameters of one list op share.

        A hierarchical step takes lr and decay of each, and the seed of any for the rounding.
        """
        settings = cls.of(group)
        if isinstance(settings.rule, HierarchicalRule):
            rounding = settings.rounding and (0, 0)
            settings = settings._replace(lr=1.0, weight_decay=0.0, rounding=rounding)
        return settings


@dataclass(slots=True)
class Bucket:
    """Parameters that one list op takes: same settings, device, dtype and state dtype."""

    group_idx: int  # any group of it: the settings are read there
    where: list[int] = field(default_factory=list)  # indices into Plan.active
    params: list[Tensor] = field(default_factory=list)
    states: list[dict[str, Any]] = field(default_factory=list)
    planes: list[Tensor] = field(default_factory=list)  # of the states
    irregular: list[tuple[int, Layout]] = field(default_factory=list)  # (index in params, layout)
    # Of a rule whose parameters talk to each other: their shared state.
    shared: dict[str, Tensor] | None = None
    split: bool = False  # whether some are DTensors, of which this rank holds parts

    def without(self, left_out: Set[int]) -> Bucket:
        """The same less some of the active parameters."""
        kept = [k for k, i in enumerate(self.where) if i not in left_out]
        layouts = dict(self.irregular)
        return replace(
            self,
            where=[self.where[k] for k in kept],
            params=[self.params[k] for k in kept],
            states=[self.states[k] for k in kept],
            planes=[self.planes[k] for k in kept],
            irregular=[(new, layouts[k]) for new, k in enumerate(kept) if k in layouts],
        )


@dataclass(slots=True)
class Plan:
    """The buckets of one step, and what they were derived from."""

    params: list[Tensor]
    grad_types: list[type]
    pattern: tuple[int, ...]  # for each group, the first one with equal settings
    rules: list[Rule]  # of each group
    owners: list[tuple[int, int]]  # (group, position) of each active parameter
    active: list[Tensor]  # the parameters that have gradients
    split: list[int] = field(default_factory=list)  # indices of active ones that are DTensors
    missing: list[int] = field(default_factory=list)  # indices of active ones without state
    buckets: list[Bucket] = field(default_factory=list)
    dtypes: list[torch.dtype] = field(default_factory=list)  # of the active gradients
    contiguous: tuple[list[bool], list[bool]] = ([], [])  # of active, of their gradients
    all_states: list[Any] = field(default_factory=list)  # everything in optimizer.state
    states: list[dict[str, Any]] = field(default_factory=list)  # of the active parameters
    planes: list[Tensor] = field(default_factory=list)
    irregular: list[int] = field(default_factory=list)
    # Whether dtypes and contiguity are left to the list op, which refuses all that do not fit.
    left_to_op: bool = False
    found: Tensor = field(default_factory=scratch)  # for looking for NaN and Inf

    def fits(self, grads: list[Tensor], state: State) -> bool:
        """Whether the tensors are still what the buckets were built from.

        Parameters may have been given other data (``p.data = ...``). Their dtype is not looked at:
        a gradient has its parameter's, and where it was made not to, the list op refuses it. Nor is
        anything that the op sees itself, where nothing else depends on it (``left_to_op``).
        """
        if self.missing or len(state) != len(self.all_states):
            return False
        try:
            planes = [entry["planes"] for entry in self.states]
            if not all(map(is_, state.values(), self.all_states)) or not all(
                map(is_, planes, self.planes)
            ):
                return False
            if self.left_to_op:
                return True
            # One op checks all of its tensors before it changes any; of several, the first would
            # have stepped before the second refused.
            if len(self.buckets) > 1 and (
                list(map(_dtype_of, self.active)) != self.dtypes
                or list(map(_shape_of, self.active)) != list(map(_shape_of, grads))
            ):
                return False
            return (
                list(map(_dtype_of, grads)) == self.dtypes
                and _contiguity(self.active, grads) == self.contiguous
                and all(grads[i].layout is torch.strided for i in self.irregular)
            )
        except (KeyError, RuntimeError):  # state was emptied; a layout that has no contiguity
            return False


def _contiguity(params: list[Tensor], grads: list[Tensor]) -> tuple[list[bool], list[bool]]:
    is_contiguous = torch.Tensor.is_contiguous
    return list(map(is_contiguous, params)), list(map(is_contiguous, grads))


def gather(groups: Groups, state: State, plan: Plan | None) -> tuple[Plan, list[Tensor]]:
    """Return a plan for this step, ``plan`` if it still holds, and the gradients it goes with.

    Raises:
        RuntimeError: a gradient or an existing state that a rule cannot be applied to. Nothing
            has been changed then, and states that are missing are not created here.
    """
    params: list[Tensor] = [p for group in groups for p in group["params"]]
    grads: list[Any] = list(map(_grad_of, params))
    types: list[type] = list(map(type, grads))
    present: list[Tensor] = [g for g in grads if g is not None] if NoneType in types else grads
    pattern = _pattern(groups)
    rules = [group["rule"] for group in groups]
    if (
        plan is not None
        and types == plan.grad_types
        and pattern == plan.pattern
        and all(map(is_, rules, plan.rules))
        and all(map(is_, params, plan.params))
        and plan.fits(present, state)
    ):
        return plan, present
    owners = [
        (group_idx, position)
        for group_idx, group in enumerate(groups)
        for position, p in enumerate(group["params"])
        if p.grad is not None
    ]
    active = [groups[g]["params"][i] for g, i in owners]
    plan = Plan(params, types, pattern, rules, owners, active)
    for (group_idx, position), p, grad in zip(owners, active, present, strict=True):
        _check_tensors(groups, group_idx, position, p, grad)
    plan.split = [i for i, p in enumerate(active) if is_split(p)]
    plan.missing = [i for i, p in enumerate(active) if not state.get(p)]
    if not plan.missing:
        _fill(plan, groups, state, present)
    return plan, present


def _pattern(groups: Groups) -> tuple[int, ...]:
    """For each group, the first one with equal settings."""
    if len(groups) == 1:
        return (0,)
    first: dict[tuple[Any, ...], int] = {}
    # id: rules compare by identity here, whatever equality they define
    keys = ((id(group["rule"]), *Settings.shared_by(group)[1:]) for group in groups)
    return tuple(first.setdefault(key, i) for i, key in enumerate(keys))


def create_missing(plan: Plan, groups: Groups, state: State, grads: list[Tensor]) -> None:
    """Create the states ``plan`` lacks and sort its buckets."""
    names = problem_names(groups)
    starts = [0, *accumulate(len(group["params"]) for group in groups)]
    for i in plan.missing:
        group_idx, position = plan.owners[i]
        p, group = plan.active[i], groups[group_idx]
        state[p] = new_entry(group, p, starts[group_idx] + position)
        name = names.get(problem_key(group, p))
        if name is not None and name not in state:
            state[name] = new_global(group["rule"], p, group["state_dtype"])
    plan.missing = []
    _fill(plan, groups, state, grads)


def _check_tensors(groups: Groups, group_idx: int, position: int, p: Tensor, grad: Tensor) -> None:
    problem = placement_problem(p, grad) if is_split(p) else None
    if problem is not None:
        pass
    elif p.device.type == "meta":
        problem = "is on the meta device. Materialise the model before the first step"
    elif (p.dtype.to_real() if p.is_complex() else p.dtype) not in PARAM_DTYPES:
        problem = f"has dtype {p.dtype}. Accepted: {PARAM_DTYPES} and complex ones"
    elif grad.layout is not torch.strided:
        problem = (
            f"has a sparse gradient ({grad.layout}), which is not supported. Make it dense "
            "(sparse=False in the layer, or p.grad = p.grad.to_dense()) or use SparseAdam"
        )
    elif grad.dtype != p.dtype or grad.device != p.device or grad.shape != p.shape:
        problem = (
            f"of {p.dtype} on {p.device} has a gradient of {grad.dtype} on {grad.device}, shape "
            f"{tuple(grad.shape)}. They must be alike: convert p.grad before step()"
        )
    elif any(size > 1 and stride == 0 for size, stride in zip(p.shape, p.stride(), strict=True)):
        problem = "is an expanded view whose elements share memory. Give p.contiguous() instead"
    if problem is not None:
        raise RuntimeError(f"{describe_param(groups, group_idx, position)} {problem}")


def _fill(plan: Plan, groups: Groups, state: State, grads: list[Tensor]) -> None:
    """Check the states and sort parameters, states and layouts into the buckets of ``plan``."""
    states: list[dict[str, Any]] = [state[p] for p in plan.active]
    for (group_idx, position), p, entry in zip(plan.owners, plan.active, states, strict=True):
        problem = state_problem(entry, groups[group_idx]["rule"], p)
        if problem is None and entry["planes"].device != p.device:
            problem = f"is on {entry['planes'].device}, the parameter on {p.device}"
        if problem is not None:
            raise RuntimeError(
                f"the state of {describe_param(groups, group_idx, position)} {problem}. If rule, "
                "shape or device were changed on purpose, delete its optimizer.state entry"
            )
    buckets: dict[tuple[Any, ...], Bucket] = {}
    place_globals(groups, state)
    names = problem_names(groups)
    for i, (p, grad, entry) in enumerate(zip(plan.active, grads, states, strict=True)):
        layout = layout_of(local(p))
        if layout is None and not local(grad).is_contiguous():
            layout = Layout(is_complex=False, order=None)
        if not _plain(local(entry["planes"]), layout):
            group = groups[plan.owners[i][0]]
            entry["planes"] = laid_out(entry["planes"], group["rule"], p, entry["planes"].dtype)
        group_idx = plan.pattern[plan.owners[i][0]]
        name = names.get(problem_key(groups[plan.owners[i][0]], p))
        dtype = None if name else p.dtype
        key = (group_idx, name, p.device, dtype, entry["planes"].dtype)
        if key not in buckets:
            buckets[key] = Bucket(group_idx, shared=_shared(name, groups[group_idx]["rule"], state))
        bucket = buckets[key]
        if layout is not None:
            bucket.irregular.append((len(bucket.params), layout))
            plan.irregular.append(i)
        bucket.split |= is_split(p)
        bucket.where.append(i)
        bucket.params.append(p)
        bucket.states.append(entry)
        bucket.planes.append(entry["planes"])
    # The largest first: only the first list op can refuse a gradient before anything is changed.
    plan.buckets = sorted(buckets.values(), key=lambda bucket: -len(bucket.params))
    plan.dtypes = list(map(_dtype_of, plan.active))
    plan.contiguous = _contiguity(plan.active, grads)
    plan.states, plan.all_states = states, list(state.values())
    plan.planes = [entry["planes"] for entry in states]
    plan.left_to_op = (
        len(plan.buckets) == 1
        and not plan.irregular
        and not plan.split
        and plan.active[0].device.type == "cpu"
    )


def _shared(name: str | None, rule: Rule, state: State) -> dict[str, Tensor] | None:
    if name is None:
        return None
    assert isinstance(rule, HierarchicalRule)
    entry = state.get(name)
    problem = global_problem(entry, rule)
    if problem is not None:
        raise RuntimeError(
            f"optimizer.state[{name!r}] {problem}. Its parameters, options or device were changed: "
            "load a state_dict that has it, or empty optimizer.state to start afresh"
        )
    return entry


def _plain(planes: Tensor, layout: Layout | None) -> bool:
    if layout is None or layout.order is None:
        return planes.is_contiguous()
    return planes.permute(0, *(1 + d for d in layout.order)).is_contiguous()
