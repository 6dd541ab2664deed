"""The CUDA step of the hierarchical rule: its PTX, executed by ptxemu, against the reference.

Every launch runs with bounds, race and uninitialised-read checks on, from a workspace of NaN.
"""

from __future__ import annotations

import ctypes
import functools
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from fastl2o import _rounding
from fastl2o.rules.hierarchical import ProblemState
from tests import common, cuda_hierarchical, cuda_step
from tests.cuda_hierarchical import SWEEPS, Result, host, step_
from tests.hierarchical_cpu import Problem, assert_stepped, make_rule, same_bits

pytestmark = pytest.mark.skipif(
    cuda_step.missing() is not None, reason=cuda_step.missing() or "never"
)

# Odd, 0-dim, empty, of one coordinate, beyond a chunk and beyond the sums of one round.
SHAPES = ((5, 3), (), (0,), (65,), (1300,), (64,), (1,))


def in_double(problem: Problem) -> list[Tensor]:
    return [grad.double() for grad in problem.grads]


@pytest.mark.parametrize("architecture", [75, 80])
@pytest.mark.parametrize("taken", [0, 2])
def test_a_step_is_the_reference_step(taken: int, architecture: int) -> None:
    rule = make_rule()
    before = Problem.make(rule, SHAPES, taken=taken)
    after = before.clone()
    result = step_(rule, after, architecture=architecture)
    assert_stepped(rule, before, after, in_double(before))
    assert len(result.launches) == 3


@pytest.mark.parametrize("approx_error", [0.0, 1.0], ids=["rounded", "documented-error"])
@pytest.mark.parametrize("taken", [0, 3])
def test_a_step_is_as_accurate_as_plain_torch(taken: int, approx_error: float) -> None:
    # The second time with random errors as large as the special functions' documented ones.
    rule = make_rule()
    before = Problem.make(rule, ((700,), (31, 3)), taken=taken)
    after = before.clone()
    step_(rule, after, approx_error=approx_error)
    plain_rule = make_rule().float()
    state = before.problem_state()
    plain_state = ProblemState(
        [plane.float() for plane in state.planes],
        [tensor.float() for tensor in state.tensors],
        state.steps,
        state.hidden.float(),
    )
    with torch.no_grad():
        updates, exact = rule.reference_step(in_double(before), state)
        plain_updates, plain = plain_rule.reference_step(before.grads, plain_state)
    for i, update in enumerate(updates):
        plain_update = plain_updates[i]
        assert update is not None
        assert plain_update is not None
        moved = before.params[i] + plain_update
        target = before.params[i].double() + update
        common.assert_as_accurate(after.params[i], moved, target, "params")
        for first, last in ((0, 10), (10, 14), (14, 18), (18, 19)):  # of different magnitudes
            parts = (planes[i][first:last] for planes in (after.planes, plain.planes, exact.planes))
            common.assert_as_accurate(*parts, f"planes {first} to {last}")
        common.assert_as_accurate(after.states[i], plain.tensors[i], exact.tensors[i], "states")
    common.assert_as_accurate(after.hidden[0], plain.hidden, exact.hidden, "hidden")


@pytest.mark.parametrize(
    ("planes", "architecture"), [(torch.float32, 80), (torch.bfloat16, 80), (torch.bfloat16, 75)]
)
def test_every_type_of_parameter_and_planes(planes: torch.dtype, architecture: int) -> None:
    rule = make_rule()
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    before = Problem.make(rule, ((70,), (33,), (64,), (3, 3)), dtypes, planes)
    after = before.clone()
    options = {"lr": [0.5] * 4, "weight_decay": [0.1] * 4}
    step_(rule, after, architecture=architecture, **options)
    assert_stepped(
        rule,
        before,
        after,
        in_double(before),
        param_tolerance=2**-8,
        planes_tolerance=2**-8 if planes == torch.bfloat16 else 1e-5,
        lr=0.5,
        weight_decay=0.1,
    )


def test_stochastic_rounding_draws_the_bits_of_the_reference() -> None:
    # An empty and a skipped tensor do not move the places of those behind them.
    rule, seed = make_rule(), -(2**62) + 12345
    before = Problem.make(rule, ((0,), (3,), (700,)), planes=torch.bfloat16)
    before.grads[1][0] = torch.nan
    after, plain = before.clone(), before.clone()
    step_(rule, after, nonfinite=1, rounding_seed=seed)
    step_(rule, plain, nonfinite=1)
    with torch.no_grad():
        grads = [before.grads[0].double(), None, before.grads[2].double()]
        _, exact = rule.reference_step(grads, before.problem_state())
    expected = _rounding.round_planes(exact.planes[2].float(), seed, 2)
    # A last bit of the float32 value decides only where the draw lies next to it.
    assert float((after.planes[2] != expected).double().mean()) <= 2e-3
    assert same_bits(after.params + after.states, plain.params + plain.states)


def test_a_float64_parameter_is_not_rounded_on_the_way() -> None:
    rule = make_rule()
    before = Problem.make(rule, [(65,)], [torch.float64])
    before.params[0] += 1e3
    after = before.clone()
    step_(rule, after)
    with torch.no_grad():
        (update,), _ = rule.reference_step(in_double(before), before.problem_state())
    assert update is not None
    moved = after.params[0] - before.params[0]
    torch.testing.assert_close(moved, update, rtol=1e-5, atol=1e-5 * float(update.abs().max()))


def test_a_tensor_that_joins_later_starts_with_its_own_first_step() -> None:
    rule = make_rule()
    before = Problem.make(rule, [(65,), (7,)])
    fresh = Problem.make(rule, [(33,)], taken=0, seed=5)
    for name in ("params", "grads", "planes", "states", "steps"):
        getattr(before, name).extend(getattr(fresh, name))
    after = before.clone()
    step_(rule, after)
    assert_stepped(rule, before, after, in_double(before))
    assert [int(step) for step in after.steps] == [3, 3, 1]


def joined(parts: list[Problem], order: list[tuple[int, int]]) -> tuple[Problem, list[int]]:
    """Tensors (part, number) of several problems as one call's lists, which share their memory."""
    names = ("params", "grads", "planes", "states", "steps")
    lists = ([getattr(parts[part], name)[i] for part, i in order] for name in names)
    return Problem(*lists, torch.cat([part.hidden for part in parts])), [part for part, _ in order]


# Tensors of problems in any order, also more than the kernels' arguments hold.
@pytest.mark.parametrize("tensors", [3, 24], ids=["table", "list"])
def test_problems_of_one_call_do_not_see_each_other(tensors: int) -> None:
    rule = make_rule()
    sizes = [(7,), (1,), (40,), (0,)]
    shapes = [sizes[i % 4] for i in range(tensors)]
    before = [Problem.make(rule, shapes, seed=seed, taken=seed) for seed in range(3)]
    after = [problem.clone() for problem in before]
    order = [(part, i) for i in range(tensors) for part in (2, 0, 1)]
    everything, problems = joined(after, order)
    lr = [0.1 * (1 + i % 3) for i in range(len(order))]
    result = step_(rule, everything, problems=problems, lr=lr)
    listed = len([shape for shape in shapes * 3 if shape != (0,)]) > host().table_size()
    assert listed == (tensors == 24)
    # Two more for the list, one for the problems.
    assert len(result.launches) == 3 + (3 if listed else 0)
    for part, problem in enumerate(before):
        after[part].hidden = everything.hidden[part : part + 1]
        for i in range(tensors):  # so that one rate serves the comparison
            own = lr[order.index((part, i))]
            moved = after[part].params[i] - problem.params[i]
            after[part].params[i] = problem.params[i] + moved / own
        assert_stepped(rule, problem, after[part], in_double(problem), param_tolerance=1e-4)


def test_a_problem_without_tensors_keeps_its_state() -> None:
    rule = make_rule()
    before = Problem.make(rule, [(7,)])
    before.hidden = torch.cat((torch.ones(1, 20), before.hidden, torch.ones(1, 20)))
    after = before.clone()
    step_(rule, after, problems=[1])
    assert same_bits([after.hidden[0], after.hidden[2]], [before.hidden[0], before.hidden[2]])
    before.hidden, after.hidden = before.hidden[1:2], after.hidden[1:2]
    assert_stepped(rule, before, after, in_double(before))


def test_maximize_and_grad_scale() -> None:
    rule = make_rule()
    before = Problem.make(rule, [(70,), (3,)], [torch.float16])
    after = before.clone()
    step_(rule, after, maximize=True, grad_scale=torch.tensor([8.0]))
    unscaled = [grad.float() / 8.0 for grad in before.grads]
    assert_stepped(
        rule, before, after, [-grad.double() for grad in unscaled], param_tolerance=2**-10
    )
    assert same_bits(after.grads, [grad.half() for grad in unscaled])


def test_found_inf_leaves_everything_alone() -> None:
    rule = make_rule()
    before = Problem.make(rule, [(70,), (3,)])
    after = before.clone()
    options = {"grad_scale": torch.tensor([2.0]), "found_inf": torch.ones(1)}
    result = step_(rule, after, nonfinite=1, **options)
    assert same_bits(after.tensors(), before.tensors())
    assert result.flags == [0, 0, 0]


@pytest.mark.parametrize("many", [False, True], ids=["table", "list"])
def test_skipped_tensors_take_no_part_in_means(many: bool) -> None:
    rule = make_rule()
    shapes = [(40,), (300,), (5,), *[(1,)] * (46 if many else 0)]
    before = Problem.make(rule, shapes)
    before.grads[1][299] = torch.inf
    after = before.clone()
    result = step_(rule, after, nonfinite=1)
    assert result.flags == [0, 1, 0, *[0] * (len(shapes) - 3), 1]
    grads: list[Tensor | None] = [*in_double(before)]
    grads[1] = None
    assert_stepped(rule, before, after, grads)
    kept = [part[1] for part in (before.params, before.grads, before.planes, before.states)]
    left = [part[1] for part in (after.params, after.grads, after.planes, after.states)]
    assert same_bits(kept, left)


def test_a_problem_of_skipped_tensors_keeps_its_state() -> None:
    rule = make_rule()
    before = Problem.make(rule, [(40,), (3,)])
    for grad in before.grads:
        grad[0] = torch.nan
    after = before.clone()
    assert step_(rule, after, nonfinite=1).flags == [1, 1, 1]
    assert same_bits(after.tensors(), before.tensors())


def test_raising_changes_nothing() -> None:
    rule = make_rule()
    before = Problem.make(rule, [(40,), (3,)])
    before.grads[1][2] = torch.nan
    after = before.clone()
    assert step_(rule, after, nonfinite=2).flags == [0, 1, 1]
    assert same_bits(after.tensors(), before.tensors())


def test_finite_gradients_pass_the_scan() -> None:
    rule = make_rule()
    before = Problem.make(rule, [(40,), (3,)])
    scanned, plain = before.clone(), before.clone()
    assert step_(rule, scanned, nonfinite=2).flags == [0, 0, 0]
    step_(rule, plain)
    assert same_bits(scanned.tensors(), plain.tensors())


def test_nan_and_infinity_go_where_the_reference_puts_them() -> None:
    rule = make_rule()
    before = Problem.make(rule, [(70,)])
    before.grads[0][:6] = torch.tensor([torch.inf, torch.nan, 3e38, -3e38, 1e-45, -0.0])
    after = before.clone()
    step_(rule, after)
    state = before.problem_state()
    parts = [[part.float() for part in many] for many in (state.planes, state.tensors)]
    single = ProblemState(*parts, state.steps, state.hidden.float())
    with torch.no_grad():
        _, plain = make_rule().float().reference_step(before.grads, single)
        _, exact = make_rule().reference_step([g.double() for g in before.grads], state)
    assert torch.equal(after.planes[0].isnan(), plain.planes[0].isnan())
    assert torch.equal(after.planes[0].isinf(), plain.planes[0].isinf())
    finite = torch.isfinite(exact.planes[0])
    assert finite.sum() >= finite.numel() - len(finite)  # infinity counts as the largest gradient
    results = [planes[0][finite] for planes in (after.planes, plain.planes, exact.planes)]
    common.assert_as_accurate(*results)


def test_grid_size_and_company_do_not_change_a_bit() -> None:
    rule = make_rule()
    before = Problem.make(rule, [(1300,), (33,)])
    one, other = before.clone(), before.clone()
    step_(rule, one, grid=1)
    step_(rule, other, grid=3)
    assert same_bits(one.tensors(), other.tensors())
    # The same problem beside another one, whose tensors make the call's go to the list.
    pair = [before.clone(), Problem.make(rule, [(1,)] * 50, seed=4)]
    everything, problems = joined(pair, [*((1, i) for i in range(50)), (0, 0), (0, 1)])
    step_(rule, everything, problems=problems)
    assert same_bits([*one.params, *one.planes], [*pair[0].params, *pair[0].planes])
    assert torch.equal(one.hidden[0], everything.hidden[0])


def planned(sizes: list[int]) -> tuple[list[int], int]:
    """Entries, chunks and whether they are listed; the workspace's bytes."""
    tensors = (cuda_hierarchical._Tensor * len(sizes))()
    for tensor, size in zip(tensors, sizes, strict=True):
        tensor.numel = size
    problem = Problem([torch.zeros(0)] * len(sizes), [], [], [], [], torch.zeros(1, 20))
    found = cuda_hierarchical.plan(make_rule(), problem, tensors, capacity=1)
    cuda_step.emulator().free_all()
    return [found.entries, found.chunks, found.listed], found.workspace_bytes


def test_tensors_are_cut_into_chunks_by_their_size_alone() -> None:
    assert planned([0, 1, 256, 257]) == ([3, 4, 0], planned([1, 256, 257])[1])
    large = ctypes.c_int64(2**33 + 1)
    assert host().chunk_of(large) == 2**21
    assert host().chunks_of(large) == 2**12 + 1
    # Of the workspace, a number for each coordinate is nearly all.
    _, bytes_needed = planned([2**33, 5])
    assert 4 * 2**33 < bytes_needed < 4.001 * 2**33
    assert planned([10] * 10_000)[0] == [10_000, 10_000, 1]


def first_fault(numel: int, grad_shift: int, planes_shift: int) -> int:
    """Where the sweep of a tensor's last chunk first leaves memory, from its pointers at 0.

    Pointers are moved back by the shifts, in numbers, so that what lies there is accessible.
    """
    rule, bases = make_rule(), torch.zeros(64)
    problem = Problem.make(rule, [(5,)])
    tensors = cuda_hierarchical.table(problem, [], [1.0], [0.0])
    tensors[0].numel = numel
    base = cuda_step.address(bases)
    tensors[0].grad, tensors[0].planes = base - 4 * grad_shift, base - 4 * planes_shift
    out = cuda_hierarchical.plan(rule, problem, tensors, workspace=torch.zeros(9999)).arguments[0]
    last = ctypes.create_string_buffer(out, len(out))
    host().keep_last_chunk(last)
    emulator = cuda_step.emulator()
    with pytest.raises(emulator.errors.MemoryFault) as fault:
        cuda_hierarchical.module().launch(SWEEPS[torch.float32], grid=1, block=32, args=[last.raw])
    emulator.free_all()
    found = re.search(r"at address 0x([0-9a-f]+)", str(fault.value))
    assert found is not None
    return int(found[1], 16) - base


def test_tensors_beyond_32_bits_are_addressed() -> None:
    # There is no memory for one: the addresses of the last chunk's first coordinate are looked at.
    first, numel = 2**33, 2**33 + 5
    planes = [4 * (plane * numel + first) for plane in range(19)]
    assert first_fault(numel, 0, 0) in (4 * first, *planes)
    assert first_fault(numel, first, 0) in planes
    assert first_fault(numel, first, first) in [4 * plane * numel for plane in range(1, 19)]


COUNTED = 1024


@functools.cache
def counted(planes: torch.dtype) -> tuple[Result, Result]:
    """Counts of steps of 1,024 and 2,048 coordinates: the difference is free of the set-up."""
    rule = make_rule()
    small, large = (
        step_(rule, Problem.make(rule, [(COUNTED * n,)], planes=planes), grid=1, architecture=90)
        for n in (1, 2)
    )
    return small, large


def more(planes: torch.dtype, get: Any) -> float:
    """Of one more coordinate, over all three passes."""
    small, large = counted(planes)
    return (
        sum(get(b) - get(a) for (_, a), (_, b) in zip(small.launches, large.launches, strict=True))
        / COUNTED
    )


@pytest.mark.parametrize("planes", [torch.float32, torch.bfloat16], ids=str)
def test_memory_traffic_is_the_least_possible(planes: torch.dtype) -> None:
    least = 2 * 19 * planes.itemsize + 20  # planes, gradient, raw step twice, parameter twice
    assert least <= more(planes, lambda counts: counts.dram_bytes) <= 1.05 * least

    def sectors(counts: Any) -> float:
        return sum(counts.space.get(f"{way}_global", {}).get("sectors", 0) for way in ("ld", "st"))

    assert 32 * more(planes, sectors) <= 1.02 * 1.05 * least
    assert more(planes, lambda counts: counts.bank_conflicts) <= 0.05 * more(
        planes, lambda counts: counts.shared_wavefronts
    )


def test_predicted_bound_of_an_h100_is_memory() -> None:
    predict = cuda_step.emulator().roofline.predict
    units = predict(counted(torch.float32)[0].launches[0][1], "H100-SXM")["times"]
    times = {
        unit: more(
            torch.float32, lambda counts, unit=unit: predict(counts, "H100-SXM")["times"][unit]
        )
        for unit in units
    }
    assert max(times.values()) <= 1.05 * 172 / 3.35e12, times


@pytest.mark.parametrize("architecture", cuda_step.COMPILED)
def test_kernels_fit_their_registers_without_spilling(architecture: int) -> None:
    module = cuda_hierarchical.module(architecture)  # the kernels differ from 9.0 on
    resources = cuda_step.emulator().toolchain.resources(module, f"sm_{architecture}", sass=False)
    sweep = 65_536 // (cuda_hierarchical.SWEEP_THREADS * (4 if architecture < 90 else 3))
    for part in cuda_hierarchical.KERNELS:
        found = next(use for name, use in resources.items() if part in name)
        assert found.spill_stores == found.spill_loads == 0, part
        assert found.registers <= (sweep if "sweep" in part else 64), part
