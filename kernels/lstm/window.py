"""Launchers of the Triton window backward and of the functional step with its derivative.

On CPU tensors the kernels run only under Triton's interpreter (``TRITON_INTERPRET=1``). Sums are in
a fixed order, a program's over its tiles and steps and then over programs; how many programs there
are depends on the problem alone, so the bits do not depend on the device.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from . import window_kernels
from .config import WindowConfig, window_config
from .step import constants, scalars

# Meta-parameters of a program of the sum, and partials that it adds at once.
SUM_BLOCK, SUM_DEPTH = 32, 32
# The window kernel's first arguments.
WINDOW_TENSORS = (
    *("grads", "state", "meta", "loss_weights", "d_update", "corrections", "d_state", "d_grads"),
)


def unroll_backward(
    rule: Any,
    grads: Tensor,
    state: Tensor,
    step: int,
    meta: Tensor,
    loss_weights: Tensor,
    steps: int,
    lr: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor]:
    """Gradient of sum_t w_t f_t(theta_t) over a window; this folder's README derives it.

    Args:
        rule: an LSTMRule or RNNPropRule.
        grads: recorded gradients `(K, R, D)`, K = steps or steps + 1; float32 like all tensors.
        state: the window's first state `(S, R, D)`.
        step: steps taken before the window.
        meta: flat meta-parameters `(M,)`.
        loss_weights: w_t of each run `(K, R)`.
        steps: T, at least 1.
        lr, weight_decay: of the window's steps.

    Returns:
        d_meta `(M,)` and d_state `(S, R, D)`.
    """
    d_state = torch.empty_like(state, memory_format=torch.contiguous_format)
    tensors = {
        "grads": grads.contiguous(),
        "state": state.contiguous(),
        "meta": meta.contiguous(),
        "loss_weights": loss_weights.contiguous(),
        "corrections": corrections(rule, step, steps, meta),
        "d_state": d_state,
    }
    _, runs, dim = grads.shape
    sizes = (runs * dim, dim, runs, steps, grads.shape[0])
    return _window(rule, tensors, sizes, lr, 1.0 - lr * weight_decay), d_state


def step_backward(
    rule: Any,
    d_update: Tensor,
    d_new_state: Tensor,
    grad: Tensor,
    state: Tensor,
    step: int | Tensor,
    meta: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The derivative of `step`: a window of one step whose upstream gradients are given.

    Args:
        rule: an LSTMRule or RNNPropRule.
        d_update: upstream gradient of the update, shaped like `grad`; float32 like all tensors.
        d_new_state: upstream gradient of the new state, shaped like `state`.
        grad, state, step, meta: as given to `step`.

    Returns:
        Gradients of `grad`, of `state` and of the flat meta-parameters `(M,)`.
    """
    d_grad = torch.empty_like(grad, memory_format=torch.contiguous_format)
    d_state = d_new_state.clone(memory_format=torch.contiguous_format)
    tensors = {
        "grads": grad.contiguous(),
        "state": state.contiguous(),
        "meta": meta.contiguous(),
        "d_update": d_update.contiguous(),
        "corrections": corrections(rule, step, 1, meta),
        "d_state": d_state,
        "d_grads": d_grad,
    }
    sizes = (grad.numel(), max(1, grad.numel()), 1, 1, 1)
    return d_grad, d_state, _window(rule, tensors, sizes, 1.0, 1.0)


def step(
    rule: Any, grad: Tensor, state: Tensor, step: int | Tensor, meta: Tensor
) -> tuple[Tensor, Tensor]:
    """The functional step: the update, shaped like `grad`, and the new state.

    Args:
        rule: an LSTMRule or RNNPropRule.
        grad: gradients of any shape; float32 like all tensors.
        state: `(S, *grad.shape)`.
        step: steps already taken.
        meta: flat meta-parameters `(M,)`.
    """
    update = torch.empty_like(grad, memory_format=torch.contiguous_format)
    new_state = torch.empty_like(state, memory_format=torch.contiguous_format)
    config = window_config(rule, grad.numel(), 1)
    if config.programs:
        scratch = meta.new_empty(config.programs * (rule.hidden_size + 2) * config.block)
        with torch.cuda.device_of(grad):
            window_kernels.functional_step[(config.programs,)](
                grad.contiguous(), state.contiguous(), meta.contiguous(),
                corrections(rule, step, 1, meta), update, new_state, scratch, grad.numel(),
                math.ceil(grad.numel() / config.block), config.programs, *scalars(rule),
                BLOCK=config.block, num_warps=config.warps, num_stages=1, enable_fp_fusion=True,
                **constants(rule),
            )  # fmt: skip
    return update, new_state


def corrections(rule: Any, step: int | Tensor, steps: int, like: Tensor) -> Tensor:
    """RNNprop's 1 / (1 - beta^t) of both moments for each step, `(steps, 2)` float32; else `like`.

    Computed in float64 on the device of `like`.
    """
    if rule.family != "rnnprop":
        return like
    count = torch.arange(1, steps + 1, dtype=torch.float64, device=like.device) + step
    columns = [
        -1.0 / torch.expm1(count * math.log(beta)) if beta else torch.ones_like(count)
        for beta in (rule.beta1, rule.beta2)
    ]
    return torch.stack(columns, dim=1).float()


def _window(
    rule: Any, tensors: dict[str, Tensor], sizes: tuple[int, ...], lr: float, keep: float
) -> Tensor:
    """Run both kernels on contiguous tensors, named as in `window`: fills d_state, returns d_meta.

    `sizes` are coordinates, coordinates of a run, runs, steps and rows of `grads`.
    """
    meta = tensors["meta"]
    config = window_config(rule, sizes[0], sizes[3])
    partials = meta.new_empty((config.programs, meta.numel()))
    d_meta = torch.empty_like(meta)
    with torch.cuda.device_of(meta):
        if config.programs:
            scratch = meta.new_empty(config.programs * config.scratch_rows * config.block)
            # What the compile-time flags leave unused gets some tensor.
            window_kernels.window[(config.programs,)](
                *(tensors.get(name, meta) for name in WINDOW_TENSORS), partials, scratch,
                *launch_sizes(config, sizes), lr, keep, *scalars(rule),
                META=meta.numel(), GIVEN="d_update" in tensors, BLOCK=config.block,
                num_warps=config.warps, num_stages=1, enable_fp_fusion=True, **constants(rule),
            )  # fmt: skip
        window_kernels.add_partials[(triton.cdiv(meta.numel(), SUM_BLOCK),)](
            partials, d_meta, config.programs,
            META=meta.numel(), DEPTH=SUM_DEPTH, BLOCK=SUM_BLOCK,
            num_warps=4, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
    return d_meta


def launch_sizes(config: WindowConfig, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The integer arguments of the window kernel, in its order."""
    return (
        *(config.scratch_rows, *sizes, config.segment, config.segments),
        *(math.ceil(sizes[0] / config.block), config.programs),
    )
