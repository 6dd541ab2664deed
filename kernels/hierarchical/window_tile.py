"""A tile of the backward sweep over the parameters: all its parts, forwards, backwards and summed.

`window_sweep.py` has the parts. These functions are not inlined either: what they compute addresses
from would else stay in registers across the calls of all parts, and spill.
"""

# Triton's functions take Triton's values: annotations would be wrong for either side.
# mypy: disable-error-code="no-untyped-def,assignment"

from __future__ import annotations

import triton
import triton.language as tl

from ..lstm.cells import number
from ..lstm.products import add_outer, transposed_product
from ..lstm.step_kernels import address
from . import cells
from .window_sweep import (
    affine_rows,
    down,
    enter_tile,
    features_backward,
    group,
    readouts_backward,
    reset_backward,
    reset_rows,
    row,
)


@triton.jit(noinline=True)
def forward_tile(
    tensor, start, left, meta, down_at, work,
    P: tl.constexpr, T: tl.constexpr, G: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The preactivations of the gates, and all they depend on; `tensor` is a row of the table."""
    WIDTH: tl.constexpr = 3 * S + P
    gates = work + row("gates", P, S) * BLOCK
    grad, planes = address(tensor, 0, 1, tl.float32), address(tensor, 0, 2, tl.float32)
    taken = tl.load(address(tensor, 0, 3, tl.float32))
    enter_tile(
        grad + start, planes + start, tl.load(tensor + 4), left, taken, meta, down_at, work,
        P, T, G, S, BLOCK,
    )  # fmt: skip
    tl.debug_barrier()
    affine_rows(
        work + row("gates_in", P, S) * BLOCK, meta + cells.offset("param_gates", P, T, G, S),
        down_at + down("biases", P, S), gates, number(2 * P), number(WIDTH),
        group(P, 10), BLOCK,
    )  # fmt: skip
    tl.debug_barrier()
    reset_rows(work, P, S, BLOCK)
    tl.debug_barrier()
    affine_rows(
        work + row("candidate_in", P, S) * BLOCK,
        meta + cells.offset("param_candidate", P, T, G, S),
        down_at + down("biases", P, S) + 2 * P, gates + 2 * P * BLOCK, number(P),
        number(WIDTH), group(P, 10), BLOCK,
    )  # fmt: skip
    tl.debug_barrier()


@triton.jit(noinline=True)
def backward_tile(
    tensor, d_tensor, adjoint, start, left, meta, down_at, work,
    P: tl.constexpr, T: tl.constexpr, G: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of the planes before the step in place of those after it, and of the gates."""
    WIDTH: tl.constexpr = 3 * S + P
    gates = work + row("gates", P, S) * BLOCK
    d_in = work + row("d_in", P, S) * BLOCK
    readouts_backward(
        adjoint, address(tensor, 0, 2, tl.float32) + start,
        address(d_tensor, 0, 2, tl.float32) + start, tl.load(tensor + 4), left, meta, down_at,
        work, P, T, G, S, BLOCK,
    )  # fmt: skip
    tl.debug_barrier()
    transposed_product(
        gates + 2 * P * BLOCK, meta + cells.offset("param_candidate", P, T, G, S), d_in,
        number(0), number(P), WIDTH, BLOCK,
    )  # fmt: skip
    tl.debug_barrier()
    reset_backward(work, P, S, BLOCK)
    tl.debug_barrier()
    transposed_product(
        gates, meta + cells.offset("param_gates", P, T, G, S), d_in, number(1), number(2 * P),
        WIDTH, BLOCK,
    )  # fmt: skip
    tl.debug_barrier()
    features_backward(
        address(tensor, 0, 1, tl.float32) + start, address(tensor, 0, 2, tl.float32) + start,
        address(d_tensor, 0, 2, tl.float32) + start, tl.load(tensor + 4), left, meta, down_at,
        work, P, T, G, S, BLOCK,
    )  # fmt: skip
    tl.debug_barrier()


@triton.jit
def add_readout(
    partial, d, of_h, h, of_x, x, x_count, bias, P: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Add the gradients of a readout: weights of h, `x_count` of rows x, and a bias."""
    add_outer(
        partial, number(1), number(of_h), number(of_x), number(bias), d, h, x, number(P),
        number(x_count), BLOCK,
    )  # fmt: skip


@triton.jit(noinline=True)
def add_gradients(
    partial, sums, work,
    P: tl.constexpr, T: tl.constexpr, G: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add a tile's gradients of the parameter level's weights, and its sums, to the program's.

    The direction has no bias: the sum goes to the number after the row's last.
    """
    WIDTH: tl.constexpr = 3 * S + P
    gates_in = work + row("gates_in", P, S) * BLOCK
    candidate_in = work + row("candidate_in", P, S) * BLOCK
    gates = work + row("gates", P, S) * BLOCK
    new_h = work + row("new_h", P, S) * BLOCK
    signals = work + row("signals", P, S) * BLOCK
    h = gates_in + 3 * S * BLOCK
    nothing = number(0)
    add_outer(
        partial, number(2 * P), number(cells.offset("param_gates", P, T, G, S)),
        nothing, number(cells.offset("param_gates_bias", P, T, G, S)),
        gates, gates_in, gates_in, number(WIDTH), nothing, BLOCK,
    )  # fmt: skip
    add_outer(
        partial, number(P), number(cells.offset("param_candidate", P, T, G, S)),
        nothing, number(cells.offset("param_candidate_bias", P, T, G, S)),
        gates + 2 * P * BLOCK, candidate_in, candidate_in, number(WIDTH), nothing, BLOCK,
    )  # fmt: skip
    add_readout(
        partial, signals, cells.offset("direction", P, T, G, S), new_h,
        cells.offset("shortcut", P, T, G, S), gates_in, S,
        cells.offset("tensor_gates", P, T, G, S), P, BLOCK,
    )  # fmt: skip
    add_readout(
        partial, signals + BLOCK, cells.offset("rate", P, T, G, S), new_h, 0, gates_in, 0,
        cells.offset("rate_bias", P, T, G, S), P, BLOCK,
    )  # fmt: skip
    add_readout(
        partial, signals + 2 * BLOCK, cells.offset("square_decay", P, T, G, S), h, 0, gates_in, 0,
        cells.offset("square_decay_bias", P, T, G, S), P, BLOCK,
    )  # fmt: skip
    add_readout(
        partial, signals + 3 * BLOCK, cells.offset("average_decay", P, T, G, S), h, 0, gates_in, 0,
        cells.offset("average_decay_bias", P, T, G, S), P, BLOCK,
    )  # fmt: skip
    add_outer(
        partial, number(2), nothing, nothing,
        number(cells.offset("rate_momentum", P, T, G, S)),
        signals + 4 * BLOCK, signals, signals, nothing, nothing, BLOCK,
    )  # fmt: skip
    add_outer(
        sums, number(3 * P + 1), nothing, nothing, nothing, gates, gates, gates,
        nothing, nothing, BLOCK,
    )  # fmt: skip
    # Rows that other threads have read are written again.
    tl.debug_barrier()
