"""What the parameter level of the hierarchical rule's step computes, and its weights in its order.

Weights lie in a program's scratch in the order of their use and aligned, so that two come with a
load; a thread holds several coordinates, each of which they serve.
"""

# Triton's functions take Triton's values: annotations would be wrong for either side.
# mypy: disable-error-code="no-untyped-def,assignment"

from __future__ import annotations

import triton
import triton.language as tl

from ..lstm.cells import sigmoid
from . import cells

LANES = tl.constexpr(128)  # threads of a program, for `StepConfig.warps` of 32


@triton.jit
def features(
    grad, averages, squares, centred, beta, beta_l, S: tl.constexpr,
):  # fmt: skip
    """New averages and squares, the scaled averages m and the 3 S inputs, as tuples."""
    scaled, logs, new_averages, new_squares = (), (), (), ()
    grad = cells.bounded_gradient(grad)
    total = tl.zeros_like(grad)
    for s in tl.static_range(S):
        average = grad + beta * (averages[s] - grad)
        square = average * average + 1e-12
        square = square + beta_l * (squares[s] - square)
        new_averages = new_averages + (average,)  # noqa: RUF005
        new_squares = new_squares + (square,)  # noqa: RUF005
        divisor = square + 1e-16
        scaled = scaled + (cells.asinh(average * tl.rsqrt(divisor)),)  # noqa: RUF005
        logarithm = tl.log(divisor)
        logs = logs + (logarithm,)  # noqa: RUF005
        total += logarithm
        if s + 1 < S:
            beta = tl.sqrt_rn(beta)
    mean = total * (1.0 / S)
    inputs = scaled
    for s in tl.static_range(S - 1):
        inputs = inputs + (scaled[s] * scaled[s + 1],)  # noqa: RUF005
    for s in tl.static_range(S):
        inputs = inputs + (logs[s] - mean,)  # noqa: RUF005
    return new_averages, new_squares, scaled, inputs + (centred,)  # noqa: RUF005


@triton.constexpr_function
def lanes_of(block):
    """How many numbers hold the sums of a tile of `block` coordinates: one a thread, if it can."""
    return min(block, 128)


@triton.constexpr_function
def packed(name, P, S):
    """Where a part of the packed weights starts, or a length of them: even numbers.

    Rows of 3 P gates come first, those of r, u and c, each of its weights of [x, h], its bias and,
    of u and c, what its unit counts for in the direction and in the log rate. "readouts" are the
    meta-parameters from "direction" to "log_rate_offset", in their order.
    """
    row = -(-(P + 3 * S + 2) // 2) * 2
    readouts = -(-(4 * P + S + 5) // 2) * 2
    return {"row": row, "readouts": 3 * P * row, "all": 3 * P * row + readouts}[name]


@triton.jit
def pack(meta, out, P: tl.constexpr, T: tl.constexpr, G: tl.constexpr, S: tl.constexpr):
    """The parameter level's weights to `out`, but for the biases of the gates."""
    WIDTH: tl.constexpr = P + 3 * S
    ROW: tl.constexpr = packed("row", P, S)
    for start in range(0, 3 * P * ROW, LANES):
        index = start + tl.arange(0, LANES)
        row, column = index // ROW, index % ROW
        of_c = row >= 2 * P
        source = tl.where(
            of_c,
            cells.offset("param_candidate", P, T, G, S) + (row - 2 * P) * WIDTH,
            cells.offset("param_gates", P, T, G, S) + row * WIDTH,
        )
        readout = tl.where(
            of_c,
            cells.offset("rate", P, T, G, S) + row - 2 * P,
            cells.offset("direction", P, T, G, S) + row - P,
        )
        source = tl.where(column < WIDTH, source + column, readout)
        taken = (column < WIDTH) | ((column == WIDTH + 1) & (row >= P))
        taken = taken & (row < 3 * P)
        tl.store(out + index, tl.load(meta + source, taken, 0.0), taken)
    for start in range(0, 4 * P + S + 5, LANES):
        index = start + tl.arange(0, LANES)
        taken = index < 4 * P + S + 5
        value = tl.load(meta + cells.offset("direction", P, T, G, S) + index, taken, 0.0)
        tl.store(out + packed("readouts", P, S) + index, value, taken)


@triton.jit
def pair(at):
    """Two numbers from an aligned address, by one load."""
    bits = tl.load(at.to(tl.pointer_type(tl.int64), bitcast=True))
    high = (bits >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return bits.to(tl.int32).to(tl.float32, bitcast=True), high


@triton.jit
def gate(at, values, SIZE: tl.constexpr):
    """A row of SIZE weights times `values`, plus its bias, and the number after that."""
    total = tl.zeros_like(values[0])
    last = 0.0
    for start in tl.static_range(0, SIZE + 2, 2):
        weights = pair(at + start)
        for k in tl.static_range(2):
            if start + k < SIZE:
                total += values[start + k] * weights[k]
            elif start + k == SIZE:
                total += weights[k]
            elif start + k == SIZE + 1:
                last = weights[k]
    return total, last


@triton.jit
def readout(at, FIRST: tl.constexpr, values, SIZE: tl.constexpr):
    """The sum of `values`, each times a number from at + FIRST on."""
    total = tl.zeros_like(values[0])
    for k in tl.static_range(SIZE):
        total += values[k] * tl.load(at + FIRST + k)
    return total


@triton.jit
def decay(at, FIRST: tl.constexpr, h, taken, P: tl.constexpr):
    """sigmoid(weights . [h, 1]); 0 in a tensor's first step."""
    logit = readout(at, FIRST, h, P) + tl.load(at + FIRST + P)
    return tl.where(taken == 0.0, 0.0, sigmoid(logit))
