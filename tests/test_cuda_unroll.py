"""The CUDA window backward: its compiled PTX, executed and checked by ptxemu, against autograd.

Every launch runs with bounds, race and uninitialised-read checks on, into NaN-filled outputs.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastl2o.rules import Rule
from tests import common, cuda_step

pytestmark = pytest.mark.skipif(
    cuda_step.missing() is not None, reason=cuda_step.missing() or "never"
)

CASES = tuple(
    case
    for case in common.RULE_CASES
    if case.name in ("lstm-20x2", "lstm-20x2-identity", "lstm-20x2-deepmind", "rnnprop-20x2")
)
FAMILIES = (CASES[0], CASES[-1])
over_cases = pytest.mark.parametrize("case", CASES, ids=str)
over_families = pytest.mark.parametrize("case", FAMILIES, ids=str)


@functools.cache
def module() -> Any:
    """The kernels of the window backward."""
    return cuda_step.compile_kernels("unroll.cu")


@functools.cache
def host() -> ctypes.CDLL:
    """The host's planning of a window."""
    loaded = cuda_step.compile_host("cuda_unroll_plan.cpp")
    loaded.window_partials.restype = loaded.replay_floats.restype = ctypes.c_int64
    return loaded


class Result(NamedTuple):
    """What the two launches wrote, and the counts of the first."""

    d_meta: Tensor  # (M,)
    d_state: Tensor  # (S, R, D)
    d_grads: Tensor | None  # (T, R, D)
    counts: Any


def unroll_backward(
    rule: Rule,
    window: common.Window,
    *,
    lr: float = 1.0,
    weight_decay: float = 0.0,
    d_update: Tensor | None = None,
    d_last_state: Tensor | None = None,
    want_d_grads: bool = False,
) -> Result:
    """Both launches as `fastl2o::cuda::unroll_backward` makes them."""
    rnnprop = rule.family == "rnnprop"
    rows, runs, dim = window.grads.shape
    meta = rule.flat_parameters().detach().float().contiguous()
    partials = host().window_partials(ctypes.c_int64(runs), ctypes.c_int64(dim))
    replayed = host().replay_floats(int(rnnprop), ctypes.c_int64(window.steps))
    scratch = torch.full((partials * (replayed + meta.numel()),), torch.nan)
    d_meta, d_state = torch.full_like(meta, torch.nan), torch.full_like(window.state, torch.nan)
    d_grads = torch.full_like(window.grads[: window.steps], torch.nan) if want_d_grads else None
    weights = window.loss_weights if d_update is None else None
    pointers = (
        *(meta, window.grads, window.state, weights, d_update, d_last_state),
        *(d_meta, d_state, d_grads, scratch),
    )
    arguments = ctypes.create_string_buffer(host().window_args_bytes())
    host().plan_window(
        *cuda_step.rule_arguments(rule),
        (ctypes.c_int64 * 4)(window.steps, rows, runs, dim),
        ctypes.c_double(window.step),
        ctypes.c_double(lr),
        ctypes.c_double(weight_decay),
        (ctypes.c_uint64 * len(pointers))(*map(cuda_step.address, pointers)),
        arguments,
    )
    counts = None
    if partials:
        counts = module().launch(
            f"window_kernelILb{int(rnnprop)}E",
            grid=partials,
            block=host().window_threads(),
            args=[arguments.raw],
            smem=host().window_shared_bytes(int(rnnprop)),
        )
    first = scratch[partials * replayed :] if partials else None
    count = meta.numel()
    module().launch(
        "reduce_kernel", grid=-(-count // 128), block=128, args=[first, partials, count, d_meta]
    )
    cuda_step.emulator().free_all()
    return Result(d_meta, d_state, d_grads, counts)


@functools.cache
def judged(name: str, last: bool, sizes: tuple[int, int, int], kind: str) -> list[Any]:
    """Kernel, plain torch and float64 on one window."""
    case = next(case for case in CASES if case.name == name)
    steps, runs, dim = sizes
    rule = case.make()
    window = common.random_window(rule, steps=steps, runs=runs, dim=dim, last=last, kind=kind)
    scales = {"lr": 0.7, "weight_decay": 0.1}
    return [
        unroll_backward(rule, window, **scales),
        common.autograd_unroll(rule, window, **scales),
        common.autograd_unroll(case.make(torch.float64), window.to(torch.float64), **scales),
    ]


@over_cases
@pytest.mark.parametrize(
    ("last", "sizes", "kind"),
    [(True, (3, 3, 19), "normal"), (False, (1, 1, 5), "normal")],
    ids=["with-last", "one-step"],
)
def test_exact_is_as_accurate_as_plain_torch(
    case: common.RuleCase, last: bool, sizes: tuple[int, int, int], kind: str
) -> None:
    result, plain, exact = judged(case.name, last, sizes, kind)
    for what, index in (("d_meta", 0), ("d_state", 1)):
        common.assert_as_accurate(result[index], plain[index], exact[index], what, norm=True)


@over_families
def test_sixteen_decades_of_gradients(case: common.RuleCase) -> None:
    # As on the CPU: one coordinate-step outweighs all others, so a stated bound judges.
    result, _, exact = judged(case.name, True, (3, 2, 32), "wide")
    for part, target in zip(result[:2], exact, strict=True):
        assert float((part - target).norm()) <= 1e-5 * float(target.norm())


@over_cases
def test_one_step_with_given_gradients_is_the_functional_backward(case: common.RuleCase) -> None:
    rule, exact_rule = case.make(), case.make(torch.float64)
    generator = torch.Generator().manual_seed(7)
    window = common.random_window(rule, steps=1, runs=1, dim=33, last=False)
    d_update = torch.randn((1, 1, 33), generator=generator)
    d_last = torch.randn(window.state.shape, generator=generator)
    result = unroll_backward(
        rule, window, d_update=d_update, d_last_state=d_last, want_d_grads=True
    )
    references = []
    for each in (rule, exact_rule):
        dtype = each.flat_parameters().dtype
        parts = (d_update[0], d_last, window.grads[0], window.state)
        with torch.no_grad():
            meta = each.flat_parameters().detach()
            references.append(
                each.reference_backward(*(part.to(dtype) for part in parts), window.step, meta)
            )
    plain, exact = references
    assert result.d_grads is not None
    kernel = (result.d_grads[0], result.d_state, result.d_meta)
    for index, what in enumerate(("d_grad", "d_state", "d_meta")):
        common.assert_as_accurate(kernel[index], plain[index], exact[index], what, norm=True)


@over_families
def test_a_nan_gradient_stays_nan(case: common.RuleCase) -> None:
    rule = case.make()
    window = common.random_window(rule, steps=2, runs=1, dim=4)
    window.grads[0, 0, 2] = torch.nan
    d_meta, d_state = unroll_backward(rule, window)[:2]
    expected = common.autograd_unroll(rule, window)
    assert torch.equal(d_meta.isnan(), expected[0].isnan())
    assert torch.equal(d_state.isnan(), expected[1].isnan())


def test_an_empty_window_gives_zeros() -> None:
    rule = FAMILIES[0].make()
    result = unroll_backward(rule, common.random_window(rule, steps=2, runs=0, dim=3))
    assert torch.equal(result.d_meta, torch.zeros_like(result.d_meta))


def test_the_number_of_partials_depends_on_the_problem_only() -> None:
    for dim, expected in ((0, 0), (1, 1), (32, 1), (33, 2), (32 * 264, 264), (10**9, 264)):
        runs = ctypes.c_int64(1)
        assert host().window_partials(runs, ctypes.c_int64(dim)) == expected


@over_families
def test_a_step_moves_the_state_once_each_way(case: common.RuleCase) -> None:
    # Two windows of the same tile apart by one step: what is fixed cancels.
    rule = case.make()
    counts = []
    for steps in (2, 3):
        window = common.random_window(rule, steps=steps, runs=1, dim=32)
        counts.append(unroll_backward(rule, window).counts)
    moved = [count.unique_read_bytes + count.unique_write_bytes for count in counts]
    # Its gradient and loss weight are read beside.
    assert (moved[1] - moved[0]) / 32 <= 660 + 4 + 2


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_kernels_fit_their_registers_without_spilling(architecture: str) -> None:
    resources = cuda_step.emulator().toolchain.resources(module(), architecture)
    for name in ("window_kernelILb0E", "window_kernelILb1E", "reduce_kernel"):
        found = next(use for mangled, use in resources.items() if name in mangled)
        assert found.spill_stores == found.spill_loads == 0, name
        assert found.registers <= (168 if "window" in name else 32), name
