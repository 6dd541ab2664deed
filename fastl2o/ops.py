"""Dispatch: what the rest of the package calls to take steps and to differentiate them.

`_ops_families.py` defines each torch.library op once, with a default implementation in plain torch
that runs anywhere; the compiled extension, loaded here after that, adds CPU kernels. Ops come in
two kinds: an in-place list op for `Optimizer.step`, and functional ops with a registered backward
for meta-training, since torch does not differentiate through an op that mutates.

`step_` and `step` take a coordinate-wise rule of any family, `unroll_backward` any rule; they check
arguments, choose the backend (see `fastl2o.backends`) and call the family's op. The step of a
hierarchical rule, which takes tensors together, is in `_ops_hierarchical.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from . import _ops_gpu, backends
from . import _ops_hierarchical as hierarchical
from . import _ops_reference as reference
from ._ops_families import FAMILIES
from ._ops_nonfinite import first_nonfinite as first_nonfinite
from ._rounding import check_seed
from .rules import CoordinateRule, HierarchicalRule, Rule

backends.load()


def step_(
    rule: CoordinateRule,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Tensor],
    steps: Sequence[Tensor] | None = None,
    *,
    lr: float = 1.0,
    weight_decay: float = 0.0,
    maximize: bool = False,
    nonfinite: str = "raise",
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    rounding_seed: int | None = None,
    meta: Tensor | None = None,
) -> None:
    """Take one step of `rule` in place on a list of tensors.

    theta <- (1 - lr * weight_decay) * theta + lr * u. All tensors are contiguous and on one device.
    The maths is float32; float64 parameters are added to in float64. A call that raises has changed
    nothing.

    Args:
        rule: the rule, whose meta-parameters are read now.
        params: what to update, float32, float64, bfloat16 or float16.
        grads: gradients, shaped and typed like `params`.
        states: `(S, *param.shape)`, float32 or bfloat16, one dtype in a call (the reference backend
            also takes float64).
        steps: 0-dim float32 tensors, steps already taken; incremented. Needed if `rule.needs_step`,
            else ignored.
        lr, weight_decay: factor on the update, and decoupled decay.
        maximize: negate the gradient before the rule sees it.
        nonfinite: on a gradient that holds NaN or Inf: "raise", "skip" (leave that tensor's
            parameter, state and step as they are) or "pass" (feed it to the rule).
        grad_scale: 1-element tensor; the rule sees grad / grad_scale, which is also written back
            into `grads`.
        found_inf: 1-element tensor; where it is not 0, nothing is touched.
        rounding_seed: a signed 64-bit number: bfloat16 states are rounded stochastically, with the
            same random bits on every backend. Give each step another one. None: to nearest.
        meta: flat meta-parameters `(M,)` in place of the rule's own, or a row for each tensor,
            `(len(params), M)`: tensors of several rules of one config, in one call. Rows need
            `nonfinite="pass"` and no `rounding_seed`.

    Raises:
        ValueError, TypeError: a list, shape, dtype or option does not fit.
        RuntimeError: `nonfinite="raise"` and a gradient is not finite (the message holds its index
            in the list), a forced backend cannot take these tensors, or stochastic rounding is
            captured in a CUDA graph, whose replays would repeat its random bits.

    Example:
        >>> import fastl2o
        >>> rule = fastl2o.LSTMRule.as_sgd(0.5, num_layers=0)
        >>> param, grad = torch.ones(3), torch.ones(3)
        >>> step_(rule, [param], [grad], [rule.init_state(param)])
        >>> param
        tensor([0.5000, 0.5000, 0.5000])
    """
    rule = coordinate_wise(rule)
    count = len(params)
    steps = steps if steps is not None and rule.needs_step else ()
    if len(grads) != count or len(states) != count or (rule.needs_step and len(steps) != count):
        raise ValueError(
            f"params, grads, states{' and steps' if rule.needs_step else ''}: expected lists of "
            f"one length, got {count}, {len(grads)}, "
            f"{len(states)}{f' and {len(steps)}' if rule.needs_step else ''}"
        )
    mode = reference.NONFINITE.get(nonfinite)
    if mode is None:
        raise ValueError(
            f"Invalid nonfinite: {nonfinite!r}; pass one of "
            f"{', '.join(map(repr, reference.NONFINITE))}"
        )
    if count == 0:
        return
    device = params[0].device
    lr, weight_decay = float(lr), float(weight_decay)
    family = FAMILIES.get(rule.family)
    state_dtype = states[0].dtype
    if rounding_seed is not None:
        if family is None:
            raise ValueError("rounding_seed: only rules of the families lstm and rnnprop round so")
        check_seed(rounding_seed, states, "states")
    if meta is not None:
        reference.check_rows(rule, meta, count, mode, rounding_seed)
    unsupported = ""
    if family is None:
        unsupported = f"there are no kernels for rules of family {rule.family!r}"
    elif state_dtype not in (torch.float32, torch.bfloat16):
        unsupported = (
            f"its step takes state in float32 or bfloat16, not {state_dtype}: convert the state"
        )
    refuses = _ops_gpu.objections(rule, device, params, states)
    chosen = backends.choose(device, unsupported, refuses)
    wide = torch.float64 if state_dtype == torch.float64 else torch.float32
    in_reference = chosen == "reference" or family is None
    if meta is None:
        meta = rule.flat_buffer(device, wide if in_reference else torch.float32)
    else:
        meta = meta.detach().to(device, wide if in_reference else torch.float32).contiguous()
    if in_reference or family is None:
        reference.step_(
            rule,
            params,
            grads,
            states,
            steps,
            meta,
            lr,
            weight_decay,
            maximize,
            mode,
            grad_scale,
            found_inf,
            rounding_seed,
        )
        return
    lists = (params, grads, states, steps) if rule.needs_step else (params, grads, states)
    options = (lr, weight_decay, maximize, mode, grad_scale, found_inf, rounding_seed)
    # entering no_grad again costs more than asking
    with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
        if chosen == "triton" and device.type == "cpu":
            _ops_gpu.interpreted_step_(rule, *lists, meta, *options)
        else:
            family.step_(*lists, meta, *family.arguments(rule), *options)
    # A kernel writes through raw pointers: autograd must learn that tensors saved for a backward
    # have changed. Gradients and step counters are in no graph.
    torch.autograd.graph.increment_version([*params, *states])


def coordinate_wise(rule: Rule) -> CoordinateRule:
    """The rule, if its coordinates do not talk to each other, which these ops rely on."""
    if not isinstance(rule, CoordinateRule):
        raise TypeError(
            f"rule: {rule!r} is not a coordinate-wise rule; step tensors together, with "
            "fastl2o.LearnedOptimizer or rule.reference_step"
        )
    return rule


def step(
    rule: CoordinateRule,
    grad: Tensor,
    state: Tensor,
    step: int | Tensor = 0,
    meta: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One functional step, differentiable once in `grad`, `state` and the meta-parameters.

    Under the reference backend it is `rule.reference_step`, which is differentiable any number of
    times.

    Args:
        rule: the rule.
        grad: gradients of any shape.
        state: `(S, *grad.shape)`; float64 state is computed in float64, by the reference.
        step: number of steps already taken.
        meta: flat meta-parameters `(M,)` in place of the rule's own.

    Returns:
        The update, shaped like `grad`, and the new state.

    Raises:
        ValueError, TypeError: a shape or dtype does not fit.
        RuntimeError: a forced backend cannot take these tensors.

    Example:
        >>> import fastl2o
        >>> rule = fastl2o.LSTMRule(hidden_size=4, num_layers=1)
        >>> grad = torch.ones(3)
        >>> update, _ = fastl2o.ops.step(rule, grad, rule.init_state(grad))
        >>> update.sum().backward()
        >>> rule.readout.bias.grad.shape
        torch.Size([1])
    """
    rule = coordinate_wise(rule)
    family = FAMILIES.get(rule.family)
    unsupported = _unsupported(rule, grad, state, meta)
    chosen = backends.choose(
        grad.device,
        unsupported,
        refuses=_ops_gpu.objections(rule, grad.device),
    )
    if chosen == "reference" or family is None:
        return rule.reference_step(grad, state, step, meta)
    flat = rule.flat_parameters() if meta is None else meta
    if chosen == "triton" and grad.device.type == "cpu":
        return _ops_gpu.interpreted_step(rule, grad, state, int(step), flat)
    taken = (int(step),) if rule.needs_step else ()
    update, new_state = family.step(
        grad.contiguous(), state.contiguous(), *taken, flat, *family.arguments(rule)
    )
    return update, new_state


def unroll_backward(
    rule: Rule,
    grads: Tensor,
    state: Tensor,
    loss_weights: Tensor | None = None,
    *,
    steps: int,
    step: int = 0,
    lr: float = 1.0,
    weight_decay: float = 0.0,
    meta: Tensor | None = None,
    sizes: Sequence[int] | None = None,
    d_updates: Tensor | None = None,
    d_last_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradient of sum_t w_t f_t(theta_t) over a window of steps, from its recorded gradients alone.

    The task gradients g_t count as constants (first order). f_0 is evaluated before the first
    update, so its weight has no effect on the result. With `d_updates` in place of `loss_weights`,
    of any function L of the updates.

    Args:
        rule: the rule that made the window with in-place steps.
        grads: `(K, R, D)`, gradients g_t of f_t at theta_t, K = steps or, with the gradient at the
            last point, steps + 1.
        state: the state before the window, as `rule.init_runs` lays it out: `(S, R, D)` for rules
            whose coordinates do not talk to each other.
        loss_weights: `(K, R)`, w_t for each run.
        steps: T, the number of updates in the window.
        step: number of steps taken before the window.
        lr, weight_decay: as in the steps of the window.
        meta: flat meta-parameters `(M,)` in place of the rule's own.
        sizes: how many of a run's D coordinates each of its tensors has, for rules that look at
            whole tensors; one tensor by default.
        d_updates: `(T, R, D)`, dL/du_t; `lr` and `weight_decay` do not matter then.
        d_last_state: shaped as `state`, the gradient of the state after the window, where L depends
            on that; zero by default. For rules whose coordinates do not talk to each other.

    Returns:
        d_meta `(M,)` and d_state, the gradients of the meta-parameters and of the first state.

    Raises:
        ValueError, TypeError: a shape, dtype or number does not fit.
        RuntimeError: a forced backend cannot take these tensors.

    Example:
        >>> import fastl2o
        >>> rule = fastl2o.LSTMRule(hidden_size=4, num_layers=1)
        >>> grads, weights = torch.randn(4, 2, 5), torch.ones(4, 2)
        >>> d_meta, d_state = unroll_backward(rule, grads, torch.zeros(8, 2, 5), weights, steps=3)
        >>> d_meta.shape == (rule.num_meta_parameters,), d_state.shape
        (True, torch.Size([8, 2, 5]))
    """
    flat = rule.flat_parameters().detach() if meta is None else meta.detach()
    if (loss_weights is None) == (d_updates is None):
        raise ValueError("pass either loss_weights or d_updates, and not both")
    if loss_weights is None:
        loss_weights = grads.new_empty(grads.shape[:2])
    _check_window(rule, grads, state, loss_weights, steps, step, sizes)
    reference.check_upstream(rule, grads, state, steps, d_updates, d_last_state)
    if isinstance(rule, HierarchicalRule):
        return hierarchical.unroll_backward(
            rule, grads, state, loss_weights, steps=steps, step=step,
            sizes=sizes or grads.shape[2:], lr=lr, weight_decay=weight_decay, meta=flat,
            d_updates=d_updates,
        )  # fmt: skip
    rule = coordinate_wise(rule)
    family = FAMILIES.get(rule.family)
    unsupported = _unsupported(rule, grads, state, flat)
    lr, weight_decay = float(lr), float(weight_decay)
    chosen = backends.choose(
        grads.device,
        unsupported,
        refuses=_ops_gpu.objections(rule, grads.device),
    )
    if chosen == "reference" or family is None:
        return reference.unroll_backward(
            rule, grads, state, step, flat, loss_weights, steps, lr, weight_decay,
            d_updates, d_last_state,
        )  # fmt: skip
    given = [
        None if upstream is None else upstream.to(torch.float32).contiguous()
        for upstream in (d_updates, d_last_state)
    ]
    if chosen == "triton" and grads.device.type == "cpu":
        named = {
            "grads": grads, "state": state, "step": int(step), "meta": flat, "steps": steps,
            "loss_weights": loss_weights.to(torch.float32), "lr": lr, "weight_decay": weight_decay,
            "d_updates": given[0], "d_last_state": given[1],
        }  # fmt: skip
        with torch.no_grad():
            return _ops_gpu.unroll_backward("triton", rule, named)
    taken = (int(step),) if rule.needs_step else ()
    with torch.no_grad():
        d_meta, d_state = family.unroll_backward(
            grads.contiguous(),
            state.contiguous(),
            *taken,
            flat,
            loss_weights.to(torch.float32).contiguous(),
            steps,
            *family.arguments(rule),
            lr,
            weight_decay,
            *given,
        )
    return d_meta, d_state


def _unsupported(rule: Rule, grad: Tensor, state: Tensor, meta: Tensor | None) -> str:
    """Why the functional kernels do not take these tensors, "" if they do."""
    if rule.family not in FAMILIES:
        return f"there are no kernels for rules of family {rule.family!r}"
    dtypes = {
        grad.dtype,
        state.dtype,
        next(rule.parameters()).dtype if meta is None else meta.dtype,
    }
    if dtypes != {torch.float32}:
        names = ", ".join(sorted(map(str, dtypes)))
        return f"its functional ops take float32 tensors, not {names}: convert them"
    return ""


def _check_window(
    rule: Rule,
    grads: Tensor,
    state: Tensor,
    loss_weights: Tensor,
    steps: int,
    step: int,
    sizes: Sequence[int] | None,
) -> None:
    if steps < 1:
        raise ValueError(
            f"Invalid steps: {steps}; pass the number of updates in the window, at least 1"
        )
    if step < 0:
        raise ValueError(
            f"Invalid step: {step}; pass the number of steps taken before the window, at least 0"
        )
    if grads.dim() != 3 or grads.shape[0] not in (steps, steps + 1):
        raise ValueError(
            f"grads: expected shape (K, runs, coordinates) with K = {steps} or {steps + 1} for "
            f"steps={steps}, got {tuple(grads.shape)}"
        )
    runs, dim = grads.shape[1:]
    if sizes is not None and (sum(sizes) != dim or min(sizes, default=0) < 0):
        raise ValueError(
            f"sizes: expected numbers of elements that add up to {dim} coordinates, got "
            f"{list(sizes)}"
        )
    expected = rule.runs_shape(runs, [dim] if sizes is None else sizes)
    if state.shape != expected:
        raise ValueError(
            f"state: expected shape {expected} for {runs} runs of {dim} coordinates, got "
            f"{tuple(state.shape)}; make it with rule.init_runs(params, sizes)"
        )
    if loss_weights.shape != grads.shape[:2]:
        raise ValueError(
            f"loss_weights: expected shape {tuple(grads.shape[:2])}, one number for each loss and "
            f"run, got {tuple(loss_weights.shape)}"
        )
