"""TF32 products as tensor cores round them, in place of the emulator's, which rounds once.

Tensor cores do not round to nearest: they align the products and the accumulator to the largest
exponent among them and drop what lies below float32's last bit (measured by Fasi et al., "Numerical
behavior of NVIDIA tensor cores", PeerJ Computer Science 2021). Devices that keep a bit or two more
are closer to the exact sum.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

SIGNIFICANT_BITS = 24


def truncated_sum(terms: NDArray[np.float64]) -> NDArray[np.float32]:
    """The sum over the first axis in float32, every term and the result rounded towards zero.

    Args:
        terms: exact products and accumulator, any shape.
    """
    plain = terms.sum(0)
    exponent = np.frexp(np.abs(terms).max(0))[1]
    unit = np.ldexp(1.0, np.where(np.isfinite(plain), exponent, 0) - SIGNIFICANT_BITS)
    total = np.where(np.isfinite(plain), np.trunc(terms / unit).sum(0) * unit, plain)
    nearest = total.astype(np.float32)
    beyond = np.isfinite(plain) & (np.abs(nearest.astype(np.float64)) > np.abs(total))
    return np.where(beyond, np.nextafter(nearest, np.float32(0.0)), nearest)


def install() -> None:
    """Let ptxemu, which must be importable, execute TF32 products this way from now on."""
    mma = importlib.import_module("ptxemu.mma")
    exact = mma.HANDLERS["mma"]

    def handler(context: Any, instruction: Any) -> Callable[[], None]:
        shapes = [k for k in (4, 8) if f"m16n8k{k}" in instruction.mods]
        if "tf32" not in instruction.mods or not shapes:
            return exact(context, instruction)
        (depth,) = shapes
        left, right, addend = (
            [context.rd(operand, kind) for operand in mma.vec_items(instruction.ops[index])]
            for index, kind in ((1, "b32"), (2, "b32"), (3, "f32"))
        )
        results = [context.wr(operand, "f32") for operand in mma.vec_items(instruction.ops[0])]
        lanes, warps = context.N, context.NW
        places = (mma.a_layout(depth, 32), mma.b_layout(depth, 32), mma.c_layout())
        (a_row, a_column), (b_row, b_column), (c_row, c_column) = places

        def run() -> None:
            mma.full_warps(context, instruction)
            a, b = np.zeros((warps, 16, depth)), np.zeros((warps, depth, 8))
            a[:, a_row, a_column] = mma.decode([np.broadcast_to(x, (lanes,)) for x in left], "tf32")
            b[:, b_row, b_column] = mma.decode(
                [np.broadcast_to(x, (lanes,)) for x in right], "tf32"
            )
            terms = np.empty((depth + 1, warps, 16, 8))
            with np.errstate(invalid="ignore", over="ignore"):
                for k in range(depth):
                    np.multiply(a[:, :, k, None], b[:, None, k], out=terms[k])
                own = np.stack([np.broadcast_to(x, (lanes,)) for x in addend], 1)
                terms[depth][:, c_row, c_column] = own.reshape(warps, 32, 4)
                total = truncated_sum(terms)[:, c_row, c_column].reshape(lanes, 4)
            for index, result in enumerate(results):
                mma._mask_put(context, result, np.ascontiguousarray(total[:, index]))

        return run

    mma.HANDLERS["mma"] = handler
