"""Sums of products on truncating tensor cores, and what their order in the CUDA kernels is for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.tensor_core import truncated_sum

DEPTH = 8


def split(x: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """As in csrc/cuda/mma.cuh, the low part as the tensor core reads it."""
    high = ((x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    low = (np.float32(x - high).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    return high.astype(np.float64), low.astype(np.float64)


def product(
    x: NDArray[np.float32], weights: NDArray[np.float32], start: NDArray[np.float32]
) -> NDArray[np.float32]:
    """start + x weights by chained products of eight inner indices, as the exact kernels split."""
    (x_high, x_low), (w_high, w_low) = split(x), split(weights)
    large, small = np.broadcast_to(start, (len(x), weights.shape[1])), np.zeros((), np.float32)

    def add(
        total: NDArray[np.float32], left: NDArray[np.float64], right: NDArray[np.float64]
    ) -> NDArray[np.float32]:
        terms = left.T[:, :, None] * right[:, None, :]
        own = np.broadcast_to(total.astype(np.float64), terms.shape[1:])
        return truncated_sum(np.concatenate((terms, own[None])))

    for first in range(0, x.shape[1], DEPTH):
        k = slice(first, first + DEPTH)
        small = add(small, x_low[:, k], w_high[k])
        small = add(small, x_high[:, k], w_low[k])
        large = add(large, x_high[:, k], w_high[k])
    return large + small


def test_terms_and_sum_are_truncated() -> None:
    one, unit = 1.0, 2.0**-23
    columns = [[one, 0.9 * unit, 0.9 * unit], [one, -0.9 * unit, 0.0], [one, one, unit]]
    results = truncated_sum(np.array(columns).T)
    assert results.tolist() == [1.0, 1.0, 2.0]
    with np.errstate(invalid="ignore"):
        special = truncated_sum(np.array([[np.inf, np.nan, np.inf], [1.0, 1.0, -np.inf]]))
    np.testing.assert_array_equal(special, [np.inf, np.nan, np.nan])


@pytest.mark.parametrize("bias_size", [0.25, 1.0, 3.0])
@pytest.mark.parametrize("input_size", [0.3, 1.0])
def test_a_bias_added_after_the_products_keeps_the_target(
    input_size: float, bias_size: float
) -> None:
    # Gates of 40 inputs. The target is twice the error of plain torch.
    generator = torch.Generator().manual_seed(5)
    x, weights, bias = (
        size * (2.0 * torch.rand(shape, generator=generator) - 1.0)
        for size, shape in ((input_size, (512, 40)), (20**-0.5, (40, 80)), (bias_size, (80,)))
    )
    exact = (x.double() @ weights.double() + bias.double()).numpy()
    plain = torch.addmm(bias, x, weights).numpy()
    zero = np.zeros(1, np.float32)
    after = product(x.numpy(), weights.numpy(), zero) + bias.numpy()
    before = product(x.numpy(), weights.numpy(), bias.numpy())
    for order in (2, np.inf):
        errors = [
            float(np.linalg.norm((result - exact).ravel(), order))
            for result in (after, before, plain)
        ]
        assert errors[0] <= 2.0 * errors[2]
        if bias_size >= 1.0:
            assert errors[1] > 2.0 * errors[2]
