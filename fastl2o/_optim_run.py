"""The list-op calls of a step that was planned."""

from __future__ import annotations

from collections.abc import Set
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _ops_hierarchical as hierarchical
from . import _ops_hierarchical_parts as hierarchical_parts
from . import ops
from ._optim_nonfinite import raise_nonfinite
from ._optim_plan import Bucket, Groups, Plan, Settings
from ._optim_shards import all_reduce, local
from ._optim_state import as_float, new_step
from ._rounding import step_seed
from .backends import backend, requested
from .rules import HierarchicalRule

Rates = tuple[list[float], list[float]]  # lr and weight decay of each parameter


class Amp(NamedTuple):
    """What torch.amp.GradScaler left on the optimizer for the list op to apply."""

    grad_scale: Tensor | None
    found_inf: Tensor | None

    def on(self, device: torch.device) -> Amp:
        """Return the same on another device."""
        if self.grad_scale is None and self.found_inf is None:
            return self
        return Amp(*(None if t is None else t.to(device, non_blocking=True) for t in self))


def run(
    plan: Plan,
    groups: Groups,
    grads: list[Tensor],
    amp: Amp,
    *,
    checked: bool,
    skipped: Set[int] = frozenset(),
) -> None:
    """Call one list op per bucket.

    Args:
        plan, groups, grads, amp: what to do.
        checked: all gradients that may not hold NaN or Inf were found not to.
        skipped: indices of active parameters that are split over ranks and rest in this step.

    Raises:
        RuntimeError: the first bucket's op met a NaN or Inf under the policy "raise", or a backend
            was forced that cannot take one of the buckets. Nothing is changed then.
        ValueError: stochastic rounding of states that are not bfloat16. Nothing is changed then.
    """
    settings_of = [Settings.of(groups[bucket.group_idx]) for bucket in plan.buckets]
    for bucket, settings in zip(plan.buckets, settings_of, strict=True):
        dtype = bucket.planes[0].dtype
        if settings.rounding is not None and dtype != torch.bfloat16:
            raise ValueError(
                f"group {bucket.group_idx}: stochastic_rounding=True, but its states were made in "
                f"{dtype}. Set stochastic_rounding=False, or build the optimizer with "
                "state_dtype=torch.bfloat16"
            )
    if len(plan.buckets) > 1 and requested() not in ("auto", "reference"):
        for bucket, settings in zip(plan.buckets, settings_of, strict=True):
            _rehearse(bucket, settings, groups)
    for number, (bucket, settings) in enumerate(zip(plan.buckets, settings_of, strict=True)):
        if settings.nonfinite == "raise" and checked:
            settings = settings._replace(nonfinite="pass")
        # from the second bucket on something has been changed, so those were checked before
        checked = True
        if bucket.split:
            settings = settings._replace(nonfinite="pass")
            bucket = bucket.without(skipped) if skipped else bucket
        if not bucket.params:
            continue
        mine = grads
        if len(plan.buckets) > 1 or skipped:
            mine = [grads[i] for i in bucket.where]
        try:
            rates = _rates(bucket, plan, groups) if bucket.shared is not None else ([], [])
            _run_resolved(bucket, settings, mine, amp, number, rates)
        except RuntimeError as error:
            if "holds NaN or Inf" not in str(error):
                raise
            raise_nonfinite(plan, groups, grads, error)


def _rates(bucket: Bucket, plan: Plan, groups: Groups) -> Rates:
    """The rates of a bucket's parameters, each number read once for a group."""
    of_group = [(as_float(group["lr"]), float(group["weight_decay"])) for group in groups]
    if len(groups) == 1:
        lr, decay = of_group[0]
        return [lr] * len(bucket.where), [decay] * len(bucket.where)
    owners = [plan.owners[i][0] for i in bucket.where]
    return [of_group[g][0] for g in owners], [of_group[g][1] for g in owners]


def _run_resolved(
    bucket: Bucket,
    settings: Settings,
    grads: list[Tensor],
    amp: Amp,
    number: int,
    rates: Rates,
) -> None:
    """``_run_bucket``, also of gradients that are negated views, as of a conjugate's ``imag``.

    torch refuses them for a kernel before it steps any. To look for them in every step would cost
    more than to try again; where they are written to, they are looked for.
    """
    written = amp.grad_scale is not None
    try:
        if not written or not any(map(Tensor.is_neg, grads)):
            _run_bucket(bucket, settings, grads, amp, number, rates)
            return
    except RuntimeError:
        if not any(map(Tensor.is_neg, grads)):
            raise
    resolved = [grad.resolve_neg() for grad in grads]
    _run_bucket(bucket, settings, resolved, amp, number, rates)
    for grad, unscaled in zip(grads, resolved, strict=True):
        if written and grad.is_neg():
            grad.copy_(unscaled)


def _run_bucket(
    bucket: Bucket,
    settings: Settings,
    grads: list[Tensor],
    amp: Amp,
    number: int,
    rates: Rates,
) -> None:
    """``rates``: of each parameter, where the rule steps them together."""
    params = bucket.params
    planes = bucket.planes
    if bucket.split:
        params, grads, planes = ([local(t) for t in ts] for ts in (params, grads, planes))
    steps = [entry["step"] for entry in bucket.states] if settings.rule.needs_step else None
    copied: list[tuple[Tensor, Tensor]] = []  # (view of the original, contiguous copy)
    if bucket.irregular:
        params, grads, planes = list(params), list(grads), list(planes)
        for i, layout in bucket.irregular:
            planes[i] = layout.view(planes[i], planes=1)
            params[i] = _dense(layout.view(params[i]), copied)
            # the list op rewrites a gradient only to unscale it
            unused: list[tuple[Tensor, Tensor]] = []
            kept = unused if amp.grad_scale is None else copied
            grads[i] = _dense(layout.view(grads[i]), kept)
    seed = settings.rounding and step_seed(*settings.rounding, number)
    with backend("reference") if settings.reference else nullcontext():
        if bucket.shared is not None:
            _step_together(bucket, settings, params, grads, planes, steps, rates, amp, seed)
        else:
            ops.step_(
                ops.coordinate_wise(settings.rule),
                params,
                grads,
                planes,
                steps,
                lr=settings.lr,
                weight_decay=settings.weight_decay,
                maximize=settings.maximize,
                nonfinite=settings.nonfinite,
                rounding_seed=seed,
                **amp.on(params[0].device)._asdict(),
            )
    for view, dense in copied:
        view.copy_(dense)


def _step_together(
    bucket: Bucket,
    settings: Settings,
    params: list[Tensor],
    grads: list[Tensor],
    planes: list[Tensor],
    steps: list[Tensor] | None,
    rates: Rates,
    amp: Amp,
    seed: int | None,
) -> None:
    assert isinstance(settings.rule, HierarchicalRule)
    assert bucket.shared is not None
    lists: list[list[Any]] = [
        *(params, grads, planes, [entry["tensor"] for entry in bucket.states], steps or []),
        *rates,
    ]
    hidden = bucket.shared["hidden"].unsqueeze(0)
    scale, found_inf = amp.on(params[0].device)
    whole = bucket.params
    if bucket.split:
        held = [k for k, param in enumerate(whole) if param.numel()]
        lists = [[values[k] for k in held] for values in lists]
        whole = [whole[k] for k in held]
    params, grads, planes, tensors, counters, lr, decay = lists
    if bucket.split:
        hierarchical_parts.step_(
            *(settings.rule, params, grads, planes, tensors, counters, hidden),
            counts=[param.numel() for param in whole],
            reduce=lambda sums: all_reduce(sums, whole),
            lr=lr,
            weight_decay=decay,
            maximize=settings.maximize,
            grad_scale=scale,
            rounding_seed=seed,
        )
    else:
        hierarchical.step_(
            *(settings.rule, params, grads, planes, tensors, counters, hidden),
            lr=lr,
            weight_decay=decay,
            maximize=settings.maximize,
            nonfinite=settings.nonfinite,
            grad_scale=scale,
            found_inf=found_inf,
            rounding_seed=seed,
        )


def _rehearse(bucket: Bucket, settings: Settings, groups: Groups) -> None:
    """Step an empty tensor like those of the bucket: raises what the bucket itself would."""
    param = local(bucket.params[0].detach()).new_empty(0)
    param = torch.view_as_real(param)[..., 0] if param.is_complex() else param
    planes = local(bucket.planes[0]).new_empty(settings.rule.state_planes, 0)
    entry = {"planes": planes, "step": new_step(0.0, param.device)}
    if bucket.shared is not None:
        entry["tensor"] = bucket.states[0]["tensor"].clone()
    probe = Bucket(bucket.group_idx, [0], [param], [entry], [planes], shared=bucket.shared)
    group = groups[bucket.group_idx]
    rates = ([as_float(group["lr"])], [float(group["weight_decay"])])
    _run_bucket(probe, settings, [param.clone()], Amp(None, None), 0, rates)


def _dense(view: Tensor, copied: list[tuple[Tensor, Tensor]]) -> Tensor:
    if view.is_contiguous():
        return view
    dense = view.contiguous()
    copied.append((view, dense))
    return dense
