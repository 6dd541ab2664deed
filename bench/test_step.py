"""The optimizer step, with its gates; what is measured is in ``bench/step.py``."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from . import step

over_families = pytest.mark.parametrize("family", ["lstm", "rnnprop"])


@over_families
def test_step_and_baseline_are_correct(family: str) -> None:
    step.gate(family)


@over_families
def test_step_against_baselines(family: str, take: Callable[..., None]) -> None:
    take(*step.against_baselines(family))


def test_step_is_linear_in_coordinates(take: Callable[..., None]) -> None:
    take(*step.linearity())
