"""The Triton kernels of the window backward and of the functional step; `window.py` launches them.

A program owns a tile of BLOCK coordinates at a time and takes it through all steps of the window.
Whatever is kept of a tile lies in the program's scratch as rows of BLOCK floats:

    slots    the states that the replay met, S rows each in the order of the state's planes
    d_state  S rows, the adjoint of the state after the step at hand
    gates    4 H rows, the gate gradients of one layer and step
    x        H rows, the first layer's inputs (features that H rows do not hold run on into pair)
    pair     2 rows, RNNprop's g~ and m~
    d_out    1 row, the gradient of the readout's result
    adjoint  1 row, dL/d(parameter) after the step at hand
    d_x      H + 2 rows, the gradients of the first layer's inputs, for RNNprop of g~ and m~ too

A program is one warp. Each part below spreads rows over its lanes in a layout of its own, so it may
read what other lanes stored: a barrier stands between any two parts of which one stores rows that
the other loads or stores.
"""

# Triton's functions take Triton's values: annotations would be wrong for either side.
# mypy: disable-error-code="no-untyped-def,assignment"

from __future__ import annotations

import triton
import triton.language as tl

from . import cells
from .cells import number
from .products import add_outer, transposed_product
from .step_kernels import MOMENTS
from .window_layers import (
    enter_tile,
    feature_gradients,
    first_inputs,
    forward,
    gate_gradients,
    leave_tile,
    output_gradient,
    projection_gradients,
    readout,
    scale_rows,
    update_gradient,
)


@triton.jit
def backward_layer(
    old_rows, new_rows, d_rows, work_rows, partial, meta,
    INDEX: tl.constexpr, WITH_INPUTS: tl.constexpr, RNNPROP: tl.constexpr, FEATURES: tl.constexpr,
    INPUTS: tl.constexpr, LAYERS: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A layer of one step backwards: its weight gradient, and its adjoint before the step.

    The gradient of its inputs is added to the adjoint of the layer below; the first layer's is
    written to rows d_x if wanted.
    """
    OFFSET: tl.constexpr = cells.layer_offset(INDEX, RNNPROP, FEATURES, H)
    READOUT: tl.constexpr = cells.layer_offset(LAYERS, RNNPROP, FEATURES, H)
    WIDTH: tl.constexpr = H if INDEX else INPUTS
    PLANE: tl.constexpr = (MOMENTS if RNNPROP else 0) + 2 * INDEX * H
    gates = work_rows
    x_rows = work_rows + 4 * H * BLOCK
    d_out_row = x_rows + (H + 2) * BLOCK
    old, d_state = old_rows + PLANE * BLOCK, d_rows + PLANE * BLOCK
    below = new_rows + (PLANE - 2 * H) * BLOCK if INDEX else x_rows
    gate_gradients(
        below, old, d_state, gates, meta + OFFSET, d_out_row, meta + READOUT,
        number(INDEX + 1 == LAYERS), number(WIDTH), H, BLOCK,
    )  # fmt: skip
    tl.debug_barrier()
    add_outer(
        partial, number(4 * H), number(OFFSET), number(OFFSET + 4 * H * WIDTH),
        number(OFFSET + 4 * H * (WIDTH + H)), gates, below, old, number(WIDTH), number(H), BLOCK,
    )  # fmt: skip
    hidden_weights = meta + OFFSET + 4 * H * WIDTH
    transposed_product(gates, hidden_weights, d_state, number(0), 4 * H, H, BLOCK)
    if INDEX > 0:
        target = d_state - 2 * H * BLOCK
        transposed_product(gates, meta + OFFSET, target, number(1), 4 * H, H, BLOCK)
    elif WITH_INPUTS:
        target = d_out_row + 2 * BLOCK
        transposed_product(gates, meta + OFFSET, target, number(0), 4 * H, WIDTH, BLOCK)
    # From here on the rows of the gates are written again: every thread has read them.
    tl.debug_barrier()


@triton.jit(
    do_not_specialize=[
        *("scratch_rows", "total", "dim", "runs", "steps", "rows", "segment", "segments"),
        *("tiles", "programs"),
    ]
)
def window(
    grads, state, meta, loss_weights, d_update, corrections, d_state, d_grads, partials, scratch,
    scratch_rows, total, dim, runs, steps, rows, segment, segments, tiles, programs, lr, keep,
    scale, p, eps, exp_p, beta1, beta2, rest1, rest2,
    RNNPROP: tl.constexpr, LOG_SIGN: tl.constexpr, LAYERS: tl.constexpr, H: tl.constexpr,
    GIVEN: tl.constexpr, META: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The whole window for this program's tiles.

    `grads` (rows, total), `loss_weights` (rows, runs), `state` and `d_state` (S, total),
    `partials` (programs, META). With GIVEN the window is one step: dL/d(update) is `d_update`
    (total,), `d_state` holds dL/d(new state) at first, and dL/d(grad) goes to `d_grads` (total,).
    """
    FEATURES: tl.constexpr = 2 if RNNPROP or LOG_SIGN else 1
    INPUTS: tl.constexpr = H if RNNPROP else FEATURES
    FIRST: tl.constexpr = MOMENTS if RNNPROP else 0
    OFFSET: tl.constexpr = cells.layer_offset(0, RNNPROP, FEATURES, H)
    READOUT: tl.constexpr = cells.layer_offset(LAYERS, RNNPROP, FEATURES, H)
    WIDTH: tl.constexpr = H if LAYERS else INPUTS
    PLANES: tl.constexpr = FIRST + 2 * LAYERS * H
    total, runs = tl.cast(total, tl.int64), tl.cast(runs, tl.int64)
    program = tl.program_id(0)
    partial = partials + program.to(tl.int64) * META
    for start in range(0, META, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(partial + at, tl.zeros((BLOCK,), tl.float32), at < META)
    slots = scratch + program.to(tl.int64) * scratch_rows * BLOCK
    d_rows = slots + tl.cast(segments + segment, tl.int64) * (PLANES * BLOCK)
    work_rows = d_rows + PLANES * BLOCK
    x_rows = work_rows + 4 * H * BLOCK
    pair_rows = x_rows + H * BLOCK
    d_out_row = pair_rows + 2 * BLOCK
    adjoint_row = d_out_row + BLOCK
    d_x_rows = adjoint_row + BLOCK
    tl.debug_barrier()
    for tile in range(program, tiles, programs):
        first = tl.cast(tile, tl.int64) * BLOCK
        enter_tile(
            grads, state, d_state, loss_weights, slots, d_rows, adjoint_row, first, total, dim,
            runs, steps, rows, GIVEN, PLANES, BLOCK,
        )  # fmt: skip
        tl.debug_barrier()
        # Up through the segments for the states between them, then down through all.
        for turn in range(2 * segments - 1):
            down = turn >= segments - 1
            index = tl.where(down, 2 * segments - 2 - turn, turn)
            first_step = index * segment
            count = tl.minimum(segment, steps - first_step)
            for j in range(count):
                t = tl.cast(first_step + j, tl.int64)
                old = slots + slot(j, index, count, segments) * (PLANES * BLOCK)
                new = slots + slot(j + 1, index, count, segments) * (PLANES * BLOCK)
                first_inputs(
                    grads + t * total, old, new, BLOCK, first, total, x_rows, meta,
                    corrections + 2 * t, p, eps, exp_p, beta1, beta2, rest1, rest2, True,
                    RNNPROP, LOG_SIGN, H, BLOCK,
                )  # fmt: skip
                forward(
                    x_rows, old, new, BLOCK, 0, BLOCK, meta,
                    FIRST, INPUTS, OFFSET, LAYERS, H, BLOCK,
                )  # fmt: skip
            for back in range(tl.where(down, count, 0)):
                j = count - 1 - back
                t = tl.cast(first_step + j, tl.int64)
                old = slots + slot(j, index, count, segments) * (PLANES * BLOCK)
                new = slots + slot(j + 1, index, count, segments) * (PLANES * BLOCK)
                top = new + (FIRST + 2 * (LAYERS - 1) * H) * BLOCK if LAYERS else x_rows
                first_inputs(
                    grads + t * total, old, new, BLOCK, first, total, x_rows, meta,
                    corrections + 2 * t, p, eps, exp_p, beta1, beta2, rest1, rest2, True,
                    RNNPROP, LOG_SIGN, H, BLOCK,
                )  # fmt: skip
                update_gradient(
                    grads + t * total, loss_weights + t * runs, d_update, d_out_row, adjoint_row,
                    first, total, dim, lr, keep, GIVEN, BLOCK,
                )  # fmt: skip
                tl.debug_barrier()
                output_gradient(d_out_row, top, meta + READOUT, scale, RNNPROP, WIDTH, BLOCK)
                tl.debug_barrier()
                add_outer(
                    partial, number(1), number(READOUT), number(READOUT), number(READOUT + WIDTH),
                    d_out_row, top, top, number(WIDTH), number(0), BLOCK,
                )  # fmt: skip
                for above in tl.static_range(LAYERS):
                    backward_layer(
                        old, new, d_rows, work_rows, partial, meta, LAYERS - 1 - above,
                        RNNPROP or GIVEN, RNNPROP, FEATURES, INPUTS, LAYERS, H, BLOCK,
                    )  # fmt: skip
                if RNNPROP:
                    projection_gradients(x_rows, d_x_rows, meta, H, BLOCK)
                    tl.debug_barrier()
                    add_outer(
                        partial, number(H), number(0), number(0), number(2 * H), d_x_rows,
                        pair_rows, pair_rows, number(2), number(0), BLOCK,
                    )  # fmt: skip
                elif GIVEN and LAYERS == 0:
                    scale_rows(d_out_row, meta + READOUT, d_x_rows, INPUTS, BLOCK)
                    tl.debug_barrier()
                if RNNPROP or GIVEN:
                    feature_gradients(
                        grads + t * total, d_grads, first, total, new, pair_rows, d_x_rows, d_rows,
                        corrections + 2 * t, p, eps, exp_p, beta1, beta2, rest1, rest2, GIVEN,
                        RNNPROP, LOG_SIGN, H, BLOCK,
                    )  # fmt: skip
                # Rows that other threads have read are written again.
                tl.debug_barrier()
        leave_tile(d_state, d_rows, first, total, PLANES, BLOCK)
        tl.debug_barrier()


@triton.jit
def slot(j, index, count, segments):
    """Where the state before step `j` of segment `index` lies, counted in states.

    The states between segments come first: the segment above replays from them.
    """
    inner = tl.where(j == count, index + 1, segments + j)
    return tl.cast(tl.where(j == 0, index, inner), tl.int64)


@triton.jit(do_not_specialize=["programs"])
def add_partials(
    partials, d_meta, programs, META: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr
):
    """The sum of partials `(programs, META)` in a fixed order, in float64."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((DEPTH, BLOCK), tl.float64)
    for start in range(0, programs, DEPTH):
        row = tl.cast(start + tl.arange(0, DEPTH), tl.int64)
        inside = (row < programs)[:, None] & (column < META)[None, :]
        values = tl.load(partials + row[:, None] * META + column[None, :], inside, 0.0)
        total += values.to(tl.float64)
    tl.store(d_meta + column, tl.sum(total, 0).to(tl.float32), column < META)


@triton.jit(do_not_specialize=["total", "tiles", "programs"])
def functional_step(
    grad, state, meta, corrections, update, new_state, scratch, total, tiles, programs,
    scale, p, eps, exp_p, beta1, beta2, rest1, rest2,
    RNNPROP: tl.constexpr, LOG_SIGN: tl.constexpr, LAYERS: tl.constexpr, H: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One step out of place: `update` (total,) and `new_state` (S, total).

    `scratch` (programs, H + 2, BLOCK) holds the first layer's inputs.
    """
    FEATURES: tl.constexpr = 2 if RNNPROP or LOG_SIGN else 1
    INPUTS: tl.constexpr = H if RNNPROP else FEATURES
    FIRST: tl.constexpr = MOMENTS if RNNPROP else 0
    OFFSET: tl.constexpr = cells.layer_offset(0, RNNPROP, FEATURES, H)
    READOUT: tl.constexpr = cells.layer_offset(LAYERS, RNNPROP, FEATURES, H)
    total = tl.cast(total, tl.int64)
    program = tl.program_id(0)
    x_rows = scratch + program * ((H + 2) * BLOCK)
    lane = tl.arange(0, BLOCK)
    for tile in range(program, tiles, programs):
        start = tl.cast(tile, tl.int64) * BLOCK
        valid = start + lane < total
        # Lanes beyond the last coordinate repeat it and store nothing.
        place = tl.minimum(start + lane, total - 1)
        first_inputs(
            grad, state, new_state, total, start, total, x_rows, meta,
            corrections, p, eps, exp_p, beta1, beta2, rest1, rest2, False,
            RNNPROP, LOG_SIGN, H, BLOCK,
        )  # fmt: skip
        forward(
            x_rows, state, new_state, total, start, total, meta,
            FIRST, INPUTS, OFFSET, LAYERS, H, BLOCK,
        )  # fmt: skip
        if LAYERS:
            top = new_state + place + (FIRST + 2 * (LAYERS - 1) * H) * total
            out = readout(top, total, meta + READOUT, H, BLOCK)
        else:
            out = readout(x_rows + lane, BLOCK, meta + READOUT, INPUTS, BLOCK)
            tl.debug_barrier()
        if RNNPROP:
            out = -scale * cells.tanh(out)
        else:
            out = scale * out
        tl.store(update + place, out, valid)
