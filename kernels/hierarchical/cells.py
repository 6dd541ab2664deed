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
def log1p(t):
    """log(1 + t) for t >= 0, accurate relative to t near 0; NaN for NaN."""
    u = 1.0 + t
    # The rounding of 1 + t cancels in the quotient.
    return tl.where(u == 1.0, t, tl.log(u) * tl.div_rn(t, tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def asinh(x):
    """sign(x) log1p(a + a^2 / (1 + sqrt(1 + a^2))), a = |x|."""
    a = tl.abs(x)
    square = a * a
    value = log1p(a + square / (1.0 + tl.sqrt_rn(1.0 + square)))
    return tl.where(x < 0.0, -value, value)


@triton.jit
def gru_state(update, candidate, h):
    """u h + (1 - u) c by one division, from the preactivations of u and c."""
    e = bounded_exp(-update)
    numerator, denominator = tanh_fraction(candidate)
    return (h * denominator + e * numerator) / ((1.0 + e) * denominator)


@triton.jit
def load_vector(pointer, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """`(PADDED,)`, zeros beyond SIZE."""
    index = tl.arange(0, PADDED)
    return tl.load(pointer + index, index < SIZE, 0.0)


@triton.jit
def product(weights, vector, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr,
            PADDED_ROWS: tl.constexpr, PADDED_COLUMNS: tl.constexpr):  # fmt: skip
    """Rows of `weights`, STRIDE apart, times a padded vector: `(PADDED_ROWS,)`."""
    row = tl.arange(0, PADDED_ROWS)[:, None]
    column = tl.arange(0, PADDED_COLUMNS)[None, :]
    mask = (row < ROWS) & (column < COLUMNS)
    matrix = tl.load(weights + row * STRIDE + column, mask, 0.0)
    return tl.sum(matrix * vector[None, :], 1)


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
