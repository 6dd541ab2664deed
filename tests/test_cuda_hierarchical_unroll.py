"""The CUDA window backward of the hierarchical rule: its PTX, executed by ptxemu, against autograd.

Every launch runs with bounds, race and uninitialised-read checks on; all memory starts as NaN.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import cuda_hierarchical_unroll as unroll
from tests import cuda_step
from tests.cuda_hierarchical_unroll import Limits, Result, unroll_backward
from tests.hierarchical_cpu import TOLERANCE, make_rule, same_bits
from tests.test_hierarchical_cpu_unroll import (
    Window,
    autograd_unroll,
    make_small_direction,
    make_window,
)

pytestmark = pytest.mark.skipif(
    cuda_step.missing() is not None, reason=cuda_step.missing() or "never"
)

# Sizes of a run's tensors, steps, runs, steps before the window, a gradient after the last step.
WINDOWS = {
    "first-step": ((15, 7, 1, 0, 65), 1, 1, 0, True),
    "from-start": ((260, 33), 2, 2, 0, True),
    "later": ((5, 0, 40), 3, 3, 2, False),
}
# The kernels that take a step back.
BACKWARD = ("ahead", "tensors", "sweep", "injected")


@functools.cache
def reference(case: str) -> tuple[Window, tuple[Tensor, Tensor]]:
    """A window and its gradients in float64."""
    rule = make_rule()
    window = make_window(rule, *WINDOWS[case])
    return window, autograd_unroll(rule, window, 0.7, 0.1)


@functools.cache
def executed(case: str) -> Result:
    """The same by the kernels."""
    return unroll_backward(make_rule(), reference(case)[0])


def assert_close(result: Result, exact: tuple[Tensor, Tensor]) -> None:
    for part, target in zip(result[:2], exact, strict=True):
        assert float((part - target).norm()) <= TOLERANCE * float(target.norm())


@pytest.mark.parametrize("case", WINDOWS)
def test_a_window_agrees_with_autograd(case: str) -> None:
    assert_close(executed(case), reference(case)[1])


def test_given_gradients_of_the_updates_take_the_weights_place() -> None:
    rule, window = make_rule(), make_window(make_rule(), *WINDOWS["later"])
    generator = torch.Generator().manual_seed(7)
    window.d_updates = torch.randn(3, *window.grads.shape[1:], generator=generator)
    window.weights.fill_(torch.nan)
    assert_close(unroll_backward(rule, window), autograd_unroll(rule, window, 0.7, 0.1))


def test_special_functions_with_their_documented_errors() -> None:
    window, exact = reference("first-step")
    assert_close(unroll_backward(make_rule(), window, approx_error=1.0), exact)


def test_each_level_has_its_gradients() -> None:
    # Small ones would not show in the norm of all.
    rule = make_rule()
    result, exact = executed("from-start").d_meta, reference("from-start")[1][0]
    sizes = [parameter.numel() for parameter in rule.parameters()]
    names = [name for name, _ in rule.named_parameters()]
    for name, part, target in zip(names, result.split(sizes), exact.split(sizes), strict=True):
        assert float((part - target).norm()) <= 1e-4 * float(target.norm()), name


@pytest.mark.parametrize("seed", [3, 4])
def test_the_direction_of_a_single_coordinate_is_small(seed: int) -> None:
    # Its rms is then as small, and the gradient through both a difference of almost equal numbers,
    # divided by that rms. These rules have it make much of the meta-gradient.
    rule = make_rule(seed=seed)
    window = make_window(rule, (1, 5), 1, 1, 1, True)
    make_small_direction(rule, window, 1e-2)
    assert_close(unroll_backward(rule, window), autograd_unroll(rule, window, 0.7, 0.1))


def test_more_tensors_than_the_arguments_hold() -> None:
    rule = make_rule()
    window = make_window(rule, (3,) * 49, 1, 1, 1, True)
    result = unroll_backward(rule, window)
    assert any("problems" in name for name, _ in result.launches)
    assert_close(result, autograd_unroll(rule, window, 0.7, 0.1))


def test_warps_and_blocks_that_take_several_chunks_and_tensors() -> None:
    window, exact = reference("from-start")
    limits = {"level_rows": 1, "sweep_rows": 2}
    assert_close(unroll_backward(make_rule(), window, limits=limits), exact)


def test_segments_replayed_from_checkpoints_do_not_change_a_bit() -> None:
    window, _ = reference("later")
    whole = executed("later")
    cut = unroll_backward(make_rule(), window, limits={"record_bytes": 0})
    assert (whole.segments, cut.segments) == (1, 2)
    assert same_bits(whole[:2], cut[:2])


def test_a_step_takes_seven_launches() -> None:
    # Three to replay it and four back; the list, the start, the last gradients, two reductions.
    for case in WINDOWS:
        assert len(executed(case).launches) == 7 * reference(case)[0].steps + 5


def planned(size: int, steps: int, **limits: int) -> tuple[int, int]:
    """Bytes of the workspace and segments of one tensor's window."""
    call, _sizes = unroll.make_call(steps, steps + 1, 1, [size], 19 * size + 41)
    return unroll.describe(call, Limits.make(**limits))[:2]


def test_memory_is_a_record_of_each_step_or_of_a_segment() -> None:
    large = 2**20
    bytes_needed, segments = planned(large, 10)
    # A step: planes, raw step, and 24 sums of every 256 coordinates. Once: planes, gradient, raw
    # step and adjoint, and chunks' sums.
    record, once = 80 + 24 * 4 / 256, 76 + 12 + (24 + 32) * 4 / 256
    rows = 1056 * 768 * 4 + 7560 * 4
    assert segments == 1
    assert bytes_needed == pytest.approx(large * (10 * record + once) + rows, rel=1e-3)
    for steps, expected in ((100, 10), (101, 10)):
        found, segments = planned(large, steps)
        assert segments == expected
        assert found < large * (-(-steps // 10) * record + (expected + 1) * 80 + once) + 2 * rows


COUNTED = 256


@functools.cache
def counted(coordinates: int) -> dict[str, Any]:
    """Counts of the first step of a window of two: of each kernel the last launch but the end's."""
    rule = make_rule()
    window = make_window(rule, (coordinates,), 2, 1, 1, True)
    limits = {"sweep_rows": 2}
    result = unroll_backward(rule, window, limits=limits, architecture=90)
    return dict(result.launches[:-3])


def more(kernel: str, get: Any) -> float:
    """Of one more coordinate."""
    name = f"window_{kernel}_kernel"
    return (get(counted(2 * COUNTED)[name]) - get(counted(COUNTED)[name])) / COUNTED


def test_memory_traffic_is_the_least_possible() -> None:
    # Adjoint both ways, raw step and gradient; planes, their gradients both ways, gradient and
    # adjoint.
    for kernel, least in (("ahead", 16), ("sweep", 3 * 76 + 8)):
        assert least <= more(kernel, lambda counts: counts.dram_bytes) <= 1.05 * least
    conflicts = more("sweep", lambda counts: counts.bank_conflicts)
    assert conflicts <= 0.05 * more("sweep", lambda counts: counts.shared_wavefronts)


@pytest.mark.parametrize("architecture", cuda_step.COMPILED)
def test_kernels_fit_their_registers_without_spilling(architecture: int) -> None:
    module = unroll.module(cuda_step.COMPILED[architecture])
    resources = cuda_step.emulator().toolchain.resources(module, f"sm_{architecture}", sass=False)
    for kernel in unroll.KERNELS:
        found = next(use for name, use in resources.items() if f"window_{kernel}_kernel" in name)
        assert found.spill_stores == found.spill_loads == 0, kernel
        assert found.registers <= {"sweep": 168}.get(kernel, 128), kernel
