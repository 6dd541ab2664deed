"""The op that finds the first gradient with NaN or Inf."""

from __future__ import annotations

import pytest
import torch

from fastl2o._ops_nonfinite import scratch
from fastl2o.ops import first_nonfinite
from tests.optimizers import DTYPES

POISONS = (torch.nan, torch.inf, -torch.inf)


@pytest.mark.parametrize("poison", POISONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_first_of_several_is_found_wherever_it_is(dtype: torch.dtype, poison: float) -> None:
    found = scratch()
    sizes = (0, 3, 70_000, 1, 0, 131_073)  # over and under the kernel's chunk of 65,536
    grads = [torch.full((n,), torch.finfo(dtype).max, dtype=dtype) for n in sizes]
    assert first_nonfinite(grads, found) is None  # the largest number is finite, so is their count
    for where in (5, 3, 2, 1):  # later ones stay poisoned
        grads[where][-1] = poison
        assert first_nonfinite(grads, found) == where
        assert first_nonfinite(grads[where + 1 :], found) == (
            next(i for i in (2, 3, 5) if i > where) - where - 1 if where < 5 else None
        )


@pytest.mark.parametrize("poison", POISONS, ids=str)
def test_mixed_dtypes_and_strided_gradients_are_searched_too(poison: float) -> None:
    found = scratch()
    wide = torch.zeros(4, 6)
    grads = [torch.zeros(3, dtype=torch.bfloat16), wide[:, ::2], torch.zeros(2, 2).double()]
    wide[:, 1] = poison  # between the elements of the strided gradient
    assert first_nonfinite(grads, found) is None
    wide[3, 4] = poison
    assert first_nonfinite(grads, found) == 1
    grads[0][0] = poison
    assert first_nonfinite(grads, found) == 0


def test_no_gradients_hold_nothing() -> None:
    assert first_nonfinite([], scratch()) is None
    assert first_nonfinite([torch.zeros(0)], scratch()) is None
