"""Parts of a step, forwards and backwards, that the kernels in `window_kernels.py` are made of.

Rows are float32 arrays of BLOCK coordinates; an argument that says "at" is a `(BLOCK,)` array of
addresses of the first row, the others follow at a stride. Loops over units and over inputs are
rolled, so code and registers do not grow with the hidden size and nothing is padded: a group of
units is summed in registers, an input is loaded once for the group, and a weight, a single number,
once for all coordinates of a thread.

Most functions are not inlined and take addresses and single numbers only: then no array lives
across a call, so nothing spills, and compiling stays fast (Triton's layout passes take time
quadratic in the size of a function: minutes for one that holds everything).

A layer's number of inputs is a run-time number, so that one function serves all layers: ptxas
unrolls a loop of known length and keeps its loads in registers until all of them are taken.
"""

# Triton's functions take Triton's values: annotations would be wrong for either side.
# mypy: disable-error-code="no-untyped-def,assignment"

from __future__ import annotations

import triton
import triton.language as tl

from . import cells
from .products import group_size


@triton.jit
def accumulate(sums, x_at, stride, weights, unit, width, H: tl.constexpr, GROUP: tl.constexpr):
    """Add W x of the four gates of units `unit` .. `unit + GROUP` to a tuple, gates innermost."""
    for k in range(width):
        x = tl.load(x_at + k * stride)
        new = ()
        for n in tl.static_range(4 * GROUP):
            row = (n % 4) * H + tl.minimum(unit + n // 4, H - 1)
            new = new + (sums[n] + x * tl.load(weights + row * width + k),)  # noqa: RUF005
        sums = new
    return sums


@triton.jit
def preactivations(
    x_at, x_stride, h_at, h_stride, weights, unit, width,
    H: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """W x + U h + b of units `unit` .. `unit + GROUP`: a tuple of i, f, g, o of each unit."""
    sums = ()
    for n in tl.static_range(4 * GROUP):
        row = (n % 4) * H + tl.minimum(unit + n // 4, H - 1)
        bias = tl.load(weights + 4 * H * (width + H) + row)
        sums = sums + (tl.zeros((BLOCK,), tl.float32) + bias,)  # noqa: RUF005
    sums = accumulate(sums, x_at, x_stride, weights, unit, width, H, GROUP)
    return accumulate(sums, h_at, h_stride, weights + 4 * H * width, unit, H, H, GROUP)


@triton.jit(noinline=True)
def forward_layer(
    x, x_stride, old, new, stride, first, total, weights, width,
    H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A layer from its planes h, c at `old` to those at `new`, coordinates `first` and on.

    The inputs at `x` have an `x_stride` of their own; it is BLOCK where they are rows of a scratch.
    Lanes beyond `total` repeat the last coordinate and store nothing.
    """
    lane = tl.arange(0, BLOCK)
    place = tl.minimum(first + lane, total - 1)
    valid = first + lane < total
    x_at = x + tl.where(x_stride == BLOCK, lane, place)
    old_at, new_at = old + place, new + place
    GROUP: tl.constexpr = group_size(H, 4)
    for unit in range(0, H, GROUP):
        a = preactivations(x_at, x_stride, old_at, stride, weights, unit, width, H, GROUP, BLOCK)
        for u in tl.static_range(GROUP):
            row = tl.minimum(unit + u, H - 1)
            c = tl.load(old_at + (H + row) * stride)
            h, c = cells.lstm_cell(a[4 * u], a[4 * u + 1], a[4 * u + 2], a[4 * u + 3], c)
            tl.store(new_at + row * stride, h, valid)
            tl.store(new_at + (H + row) * stride, c, valid)


@triton.jit(noinline=True)
def first_inputs(
    grad, old, new, stride, first, total, x_rows, meta, corrections, p, eps, exp_p,
    beta1, beta2, rest1, rest2, WHOLE: tl.constexpr,
    RNNPROP: tl.constexpr, LOG_SIGN: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the first layer's inputs to `x_rows`; RNNprop's moments go from `old` to `new`.

    RNNprop's g~ and m~ follow after the H rows of the inputs. With WHOLE the states are rows of a
    scratch, else planes of `total` coordinates like the gradient.
    """
    lane = tl.arange(0, BLOCK)
    valid = first + lane < total
    place = lane if WHOLE else tl.minimum(first + lane, total - 1)
    g = tl.load(grad + first + lane, valid, 0.0)
    if RNNPROP:
        m, v, g_scaled, m_scaled = cells.moment_features(
            g, tl.load(old + place), tl.load(old + stride + place),
            tl.load(corrections), tl.load(corrections + 1), beta1, beta2, rest1, rest2,
        )  # fmt: skip
        kept = lane < BLOCK if WHOLE else valid
        tl.store(new + place, m, kept)
        tl.store(new + stride + place, v, kept)
        for unit in range(H):
            affine = g_scaled * tl.load(meta + 2 * unit) + tl.load(meta + 2 * H + unit)
            affine += m_scaled * tl.load(meta + 2 * unit + 1)
            tl.store(x_rows + unit * BLOCK + lane, cells.elu(affine))
        tl.store(x_rows + H * BLOCK + lane, g_scaled)
        tl.store(x_rows + (H + 1) * BLOCK + lane, m_scaled)
    elif LOG_SIGN:
        logarithm, linear = cells.log_sign_features(g, p, eps, exp_p)
        tl.store(x_rows + lane, logarithm)
        tl.store(x_rows + BLOCK + lane, linear)
    else:
        tl.store(x_rows + lane, g)


@triton.jit
def forward(
    x_rows, old, new, stride, first, total, meta,
    FIRST: tl.constexpr, INPUTS: tl.constexpr, OFFSET: tl.constexpr, LAYERS: tl.constexpr,
    H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All layers of one step. FIRST: planes before the layers', OFFSET: the first one's weights.

    A barrier before each layer and after the last: its rows were stored by other threads.
    """
    tl.debug_barrier()
    for index in tl.static_range(LAYERS):
        from_plane = old + (FIRST + 2 * index * H) * stride
        to_plane = new + (FIRST + 2 * index * H) * stride
        if index == 0:
            forward_layer(
                x_rows, BLOCK, from_plane, to_plane, stride, first, total, meta + OFFSET,
                cells.number(INPUTS), H, BLOCK,
            )  # fmt: skip
        else:
            forward_layer(
                to_plane - 2 * H * stride, stride, from_plane, to_plane, stride, first, total,
                meta + OFFSET + 4 * H * (INPUTS + H + 1 + (index - 1) * (2 * H + 1)),
                cells.number(H), H, BLOCK,
            )  # fmt: skip
        tl.debug_barrier()


@triton.jit
def readout(top_at, stride, weights, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """q . top + q0."""
    out = tl.zeros((BLOCK,), tl.float32) + tl.load(weights + WIDTH)
    for k in range(WIDTH):
        out += tl.load(weights + k) * tl.load(top_at + k * stride)
    return out


@triton.jit(noinline=True)
def output_gradient(
    d_row, top, weights, scale, RNNPROP: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """In place from the gradient of the update to that of the readout's result."""
    lane = tl.arange(0, BLOCK)
    d_out = tl.load(d_row + lane) * scale
    if RNNPROP:
        bounded = cells.tanh(readout(top + lane, BLOCK, weights, WIDTH, BLOCK))
        d_out = -d_out * (1.0 - bounded * bounded)
    tl.store(d_row + lane, d_out)


@triton.jit(noinline=True)
def gate_gradients(
    x, old, d_state, gates, weights, d_out_row, readout_weights, top, width,
    H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Recompute a layer's gates; write their gradients, and the adjoint of the old c in place.

    Rows at `old` are the layer's h, c before the step, those at `d_state` the adjoints of h, c
    after it. The top layer's h also has the readout's.
    """
    lane = tl.arange(0, BLOCK)
    x_at, old_at, d_state_at, gates_at = x + lane, old + lane, d_state + lane, gates + lane
    d_out = tl.load(d_out_row + lane)
    GROUP: tl.constexpr = group_size(H, 4)
    for unit in range(0, H, GROUP):
        a = preactivations(x_at, BLOCK, old_at, BLOCK, weights, unit, width, H, GROUP, BLOCK)
        for u in tl.static_range(GROUP):
            row = unit + u
            # A group may reach beyond the last unit.
            valid = lane < (H - row) * BLOCK
            row = tl.minimum(row, H - 1)
            c = tl.load(old_at + (H + row) * BLOCK)
            d_h = tl.load(d_state_at + row * BLOCK)
            d_c = tl.load(d_state_at + (H + row) * BLOCK)
            if top != 0:
                d_h += d_out * tl.load(readout_weights + row)
            d_i, d_f, d_g, d_o, d_c = cells.lstm_cell_backward(
                a[4 * u], a[4 * u + 1], a[4 * u + 2], a[4 * u + 3], c, d_h, d_c
            )
            tl.store(d_state_at + (H + row) * BLOCK, d_c, valid)
            tl.store(gates_at + row * BLOCK, d_i, valid)
            tl.store(gates_at + (H + row) * BLOCK, d_f, valid)
            tl.store(gates_at + (2 * H + row) * BLOCK, d_g, valid)
            tl.store(gates_at + (3 * H + row) * BLOCK, d_o, valid)


@triton.jit(noinline=True)
def scale_rows(d_row, weights, target, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Write the row at `d_row` times each of COUNT weights to rows `target`."""
    lane = tl.arange(0, BLOCK)
    for k in range(COUNT):
        tl.store(target + k * BLOCK + lane, tl.load(d_row + lane) * tl.load(weights + k))


@triton.jit(noinline=True)
def projection_gradients(x_rows, d_x_rows, meta, H: tl.constexpr, BLOCK: tl.constexpr):
    """RNNprop: d_x becomes the projection's gradient before the ELU; those of g~, m~ follow it."""
    lane = tl.arange(0, BLOCK)
    d_g_scaled, d_m_scaled = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for k in range(H):
        z = tl.load(x_rows + k * BLOCK + lane)
        at = d_x_rows + k * BLOCK + lane
        d_affine = tl.load(at) * tl.where(z > 0.0, 1.0, z + 1.0)
        tl.store(at, d_affine)
        d_g_scaled += d_affine * tl.load(meta + 2 * k)
        d_m_scaled += d_affine * tl.load(meta + 2 * k + 1)
    tl.store(d_x_rows + H * BLOCK + lane, d_g_scaled)
    tl.store(d_x_rows + (H + 1) * BLOCK + lane, d_m_scaled)


@triton.jit(noinline=True)
def feature_gradients(
    grad, d_grad, first, total, new_rows, pair_rows, d_x_rows, d_rows, corrections, p, eps, exp_p,
    beta1, beta2, rest1, rest2, WITH_GRADS: tl.constexpr,
    RNNPROP: tl.constexpr, LOG_SIGN: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """RNNprop's moments back by a step, and dL/d(grad) if WITH_GRADS."""
    lane = tl.arange(0, BLOCK)
    valid = first + lane < total
    g = tl.load(grad + first + lane, valid, 0.0)
    if RNNPROP:
        result, d_m, d_v = cells.moment_features_backward(
            tl.load(d_x_rows + H * BLOCK + lane), tl.load(d_x_rows + (H + 1) * BLOCK + lane),
            tl.load(d_rows + lane), tl.load(d_rows + BLOCK + lane), g,
            tl.load(new_rows + BLOCK + lane), tl.load(pair_rows + lane),
            tl.load(pair_rows + BLOCK + lane), tl.load(corrections), tl.load(corrections + 1),
            beta1, beta2, rest1, rest2,
        )  # fmt: skip
        tl.store(d_rows + lane, d_m)
        tl.store(d_rows + BLOCK + lane, d_v)
    else:
        result = tl.load(d_x_rows + lane)
        if LOG_SIGN:
            second = tl.load(d_x_rows + BLOCK + lane)
            result = cells.log_sign_features_backward(result, second, g, p, eps, exp_p)
    if WITH_GRADS:
        tl.store(d_grad + first + lane, result, valid)


@triton.jit(noinline=True)
def enter_tile(
    grads, state, d_state, loss_weights, slots, d_rows, adjoint_row, first, total, dim, runs, steps,
    rows, GIVEN: tl.constexpr, PLANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy a tile's first state to the first slot; set the adjoints after the last step."""
    lane = tl.arange(0, BLOCK)
    place = first + lane
    valid = place < total
    for plane in range(PLANES):
        at = plane * total + place
        tl.store(slots + plane * BLOCK + lane, tl.load(state + at, valid, 0.0))
        if GIVEN:
            d_new = tl.load(d_state + at, valid, 0.0)
        else:
            d_new = tl.zeros((BLOCK,), tl.float32)
        tl.store(d_rows + plane * BLOCK + lane, d_new)
    if not GIVEN:
        # No lane has a gradient after the last step where there is no such row.
        last = place < total * (rows - steps)
        weight = tl.load(loss_weights + steps * runs + place // dim, last, 0.0)
        tl.store(adjoint_row + lane, weight * tl.load(grads + steps * total + place, last, 0.0))


@triton.jit(noinline=True)
def leave_tile(d_state, d_rows, first, total, PLANES: tl.constexpr, BLOCK: tl.constexpr):
    """Write the adjoint of a tile's first state."""
    lane = tl.arange(0, BLOCK)
    for plane in range(PLANES):
        value = tl.load(d_rows + plane * BLOCK + lane)
        tl.store(d_state + plane * total + first + lane, value, first + lane < total)


@triton.jit(noinline=True)
def update_gradient(
    grad, loss_weights, d_update, d_row, adjoint_row, first, total, dim, lr, keep,
    GIVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write dL/d(update) of a step to `d_row`; take the adjoint of the parameter before it.

    `grad` and `loss_weights` are those of the step.
    """
    lane = tl.arange(0, BLOCK)
    place = first + lane
    valid = place < total
    if GIVEN:
        tl.store(d_row + lane, tl.load(d_update + place, valid, 0.0))
    else:
        adjoint = tl.load(adjoint_row + lane)
        tl.store(d_row + lane, lr * adjoint)
        weight = tl.load(loss_weights + place // dim, valid, 0.0)
        tl.store(adjoint_row + lane, weight * tl.load(grad + place, valid, 0.0) + keep * adjoint)
