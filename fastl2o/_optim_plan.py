"""How LearnedOptimizer.step turns parameters with gradients into few list-op calls.

A plan sorts the parameters that have gradients into buckets, one list op each. It is kept between
steps: the next step only makes sure, with a handful of list comparisons, that it still holds.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from . import ops
from ._optim_state import (
    PARAM_DTYPES,
    Layout,
    as_float,
    describe_param,
    laid_out,
    layout_of,
    new_planes,
    new_step,
    state_problem,
    uses_reference,
)
from ._rounding import step_seed
from .backends import backend, requested
from .rules import Rule

Groups = list[dict[str, Any]]
State = MutableMapping[Any, Any]

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


@dataclass(slots=True)
class Bucket:
    """Parameters that one list op takes: same settings, device, dtype and state dtype."""

    group_idx: int  # any group of it: the settings are read there
    where: list[int] = field(default_factory=list)  # indices into Plan.active
    params: list[Tensor] = field(default_factory=list)
    states: list[dict[str, Any]] = field(default_factory=list)
    irregular: list[tuple[int, Layout]] = field(default_factory=list)  # (index in params, layout)


@dataclass(slots=True)
class Plan:
    """The buckets of one step, and what they were derived from."""

    params: list[Tensor]
    grad_types: list[type]
    pattern: tuple[int, ...]  # for each group, the first one with equal settings
    rules: list[Rule]  # of each group
    owners: list[tuple[int, int]]  # (group, position) of each active parameter
    active: list[Tensor]  # the parameters that have gradients
    missing: list[int] = field(default_factory=list)  # indices of active ones without state
    buckets: list[Bucket] = field(default_factory=list)
    dtypes: list[torch.dtype] = field(default_factory=list)  # of the active gradients
    contiguous: tuple[list[bool], list[bool]] = ([], [])  # of active, of their gradients
    all_states: list[Any] = field(default_factory=list)  # everything in optimizer.state
    states: list[dict[str, Any]] = field(default_factory=list)  # of the active parameters
    planes: list[Tensor] = field(default_factory=list)
    irregular: list[int] = field(default_factory=list)

    def fits(self, grads: list[Tensor], state: State) -> bool:
        """Whether the tensors are still what the buckets were built from.

        Parameters may have been given other data (``p.data = ...``). Their dtype is not looked at:
        a gradient has its parameter's, and where it was made not to, the list op refuses it.
        """
        if self.missing or len(state) != len(self.all_states):
            return False
        try:
            planes = [entry["planes"] for entry in self.states]
            # One op checks all of its tensors before it changes any; of several, the first would
            # have stepped before the second refused.
            if len(self.buckets) > 1 and (
                list(map(_dtype_of, self.active)) != self.dtypes
                or list(map(_shape_of, self.active)) != list(map(_shape_of, grads))
            ):
                return False
            return (
                all(map(is_, state.values(), self.all_states))
                and all(map(is_, planes, self.planes))
                and list(map(_dtype_of, grads)) == self.dtypes
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
    grads = [p.grad for p in params]
    types: list[type] = list(map(type, grads))
    present: list[Tensor] = [g for g in grads if g is not None]
    first: dict[tuple[Any, ...], int] = {}
    # id: rules compare by identity here, whatever equality they define
    keys = ((id(group["rule"]), *Settings.of(group)[1:]) for group in groups)
    pattern = tuple(first.setdefault(key, i) for i, key in enumerate(keys))
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
    plan.missing = [i for i, p in enumerate(active) if not state.get(p)]
    if not plan.missing:
        _fill(plan, groups, state, present)
    return plan, present


def create_missing(plan: Plan, groups: Groups, state: State, grads: list[Tensor]) -> None:
    """Create the states ``plan`` lacks, all of them zero, and sort its buckets."""
    for i in plan.missing:
        p, group = plan.active[i], groups[plan.owners[i][0]]
        rule = group["rule"]
        entry = {"planes": new_planes(rule, p, group["state_dtype"])}
        if rule.needs_step:
            entry["step"] = new_step(0.0, p.device)
        state[p] = entry
    plan.missing = []
    _fill(plan, groups, state, grads)


def _check_tensors(groups: Groups, group_idx: int, position: int, p: Tensor, grad: Tensor) -> None:
    problem = None
    if hasattr(p, "to_local"):
        problem = (
            "is a DTensor, and sharded parameters are not supported yet. Train it unsharded "
            "(DistributedDataParallel works)"
        )
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
    for i, (p, grad, entry) in enumerate(zip(plan.active, grads, states, strict=True)):
        layout = layout_of(p)
        if layout is None and not grad.is_contiguous():
            layout = Layout(is_complex=False, order=None)
        if not _plain(entry["planes"], layout):
            group = groups[plan.owners[i][0]]
            entry["planes"] = laid_out(entry["planes"], group["rule"], p, entry["planes"].dtype)
        group_idx = plan.pattern[plan.owners[i][0]]
        key = (group_idx, p.device, p.dtype, entry["planes"].dtype)
        bucket = buckets.setdefault(key, Bucket(group_idx))
        if layout is not None:
            bucket.irregular.append((len(bucket.params), layout))
            plan.irregular.append(i)
        bucket.where.append(i)
        bucket.params.append(p)
        bucket.states.append(entry)
    # The largest first: only the first list op can refuse a gradient before anything is changed.
    plan.buckets = sorted(buckets.values(), key=lambda bucket: -len(bucket.params))
    plan.dtypes = list(map(_dtype_of, plan.active))
    plan.contiguous = _contiguity(plan.active, grads)
    plan.states, plan.all_states = states, list(state.values())
    plan.planes = [entry["planes"] for entry in states]


def _plain(planes: Tensor, layout: Layout | None) -> bool:
    if layout is None or layout.order is None:
        return planes.is_contiguous()
    return planes.permute(0, *(1 + d for d in layout.order)).is_contiguous()


class Amp(NamedTuple):
    """What torch.amp.GradScaler left on the optimizer for the list op to apply."""

    grad_scale: Tensor | None
    found_inf: Tensor | None

    def on(self, device: torch.device) -> Amp:
        """Return the same on another device."""
        return Amp(*(None if t is None else t.to(device, non_blocking=True) for t in self))


def run(plan: Plan, groups: Groups, grads: list[Tensor], amp: Amp, *, checked: bool) -> None:
    """Call one list op per bucket.

    ``checked``: all gradients that may not hold NaN or Inf were found not to.

    Raises:
        RuntimeError: the first bucket's op met a NaN or Inf under the policy "raise", or a backend
            was forced that cannot take one of the buckets. Nothing is changed then.
        ValueError: stochastic rounding of states that are not bfloat16. Nothing is changed then.
    """
    settings_of = [Settings.of(groups[bucket.group_idx]) for bucket in plan.buckets]
    for bucket, settings in zip(plan.buckets, settings_of, strict=True):
        dtype = bucket.states[0]["planes"].dtype
        if settings.rounding is not None and dtype != torch.bfloat16:
            raise ValueError(
                f"group {bucket.group_idx}: stochastic_rounding=True, but its states were made in "
                f"{dtype}. Set stochastic_rounding=False, or build the optimizer with "
                "state_dtype=torch.bfloat16"
            )
    if len(plan.buckets) > 1 and requested() not in ("auto", "reference"):
        for bucket, settings in zip(plan.buckets, settings_of, strict=True):
            _rehearse(bucket, settings)
    for number, (bucket, settings) in enumerate(zip(plan.buckets, settings_of, strict=True)):
        if settings.nonfinite == "raise" and checked:
            settings = settings._replace(nonfinite="pass")
        # from the second bucket on something has been changed, so those were checked before
        checked = True
        mine = grads if len(plan.buckets) == 1 else [grads[i] for i in bucket.where]
        try:
            _run_bucket(bucket, settings, mine, amp, number)
        except RuntimeError as error:
            if "holds NaN or Inf" not in str(error):
                raise
            raise_nonfinite(plan, groups, grads, error)


def _run_bucket(
    bucket: Bucket, settings: Settings, grads: list[Tensor], amp: Amp, number: int = 0
) -> None:
    params = bucket.params
    planes = [entry["planes"] for entry in bucket.states]
    steps = [entry["step"] for entry in bucket.states] if settings.rule.needs_step else None
    copied: list[tuple[Tensor, Tensor]] = []  # (view of the original, contiguous copy)
    if bucket.irregular:
        params, grads = list(params), list(grads)
        for i, layout in bucket.irregular:
            planes[i] = layout.view(planes[i], planes=1)
            params[i] = _dense(layout.view(params[i]), copied)
            # the list op rewrites a gradient only to unscale it
            unused: list[tuple[Tensor, Tensor]] = []
            kept = unused if amp.grad_scale is None else copied
            grads[i] = _dense(layout.view(grads[i]), kept)
    with backend("reference") if settings.reference else nullcontext():
        ops.step_(
            settings.rule,
            params,
            grads,
            planes,
            steps,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            maximize=settings.maximize,
            nonfinite=settings.nonfinite,
            rounding_seed=settings.rounding and step_seed(*settings.rounding, number),
            **amp.on(params[0].device)._asdict(),
        )
    for view, dense in copied:
        view.copy_(dense)


def _rehearse(bucket: Bucket, settings: Settings) -> None:
    """Step an empty tensor like those of the bucket: raises what the bucket itself would."""
    param = bucket.params[0].detach().new_empty(0)
    param = torch.view_as_real(param)[..., 0] if param.is_complex() else param
    planes = bucket.states[0]["planes"].new_empty(settings.rule.state_planes, 0)
    entry = {"planes": planes, "step": new_step(0.0, param.device)}
    probe = Bucket(bucket.group_idx, [0], [param], [entry])
    _run_bucket(probe, settings, [param.clone()], Amp(None, None))


def _dense(view: Tensor, copied: list[tuple[Tensor, Tensor]]) -> Tensor:
    if view.is_contiguous():
        return view
    dense = view.contiguous()
    copied.append((view, dense))
    return dense


def unchecked(plan: Plan, groups: Groups) -> list[int]:
    """Return which gradients no list op can refuse in time, so must be checked beforehand.

    A step that raises changes nothing. The op of the first bucket sees to that for its own
    tensors; other buckets would come too late, and states must not be created first.
    """
    if plan.missing:
        indices = list(range(len(plan.active)))
    else:
        indices = [i for bucket in plan.buckets[1:] for i in bucket.where]
    return [i for i in indices if groups[plan.owners[i][0]]["nonfinite"] == "raise"]


def first_nonfinite(grads: list[Tensor]) -> int | None:
    """Return the index of the first gradient that holds NaN or Inf, or None."""
    real = [torch.view_as_real(g.resolve_conj()) if g.is_complex() else g for g in grads]
    filled = [g for g in real if g.numel()]
    if not filled or get_total_norm(filled, norm_type=float("inf")).isfinite():
        return None
    return next(i for i, g in enumerate(real) if not g.isfinite().all())


def raise_nonfinite(
    plan: Plan, groups: Groups, grads: list[Tensor], cause: Exception | None = None
) -> None:
    """Raise the RuntimeError that names the first parameter whose gradient holds NaN or Inf."""
    policies = [groups[group_idx]["nonfinite"] for group_idx, _ in plan.owners]
    raising = [i for i, policy in enumerate(policies) if policy == "raise"]
    index = first_nonfinite([grads[i] for i in raising])
    if index is None:
        raise cause or AssertionError("no gradient holds NaN or Inf")
    name = describe_param(groups, *plan.owners[raising[index]])
    raise RuntimeError(
        f"the gradient of {name} holds NaN or Inf; nothing was changed. Skip this step, or build "
        'the optimizer with nonfinite="skip" (leave such parameters alone) or "pass"'
    ) from cause
