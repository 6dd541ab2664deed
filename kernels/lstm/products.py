"""Products over the inputs and over the coordinates that all windows' backwards are made of.

Rows are float32 arrays of BLOCK coordinates, one after the other, as in `window_layers.py`.
"""

# Triton's functions take Triton's values: annotations would be wrong for either side.
# mypy: disable-error-code="no-untyped-def,assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl

# A tile of a weight gradient, and the coordinates that one product takes.
ROWS, COLUMNS, DEPTH = tl.constexpr(16), tl.constexpr(32), tl.constexpr(16)
# Triton has TF32 for few of ROCm's devices; there products take float32 as it is.
TF32 = tl.constexpr(torch.version.hip is None)
TF32_MAX = tl.constexpr(float.fromhex("0x1.ffcp127"))


@triton.constexpr_function
def group_size(count, largest):
    """The largest divisor of `count` up to `largest`, or `largest` if that is below half of it."""
    divisor = max(n for n in range(1, largest + 1) if count % n == 0)
    return divisor if 2 * divisor > min(count, largest) else min(count, largest)


@triton.jit(noinline=True)
def transposed_product(
    gates, weights, target, add, count, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """W^T d of a (count, WIDTH) matrix and the gate gradients d: WIDTH rows, added if `add`."""
    lane = tl.arange(0, BLOCK)
    gates_at, target_at = gates + lane, target + lane
    GROUP: tl.constexpr = group_size(WIDTH, 10)
    for first in range(0, WIDTH, GROUP):
        sums = ()
        for _ in tl.static_range(GROUP):
            sums = sums + (tl.zeros((BLOCK,), tl.float32),)  # noqa: RUF005
        for row in range(count):
            d = tl.load(gates_at + row * BLOCK)
            new = ()
            for u in tl.static_range(GROUP):
                k = tl.minimum(first + u, WIDTH - 1)
                new = new + (sums[u] + d * tl.load(weights + row * WIDTH + k),)  # noqa: RUF005
            sums = new
        for u in tl.static_range(GROUP):
            valid = lane < (WIDTH - first - u) * BLOCK
            at = target_at + tl.minimum(first + u, WIDTH - 1) * BLOCK
            if add != 0:
                tl.store(at, sums[u] + tl.load(at), valid)
            else:
                tl.store(at, sums[u], valid)


@triton.jit
def split(x):
    """x as the sum of its nearest TF32 number and a rest, of which TF32 loses a bit at most.

    The first part is finite, so infinities and NaN are the rest's, and products of the parts add
    up to the product of what was split.
    """
    bounded = tl.minimum(tl.maximum(x, -TF32_MAX), TF32_MAX)
    high = ((bounded.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def add_product(total, left, right):
    """total + left @ right, on tensor cores but about as accurate as float32's multiply-adds.

    Tensor cores truncate what they add to a sum, so the parts' products, small ones first, start
    from zero, and `total` is added to them rounded to nearest. The product of the rests, below
    2^-22 of the whole, is left out.
    """
    if TF32:
        left_high, left_low = split(left)
        right_high, right_low = split(right)
        product = tl.dot(left_low, right_high, input_precision="tf32")
        product = tl.dot(left_high, right_low, product, input_precision="tf32")
        total += tl.dot(left_high, right_high, product, input_precision="tf32")
    else:
        total = tl.dot(left, right, total, input_precision="ieee")
    return total


@triton.jit(noinline=True)
def add_outer(
    partial, count, weight_x, weight_h, bias, d, x, h, x_count, h_count, BLOCK: tl.constexpr
):
    """Add d x^T, d h^T and the sums of d over coordinates to the program's partial sums.

    `d`, `x` and `h` are the addresses of `count`, `x_count` and `h_count` rows; the latter two are
    also the widths of the matrices at `partial + weight_x` and `partial + weight_h`. The sums are
    those of products with a last row of ones.
    """
    depth = tl.arange(0, DEPTH)
    ones = x_count + h_count
    for first_row in range(0, count, ROWS):
        row = first_row + tl.arange(0, ROWS)
        row_valid = row < count
        for first_column in range(0, ones + 1, COLUMNS):
            column = first_column + tl.arange(0, COLUMNS)
            of_x = column < x_count
            source = tl.where(of_x, x + column * BLOCK, h + (column - x_count) * BLOCK)
            # Rows are aligned for loads of four numbers, which does not show once they are chosen.
            source = tl.multiple_of(source, 16)
            total = tl.zeros((ROWS, COLUMNS), tl.float32)
            for start in range(0, BLOCK, DEPTH):
                left = tl.load(
                    d + row[:, None] * BLOCK + (start + depth)[None, :], row_valid[:, None], 0.0
                )
                right = tl.load(
                    source[None, :] + (start + depth)[:, None], (column < ones)[None, :], 1.0
                )
                total = add_product(total, left, right)
            of_row = tl.where(
                of_x[None, :],
                weight_x + row[:, None] * x_count + column[None, :],
                weight_h + row[:, None] * h_count + column[None, :] - x_count,
            )
            of_row = tl.where((column < ones)[None, :], of_row, bias + row[:, None])
            valid = row_valid[:, None] & (column <= ones)[None, :]
            at = partial + of_row
            tl.store(at, tl.load(at, valid, 0.0) + total, valid)
