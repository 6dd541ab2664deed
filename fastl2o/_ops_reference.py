"""The plain-torch implementation of every op, for any rule, device and floating dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._rounding import round_state
from .rules import CoordinateRule, Rule

# Coordinates handled at once: bounds the temporaries of a step (a few times 4H numbers a
# coordinate) to tens of MB.
STEP_BLOCK = 65_536
# Numbers of replayed state held at once by the unroll backward.
UNROLL_BLOCK = 8_388_608

NONFINITE = {"pass": 0, "skip": 1, "raise": 2}


def check_lists(
    rule: Rule,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Tensor],
    steps: Sequence[Tensor],
) -> None:
    """Check every tensor of an in-place step, so that a step that cannot run changes nothing."""
    for index, (param, grad, state) in enumerate(zip(params, grads, states, strict=True)):
        if not param.is_floating_point():
            raise TypeError(
                f"params[{index}]: expected a floating dtype, got {param.dtype}; pass complex "
                "tensors through view_as_real"
            )
        if grad.dtype != param.dtype or grad.shape != param.shape or grad.layout != torch.strided:
            raise ValueError(
                f"grads[{index}]: expected a dense {param.dtype} of shape {tuple(param.shape)} "
                f"like its parameter, got {grad.dtype}, {grad.layout}, shape {tuple(grad.shape)}"
            )
        expected = (rule.state_planes, *param.shape)
        if state.shape != expected or not state.is_floating_point():
            raise ValueError(
                f"states[{index}]: expected floating, of shape {expected}, that is (state_planes, "
                f"*param.shape), got {state.dtype}, shape {tuple(state.shape)}; make it with "
                "rule.init_state(param)"
            )
        for name, tensor in (("params", param), ("grads", grad), ("states", state)):
            if not tensor.is_contiguous() or tensor.device != params[0].device:
                raise ValueError(
                    f"{name}[{index}]: expected contiguous, on {params[0].device} like the first "
                    f"parameter, got strides {tensor.stride()} on {tensor.device}"
                )
    for index, step in enumerate(steps):
        if step.numel() != 1:
            raise ValueError(
                f"steps[{index}]: expected a 0-dim tensor, got shape {tuple(step.shape)}"
            )


def check_upstream(
    rule: Rule,
    grads: Tensor,
    state: Tensor,
    steps: int,
    d_updates: Tensor | None,
    d_last_state: Tensor | None,
) -> None:
    """Check the given upstream gradients of a window's updates and of the state after it."""
    if d_updates is None and d_last_state is None:
        return
    if d_last_state is not None and not isinstance(rule, CoordinateRule):
        raise ValueError(
            f"d_last_state: a rule of family {rule.family!r} takes none; its states depend on "
            "the tensors"
        )
    expected = (steps, *grads.shape[1:])
    if d_updates is not None and d_updates.shape != expected:
        raise ValueError(
            f"d_updates: expected shape {expected}, one number for each update, got "
            f"{tuple(d_updates.shape)}"
        )
    if d_last_state is not None and d_last_state.shape != state.shape:
        raise ValueError(
            f"d_last_state: expected shape {tuple(state.shape)} like state's, got "
            f"{tuple(d_last_state.shape)}"
        )


def adjoints_(grads: Tensor, weights: Tensor, keep: float, later: Tensor | None = None) -> Tensor:
    """Turn gradients g_1 .. g_T into a_t = w_t g_t + keep a_{t+1}, in place.

    Args:
        grads: `(T, R, D)`.
        weights: `(T, R)`, w_t for each run.
        keep: 1 - lr weight_decay.
        later: a_{T+1}, `(R, D)`; zero by default.
    """
    grads *= weights[:, :, None]
    for grad in reversed(grads.unbind()):
        if later is not None:
            grad.add_(later, alpha=keep)
        later = grad
    return grads


def check_rows(
    rule: Rule, meta: Tensor, count: int, nonfinite: int, rounding_seed: int | None
) -> None:
    """Check meta-parameters given to an in-place step: a vector, or a row for each tensor."""
    size = rule.num_meta_parameters
    if meta.shape not in ((size,), (count, size)):
        raise ValueError(
            f"meta: expected shape ({size},), or ({count}, {size}) with a row for each tensor, got "
            f"{tuple(meta.shape)}"
        )
    if meta.dim() == 2 and (nonfinite != NONFINITE["pass"] or rounding_seed is not None):
        raise ValueError(
            "meta with a row for each tensor takes nonfinite='pass' and no rounding_seed: look for "
            "NaN and Inf before, and round to nearest"
        )


@torch.no_grad()
def step_(
    rule: CoordinateRule,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Tensor],
    steps: Sequence[Tensor],
    meta: Tensor,
    lr: float,
    weight_decay: float,
    maximize: bool,
    nonfinite: int,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    rounding_seed: int | None = None,
) -> None:
    """The in-place step over lists, tensor by tensor; see `fastl2o.ops.step_` for the arguments."""
    check_lists(rule, params, grads, states, steps)
    if found_inf is not None and found_inf.item() != 0.0:
        return
    finite = [True] * len(params)
    if nonfinite != NONFINITE["pass"]:
        finite = [bool(torch.isfinite(grad).all()) for grad in grads]
        if nonfinite == NONFINITE["raise"] and not all(finite):
            raise RuntimeError(nonfinite_message(finite.index(False)))
    for index, (param, grad, state) in enumerate(zip(params, grads, states, strict=True)):
        if not finite[index]:
            continue
        taken: int | Tensor = 0
        if steps:
            taken = steps[index].clone()
            steps[index].add_(1)
        rounding = None if rounding_seed is None else (rounding_seed, index)
        own = meta if meta.dim() == 1 else meta[index]
        _step_tensor(
            rule, param, grad, state, taken, own, lr, weight_decay, maximize, grad_scale, rounding
        )


def runs_step_(
    rule: CoordinateRule,
    params: Tensor,
    grads: Tensor,
    states: Tensor,
    step: int,
    meta: Tensor,
    lr: float,
    weight_decay: float,
) -> None:
    """The step of runs `(R, D)`, run by run; see `fastl2o._ops_runs` for the arguments."""
    lists = (list(params), list(grads), list(states))
    steps = list(torch.full((len(params),), float(step)).unbind())
    passed = NONFINITE["pass"]
    step_(rule, *lists, steps, meta, lr, weight_decay, False, passed, None, None)


def nonfinite_message(index: int) -> str:
    """The error of `nonfinite="raise"`; the optimizer reads the index from it."""
    return (
        f"gradient {index} of the list holds NaN or Inf, nothing was changed; lower the learning "
        "rate or scale the loss, or pass nonfinite='skip' (leave that tensor) or 'pass' (feed it "
        "to the rule)"
    )


def _step_tensor(
    rule: CoordinateRule,
    param: Tensor,
    grad: Tensor,
    state: Tensor,
    taken: int | Tensor,
    meta: Tensor,
    lr: float,
    weight_decay: float,
    maximize: bool,
    grad_scale: Tensor | None,
    rounding: tuple[int, int] | None,
) -> None:
    """One tensor; `rounding`: seed and place in the list, for stochastic rounding of the state."""
    count = param.numel()
    dtype = torch.float64 if torch.float64 in (param.dtype, state.dtype) else torch.float32
    flat_param, flat_grad = param.detach().view(count), grad.view(count)
    flat_state = state.view(rule.state_planes, count)
    for start in range(0, count, STEP_BLOCK):
        block = slice(start, start + STEP_BLOCK)
        seen = flat_grad[block]
        if grad_scale is not None:
            # As torch's fused Adam: the rule sees the unrounded quotient, and it is written back.
            seen = seen.to(torch.float64 if state.dtype == torch.float64 else torch.float32)
            seen = seen / grad_scale.to(seen.device)
            flat_grad[block] = seen.to(grad.dtype)
        before = flat_state[:, block]
        update, new_state = rule.reference_step(
            -seen if maximize else seen, before if rounding is None else before.float(), taken, meta
        )
        if rounding is not None:
            new_state = round_state(rule, new_state, *rounding, start)
        flat_state[:, block] = new_state
        kept = flat_param[block].to(dtype)
        if weight_decay != 0.0:
            kept = (1.0 - lr * weight_decay) * kept
        flat_param[block] = (kept + lr * update.to(dtype)).to(param.dtype)


@torch.no_grad()
def unroll_backward(
    rule: CoordinateRule,
    grads: Tensor,
    state: Tensor,
    step: int,
    meta: Tensor,
    loss_weights: Tensor,
    steps: int,
    lr: float,
    weight_decay: float,
    d_updates: Tensor | None = None,
    d_last_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The unroll backward, block by block; see `fastl2o.ops.unroll_backward` for the arguments.

    The task gradients count as constants, so the adjoint a_t = dL/dtheta_t needs only what was
    recorded:

        a_T = w_T g_T
        dL/du_t = lr a_{t+1}
        a_t = w_t g_t + (1 - lr weight_decay) a_{t+1}

    With `d_updates` dL/du_t is given outright, and the loss weights are not used. Each block of
    coordinates replays its states from the window's start and walks back through
    them. Blocks are summed in order.
    """
    planes, runs, dim = state.shape
    flat_grads = grads.reshape(grads.shape[0], runs * dim)
    flat_state = state.reshape(planes, runs * dim)
    d_meta, d_state = torch.zeros_like(meta), torch.zeros_like(flat_state)
    if d_last_state is not None:
        d_state.copy_(d_last_state.reshape(planes, runs * dim))
    size = max(1, UNROLL_BLOCK // max(1, planes * steps))
    for start in range(0, runs * dim, size):
        block = slice(start, min(start + size, runs * dim))
        run_of = torch.arange(block.start, block.stop, device=state.device) // dim
        d_block, d_state[:, block] = _unroll_block(
            rule,
            flat_grads[:, block],
            flat_state[:, block],
            step,
            meta,
            loss_weights[:, run_of],
            steps,
            lr,
            weight_decay,
            None if d_updates is None else d_updates.reshape(steps, runs * dim)[:, block],
            d_state[:, block],
        )
        d_meta += d_block
    return d_meta, d_state.reshape(state.shape)


def _unroll_block(
    rule: CoordinateRule,
    grads: Tensor,
    state: Tensor,
    step: int,
    meta: Tensor,
    weights: Tensor,
    steps: int,
    lr: float,
    weight_decay: float,
    d_updates: Tensor | None,
    d_state: Tensor,
) -> tuple[Tensor, Tensor]:
    """`unroll_backward` on coordinates `(K, N)` with the loss weights spread over them.

    `d_state` is that of the state after the window.
    """
    states = [state]
    for t in range(steps - 1):
        states.append(rule.reference_step(grads[t], states[t], step + t, meta)[1])
    adjoint = (
        weights[steps] * grads[steps] if grads.shape[0] > steps else torch.zeros_like(grads[0])
    )
    d_meta = torch.zeros_like(meta)
    for t in reversed(range(steps)):
        d_update = lr * adjoint if d_updates is None else d_updates[t]
        _, d_state, d_step = rule.reference_backward(
            d_update, d_state, grads[t], states[t], step + t, meta
        )
        d_meta += d_step
        adjoint = weights[t] * grads[t] + (1.0 - lr * weight_decay) * adjoint
    return d_meta, d_state
