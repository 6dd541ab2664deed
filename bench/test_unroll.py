"""The unroll gradient, with its gate; what is measured is in ``bench/unroll.py``."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from . import unroll

over_families = pytest.mark.parametrize("family", ["lstm", "rnnprop"])


@over_families
def test_unroll_gradient_is_correct(family: str, publish: Callable[..., None]) -> None:
    publish(unroll.accuracy_figures(unroll.accuracy(family), family))


@over_families
def test_unroll_gradient_against_eager_autograd(family: str, take: Callable[..., None]) -> None:
    take(*unroll.against_eager(family))


@pytest.mark.parametrize("steps", [20, 1000])
def test_memory_of_the_unroll_gradient(steps: int, publish: Callable[..., None]) -> None:
    publish(unroll.memory(steps))
