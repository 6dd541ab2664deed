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

import fastl2o
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


TILE = 64  # coordinates that a group of warps takes at a time
# Bytes of shared memory that a block may have, by compute capability; 8.6 and 8.9 run code for 8.0.
SHARED_MEMORY = {
    75: (64 * 1024,),
    80: (163 * 1024, 99 * 1024),
    90: (227 * 1024,),
    100: (227 * 1024,),
    120: (99 * 1024,),
}


@functools.cache
def module(architecture: int = 80) -> Any:
    """The kernels of the window backward."""
    return cuda_step.compile_kernels("unroll.cu", architecture)


@functools.cache
def host() -> ctypes.CDLL:
    """The host's planning of a window."""
    loaded = cuda_step.compile_host("cuda_unroll_plan.cpp")
    for function in (loaded.window_partials, loaded.replay_floats, loaded.scratch_floats):
        function.restype = ctypes.c_int64
    return loaded


class Result(NamedTuple):
    """What the two launches wrote, and the counts of the first."""

    d_meta: Tensor  # (M,)
    d_state: Tensor  # (S, R, D)
    d_grads: Tensor | None  # (T, R, D)
    counts: Any


class Device(NamedTuple):
    """What the host looks at."""

    architecture: int = 80  # ten times the compute capability
    shared_bytes: int = 163 * 1024  # a block may have at most


DEVICE = Device()


class Launch(NamedTuple):
    """How the host launches the first kernel."""

    name: str  # a part of the mangled name that no other kernel has
    groups: int  # of a block, each with a partial sum
    threads: int
    shared_bytes: int


def planned(rule: Rule, device: Device, precision: str = "exact") -> Launch:
    """The launch for a device."""
    rnnprop, exact = int(rule.family == "rnnprop"), int(precision == "exact")
    if device.architecture < 80:
        smem = host().window_shared_bytes(rnnprop, device.architecture // 10)
        return Launch(f"13window_kernelILb{rnnprop}E", 1, host().window_threads(), smem)
    out = (ctypes.c_int * 4)()
    host().tensor_launch(rnnprop, exact, device.shared_bytes, out)
    name = f"tensor_window_kernelILb{rnnprop}ELb{exact}ELNS0_5AsideE{out[0]}E"
    return Launch(name, out[1], out[2], out[3])


def unroll_backward(
    rule: Rule,
    window: common.Window,
    *,
    lr: float = 1.0,
    weight_decay: float = 0.0,
    d_update: Tensor | None = None,
    d_last_state: Tensor | None = None,
    want_d_grads: bool = False,
    precision: str = "exact",
    device: Device = DEVICE,
    most_partials: int = 264,
) -> Result:
    """Both launches as `fastl2o::cuda::unroll_backward` makes them; fewer partials on request."""
    rnnprop = rule.family == "rnnprop"
    rows, runs, dim = window.grads.shape
    meta = rule.flat_parameters().detach().float().contiguous()
    major = device.architecture // 10
    partials = host().window_partials(ctypes.c_int64(runs), ctypes.c_int64(dim), major)
    partials = min(partials, most_partials)
    replayed = host().replay_floats(int(rnnprop), ctypes.c_int64(window.steps), major)
    sizes = (ctypes.c_int64 * 4)(window.steps, rows, runs, dim)
    rule_arguments = cuda_step.rule_arguments(rule)
    floats = host().scratch_floats(*rule_arguments, sizes, major, device.shared_bytes)
    scratch = torch.full((floats,), torch.nan)
    d_meta, d_state = torch.full_like(meta, torch.nan), torch.full_like(window.state, torch.nan)
    d_grads = torch.full_like(window.grads[: window.steps], torch.nan) if want_d_grads else None
    weights = window.loss_weights if d_update is None else None
    pointers = (
        *(meta, window.grads, window.state, weights, d_update, d_last_state),
        *(d_meta, d_state, d_grads, scratch),
    )
    arguments = ctypes.create_string_buffer(host().window_args_bytes())
    host().plan_window(
        *rule_arguments,
        sizes,
        ctypes.c_double(window.step),
        ctypes.c_double(lr),
        ctypes.c_double(weight_decay),
        major,
        ctypes.c_int64(partials),
        (ctypes.c_uint64 * len(pointers))(*map(cuda_step.address, pointers)),
        arguments,
    )
    kernels = module(device.architecture)
    counts = None
    if partials:
        launch = planned(rule, device, precision)
        counts = kernels.launch(
            launch.name,
            grid=-(-partials // launch.groups),
            block=launch.threads,
            args=[arguments.raw],
            smem=launch.shared_bytes,
        )
    first = scratch[partials * replayed :] if partials else None
    count = meta.numel()
    kernels.launch(
        "reduce_kernel", grid=-(-count // 128), block=128, args=[first, partials, count, d_meta]
    )
    cuda_step.emulator().free_all()
    return Result(d_meta, d_state, d_grads, counts)


@functools.cache
def judged(
    name: str, last: bool, sizes: tuple[int, int, int], kind: str, device: Device = DEVICE
) -> list[Any]:
    """Kernel, plain torch and float64 on one window."""
    case = next(case for case in CASES if case.name == name)
    steps, runs, dim = sizes
    rule = case.make()
    window = common.random_window(rule, steps=steps, runs=runs, dim=dim, last=last, kind=kind)
    scales = {"lr": 0.7, "weight_decay": 0.1}
    return [
        unroll_backward(rule, window, lr=0.7, weight_decay=0.1, device=device),
        common.autograd_unroll(rule, window, **scales),
        common.autograd_unroll(case.make(torch.float64), window.to(torch.float64), **scales),
    ]


@over_cases
@pytest.mark.parametrize(
    ("last", "sizes"),
    [(True, (3, 3, 19)), (False, (1, 1, 5))],
    ids=["with-last", "one-step"],
)
def test_exact_is_as_accurate_as_plain_torch(
    case: common.RuleCase, last: bool, sizes: tuple[int, int, int]
) -> None:
    result, plain, exact = judged(case.name, last, sizes, "normal")
    for what, index in (("d_meta", 0), ("d_state", 1)):
        common.assert_as_accurate(result[index], plain[index], exact[index], what, norm=True)


@over_families
def test_twenty_steps(case: common.RuleCase) -> None:
    result, plain, exact = judged(case.name, True, (20, 1, 13), "normal")
    for what, index in (("d_meta", 0), ("d_state", 1)):
        common.assert_as_accurate(result[index], plain[index], exact[index], what, norm=True)


@over_families
def test_without_tensor_cores(case: common.RuleCase) -> None:
    plain_device = Device(75, 64 * 1024)
    assert planned(case.make(), plain_device).shared_bytes <= plain_device.shared_bytes
    result, plain, exact = judged(case.name, True, (3, 3, 19), "normal", plain_device)
    for what, index in (("d_meta", 0), ("d_state", 1)):
        common.assert_as_accurate(result[index], plain[index], exact[index], what, norm=True)


@over_families
def test_fast_stays_within_its_bound(case: common.RuleCase) -> None:
    rule = case.make()
    window = common.random_window(rule, steps=3, runs=1, dim=37)
    result = unroll_backward(rule, window, precision="fast")
    exact = common.autograd_unroll(case.make(torch.float64), window.to(torch.float64))
    for part, target in zip(result[:2], exact, strict=True):
        assert float((part - target).norm()) <= 1e-3 * float(target.norm())


@over_families
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_bits_do_not_depend_on_shared_memory(case: common.RuleCase, precision: str) -> None:
    # Three tiles by two groups: of one block, or of one each with less memory.
    rule = case.make()
    window = common.random_window(rule, steps=2, runs=3, dim=43)
    results: dict[Launch, Result] = {}
    for memory in (163 * 1024, 120 * 1024, 99 * 1024):
        device = Device(80, memory)
        launch = planned(rule, device, precision)
        assert launch.shared_bytes <= memory
        if launch not in results:
            results[launch] = unroll_backward(
                rule, window, precision=precision, device=device, most_partials=2
            )
    first, *others = results.values()
    assert others or precision == "fast"
    for other in others:
        assert torch.equal(first.d_meta, other.d_meta)
        assert torch.equal(first.d_state, other.d_state)
    bound = 1e-5 if precision == "exact" else 1e-3
    for part, target in zip(first[:2], common.autograd_unroll(rule, window), strict=True):
        assert float((part - target).norm()) <= bound * float(target.norm())


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
    # The target without the roundoffs beside it: RNNprop's v adds up what nearly cancels.
    errors = [float((part[1] - exact[1]).norm()) for part in (kernel, plain)]
    assert errors[0] <= 2.0 * errors[1]


@over_families
def test_a_window_before_another_takes_the_gradient_of_its_last_state(
    case: common.RuleCase,
) -> None:
    rule, exact_rule = case.make(), case.make(torch.float64)
    window = common.random_window(rule, steps=3, runs=2, dim=20)
    d_last = torch.randn(window.state.shape, generator=torch.Generator().manual_seed(7))
    result = unroll_backward(rule, window, lr=0.7, weight_decay=0.1, d_last_state=d_last)
    references = []
    for each in (rule, exact_rule):
        dtype = each.flat_parameters().dtype
        wide = window.to(dtype)
        with fastl2o.backend("reference"):
            references.append(
                fastl2o.ops.unroll_backward(
                    each,
                    wide.grads,
                    wide.state,
                    wide.loss_weights,
                    steps=3,
                    step=window.step,
                    lr=0.7,
                    weight_decay=0.1,
                    d_last_state=d_last.to(dtype),
                )
            )
    for index, what in enumerate(("d_meta", "d_state")):
        plain, exact = (reference[index] for reference in references)
        common.assert_as_accurate(result[index], plain, exact, what, norm=True)


@over_families
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3.4028e38])
def test_a_gradient_at_or_beyond_the_end_of_the_range(case: common.RuleCase, value: float) -> None:
    rule = case.make()
    window = common.random_window(rule, steps=2, runs=1, dim=4)
    window.grads[0, 0, 2] = value
    results = unroll_backward(rule, window)[:2]
    references = common.autograd_unroll(rule, window)
    assert any(bool(expected.isfinite().any()) for expected in references)
    for result, expected in zip(results, references, strict=True):
        assert torch.equal(result.isnan(), expected.isnan())
        finite = expected.isfinite()
        torch.testing.assert_close(result[finite], expected[finite], rtol=1e-4, atol=1e-5)


def test_an_empty_window_gives_zeros() -> None:
    rule = FAMILIES[0].make()
    result = unroll_backward(rule, common.random_window(rule, steps=2, runs=0, dim=3))
    assert torch.equal(result.d_meta, torch.zeros_like(result.d_meta))


def test_the_number_of_partials_depends_on_the_problem_only() -> None:
    for dim, expected in ((0, 0), (1, 1), (64, 1), (65, 2), (64 * 264, 264), (10**9, 264)):
        runs = ctypes.c_int64(1)
        assert host().window_partials(runs, ctypes.c_int64(dim), 8) == expected


@over_families
def test_a_step_moves_the_state_once_each_way(case: common.RuleCase) -> None:
    # Two windows of the same tile apart by one step: what is fixed cancels.
    rule = case.make()
    counts = []
    for steps in (2, 3):
        window = common.random_window(rule, steps=steps, runs=1, dim=TILE)
        counts.append(unroll_backward(rule, window).counts)
    moved = [count.unique_read_bytes + count.unique_write_bytes for count in counts]
    # Its gradient and loss weight are read beside.
    assert (moved[1] - moved[0]) / TILE <= 660 + 4 + 2
    assert counts[1].bank_conflicts <= 0.05 * counts[1].shared_wavefronts


@pytest.mark.parametrize("architecture", cuda_step.COMPILED)
def test_kernels_fit_their_registers_without_spilling(architecture: int) -> None:
    resources = cuda_step.emulator().toolchain.resources(
        module(cuda_step.COMPILED[architecture]), f"sm_{architecture}", sass=False
    )
    names = {"reduce_kernel"}
    for memory in SHARED_MEMORY[architecture]:
        for case in FAMILIES:
            for precision in ("exact", "fast"):
                launch = planned(case.make(), Device(architecture, memory), precision)
                assert launch.shared_bytes <= memory
                names.add(launch.name)
    for name in names:
        found = next(use for mangled, use in resources.items() if name in mangled)
        assert found.spill_stores == found.spill_loads == 0, name
        assert found.registers <= (255 if "window" in name else 40), name
