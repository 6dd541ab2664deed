"""Maths of the hierarchical rule in Triton: where its meta-parameters lie, GRUs and asinh."""

# Triton's functions take Triton's values: annotations would be wrong for either side.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from ..lstm.cells import bounded_exp, tanh_fraction


@triton.constexpr_function
def offset(name, P, T, G, S):
    """Offset of one of the flat meta-parameters, in the order of the rule's own.

    P, T, G: hidden sizes of the three levels; S: number of time scales.
    """
    sizes = [
        *(("param_start", P), ("tensor_start", T), ("global_start", G)),
        *(("direction", P), ("shortcut", S), ("rate", P), ("rate_bias", 1)),
        *(("square_decay", P), ("square_decay_bias", 1)),
        *(("average_decay", P), ("average_decay_bias", 1)),
        *(("rate_momentum", 1), ("log_rate_offset", 1)),
    ]
    for cell, inputs, hidden in (
        ("param", 3 * S, P),
        ("tensor", P + 3 * S, T),
        ("global", T, G),
    ):
        sizes += [
            (cell + "_gates", 2 * hidden * (inputs + hidden)),
            (cell + "_gates_bias", 2 * hidden),
            (cell + "_candidate", hidden * (inputs + hidden)),
            (cell + "_candidate_bias", hidden),
        ]
    for name_of_map, inputs, outputs in (
        ("tensor_to_param", T, 3 * P),
        ("global_to_param", G, 3 * P),
        ("global_to_tensor", G, 3 * T),
    ):
        sizes += [(name_of_map, inputs * outputs), (name_of_map + "_bias", outputs)]
    at = 0
    for known, size in sizes:
        if known == name:
            return at
        at += size
    raise ValueError(name)


@triton.constexpr_function
def padded(size):
    """The power of two that holds `size`, at least 16."""
    return max(16, triton.next_power_of_2(size))


@triton.jit
def bounded_gradient(g):
    """The gradient held within +-1e11, so that no square overflows; NaN for NaN."""
    g = tl.minimum(g, 1e11, propagate_nan=tl.PropagateNan.ALL)
    return tl.maximum(g, -1e11, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def asinh(x):
    """asinh, accurate relative to x near 0; NaN for NaN."""
    a = tl.abs(x)
    s = x * x
    far = tl.log(a + tl.sqrt(1.0 + s))
    # That is the logarithm of about 1 near 0: there the odd minimax polynomial, error 2.9e-8.
    series = s * 0.020121985275700225 - 0.04269933265471015
    series = series * s + 0.07484758497844636
    series = series * s - 0.1666628812982101
    return tl.where(a < 0.5, x + x * s * series, tl.where(x < 0.0, -far, far))


@triton.jit
def gru_state(update, candidate, h):
    """u h + (1 - u) c by one division, from the preactivations of u and c."""
    e = bounded_exp(-update)
    numerator, denominator = tanh_fraction(candidate)
    return (h * denominator + e * numerator) / ((1.0 + e) * denominator)


@triton.jit
def unit_state(update, candidate, h):
    """`gru_state` to an absolute error of a rounding of 1: near 0 the candidate cancels."""
    e, m = bounded_exp(-update), bounded_exp(2.0 * candidate)
    denominator = m + 1.0
    return (h * denominator + e * (m - 1.0)) / (e * denominator + denominator)


@triton.jit
def load_vector(pointer, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """`(PADDED,)`, zeros beyond SIZE."""
    index = tl.arange(0, PADDED)
    return tl.load(pointer + index, index < SIZE, 0.0)


@triton.jit
def times(a, b):
    """a b, rounded: fused with the sum over lanes, each lane would fuse its own.

    Lanes that hold the same sum would then hold different last bits, and write them to one place.
    """
    a, b = tl.broadcast(a, b)
    return tl.fma(a, b, tl.zeros_like(a))


@triton.jit
def product(weights, vector, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr,
            PADDED_ROWS: tl.constexpr, PADDED_COLUMNS: tl.constexpr):  # fmt: skip
    """Rows of `weights`, STRIDE apart, times a padded vector: `(PADDED_ROWS,)`."""
    row = tl.arange(0, PADDED_ROWS)[:, None]
    column = tl.arange(0, PADDED_COLUMNS)[None, :]
    mask = (row < ROWS) & (column < COLUMNS)
    matrix = tl.load(weights + row * STRIDE + column, mask, 0.0)
    return tl.sum(times(matrix, vector[None, :]), 1)


@triton.jit
def transposed(weights, vector, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
               PADDED_ROWS: tl.constexpr, PADDED_COLUMNS: tl.constexpr):  # fmt: skip
    """The transpose of a matrix (ROWS, COLUMNS) times a padded vector: `(PADDED_COLUMNS,)`."""
    row = tl.arange(0, PADDED_ROWS)[:, None]
    column = tl.arange(0, PADDED_COLUMNS)[None, :]
    mask = (row < ROWS) & (column < COLUMNS)
    matrix = tl.load(weights + row * COLUMNS + column, mask, 0.0)
    return tl.sum(times(matrix, vector[:, None]), 0)


@triton.jit
def affine_gradient(d_weights, d_bias, d, vector, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                    PADDED_ROWS: tl.constexpr, PADDED_COLUMNS: tl.constexpr):  # fmt: skip
    """Add d vector^T and d to the gradients of a matrix (ROWS, COLUMNS) and of a bias."""
    row = tl.arange(0, PADDED_ROWS)
    column = tl.arange(0, PADDED_COLUMNS)[None, :]
    mask = (row < ROWS)[:, None] & (column < COLUMNS)
    at = d_weights + row[:, None] * COLUMNS + column
    tl.store(at, tl.load(at, mask, 0.0) + d[:, None] * vector[None, :], mask)
    tl.store(d_bias + row, tl.load(d_bias + row, row < ROWS, 0.0) + d, row < ROWS)


@triton.jit
def affine(weights, bias, vector, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
           PADDED_ROWS: tl.constexpr, PADDED_COLUMNS: tl.constexpr):  # fmt: skip
    """A matrix (ROWS, COLUMNS) times a padded vector, plus a bias."""
    value = product(weights, vector, ROWS, COLUMNS, COLUMNS, PADDED_ROWS, PADDED_COLUMNS)
    return value + load_vector(bias, ROWS, PADDED_ROWS)


@triton.jit
def gru(gates, gates_bias, candidate, candidate_bias, x, h, injected_r, injected_u, injected_c,
        INPUTS: tl.constexpr, H: tl.constexpr, PADDED_INPUTS: tl.constexpr,
        PADDED_H: tl.constexpr):  # fmt: skip
    """The next state `(PADDED_H,)` of a GRU of one vector; zeros beyond H stay so."""
    WIDTH: tl.constexpr = INPUTS + H
    r = product(gates, x, H, INPUTS, WIDTH, PADDED_H, PADDED_INPUTS)
    r += product(gates + INPUTS, h, H, H, WIDTH, PADDED_H, PADDED_H)
    r += load_vector(gates_bias, H, PADDED_H) + injected_r
    update = gates + H * WIDTH
    u = product(update, x, H, INPUTS, WIDTH, PADDED_H, PADDED_INPUTS)
    u += product(update + INPUTS, h, H, H, WIDTH, PADDED_H, PADDED_H)
    u += load_vector(gates_bias + H, H, PADDED_H) + injected_u
    reset = h / (1.0 + bounded_exp(-r))
    c = product(candidate, x, H, INPUTS, WIDTH, PADDED_H, PADDED_INPUTS)
    c += product(candidate + INPUTS, reset, H, H, WIDTH, PADDED_H, PADDED_H)
    c += load_vector(candidate_bias, H, PADDED_H) + injected_c
    return gru_state(u, c, h)


@triton.jit
def gate_derivatives(update, candidate, h, d):
    """Gradients of u's and c's preactivations and of h, where h' = u h + (1 - u) c, dL/dh' = d.

    s (1 - s) = e^-a s^2, which does not cancel where s is near 1.
    """
    e = bounded_exp(-update)
    u = 1.0 / (1.0 + e)
    numerator, denominator = tanh_fraction(candidate)
    c = numerator / denominator
    return d * (h - c) * (e * u * u), d * (e * u) * (1.0 - c * c), d * u


@triton.jit
def reset_derivatives(reset, h, d):
    """Of r h with gradient d: the gradient of the preactivation of r, and of h."""
    e = bounded_exp(-reset)
    r = 1.0 / (1.0 + e)
    return d * h * (e * r * r), d * r


@triton.jit
def chunk_sums(
    partials, levels, tensor, SUMS: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr
):
    """SUMS numbers of a tensor's chunks added in their order in float64, `(LANES,)`."""
    lane = tl.arange(0, LANES)
    row = tl.arange(0, ROWS)
    sums = tl.zeros((LANES,), tl.float64)
    last = tl.load(levels + tensor * 5 + 4)
    for first in range(tl.load(levels + tensor * 5 + 3), last, ROWS):
        number = first + row
        mask = (number < last)[:, None] & (lane < SUMS)[None, :]
        part = tl.load(partials + number[:, None] * SUMS + lane[None, :], mask, 0.0)
        sums += tl.sum(part.to(tl.float64), 0)
    return sums


@triton.jit(noinline=True)
def gru_backward(weights, d_weights, write, xh, injected, d_next, d_xh, d_bias, inputs, hidden,
                 PADDED_H: tl.constexpr, PADDED_WIDTH: tl.constexpr):  # fmt: skip
    """A GRU of one vector backwards, activations recomputed; all vectors are in memory.

    The weights are the gates' (2 hidden, inputs + hidden), their bias, the candidate's, its bias;
    their gradients are added to `d_weights`, laid out alike, if `write`, 1 or 0.

    `xh` is [x, h], `injected` (3 hidden,) is added to the biases, `d_next` (hidden,) is dL/dh'.
    `d_xh` and `d_bias` get the gradients of [x, h] and of the preactivations (3 hidden,).
    """
    width = inputs + hidden
    unit = tl.arange(0, PADDED_H)
    column = tl.arange(0, PADDED_WIDTH)
    valid = unit < hidden
    mask = valid[:, None] & (column < width)[None, :]
    written = (unit < hidden * write)[:, None] & (column < width)[None, :]
    at = unit[:, None] * width + column[None, :]
    bias, candidate = 2 * hidden * width, 2 * hidden * (width + 1)
    of_r, of_u = tl.load(weights + at, mask, 0.0), tl.load(weights + hidden * width + at, mask, 0.0)
    of_c = tl.load(weights + candidate + at, mask, 0.0)
    both = tl.load(xh + column, column < width, 0.0)
    h = tl.load(xh + inputs + unit, valid, 0.0)
    d = tl.load(d_next + unit, valid, 0.0)
    biases, own = weights + bias + unit, injected + unit
    r = tl.sum(times(of_r, both[None, :]), 1)
    r += tl.load(biases, valid, 0.0) + tl.load(own, valid, 0.0)
    u = tl.sum(times(of_u, both[None, :]), 1)
    u += tl.load(biases + hidden, valid, 0.0) + tl.load(own + hidden, valid, 0.0)
    # r h and its gradient change from rows to columns and back through memory.
    tl.store(d_xh + inputs + unit, h / (1.0 + bounded_exp(-r)), valid)
    tl.debug_barrier()
    of_reset = column >= inputs
    reset = tl.load(d_xh + column, of_reset & (column < width), 0.0)
    reset = tl.where(of_reset, reset, both)
    c = tl.sum(times(of_c, reset[None, :]), 1)
    c += tl.load(weights + candidate + hidden * width + unit, valid, 0.0)
    c += tl.load(own + 2 * hidden, valid, 0.0)
    d_u, d_c, through = gate_derivatives(u, c, h, d)
    d_both = tl.sum(times(of_c, d_c[:, None]), 0)
    tl.debug_barrier()
    tl.store(d_xh + column, d_both, column < width)
    tl.debug_barrier()
    d_r, d_h = reset_derivatives(r, h, tl.load(d_xh + inputs + unit, valid, 0.0))
    tl.debug_barrier()
    tl.store(d_xh + inputs + unit, d_h + through, valid)
    tl.debug_barrier()
    d_both = tl.where(of_reset, tl.load(d_xh + column, column < width, 0.0), d_both)
    d_both += tl.sum(times(of_r, d_r[:, None]), 0) + tl.sum(times(of_u, d_u[:, None]), 0)
    tl.debug_barrier()
    tl.store(d_xh + column, d_both, column < width)
    for part in tl.static_range(3):
        d_gate = d_r if part == 0 else (d_u if part == 1 else d_c)
        matrix = d_weights + at + (candidate if part == 2 else part * hidden * width)
        right = reset if part == 2 else both
        new = tl.load(matrix, written, 0.0) + d_gate[:, None] * right[None, :]
        tl.store(matrix, new, written)
        vector = d_weights + unit + bias + part * hidden + (hidden * width if part == 2 else 0)
        new = tl.load(vector, unit < hidden * write, 0.0) + d_gate
        tl.store(vector, new, unit < hidden * write)
        tl.store(d_bias + part * hidden + unit, d_gate, valid)
