"""The CUDA step: its compiled PTX, executed and checked by ptxemu, against the reference.

Every launch runs with bounds, race and uninitialised-read checks on.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from fastl2o import _ops_reference
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
KERNELS = tuple(
    cuda_step.Kernel(family, precision, dtype)
    for family in ("lstm", "rnnprop")
    for precision in ("exact", "fast")
    for dtype in (torch.float32, torch.bfloat16)
)


class Problem:
    """Tensors of one optimizer, of shapes that are odd, empty, vectorisable or misaligned."""

    def __init__(
        self,
        rule: Rule,
        sizes: tuple[int, ...],
        kind: str = "normal",
        dtype: torch.dtype = torch.float32,
        state_dtype: torch.dtype = torch.float32,
        shift: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(5)
        self.params = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
        self.grads = [common.tricky_gradients(kind, (size,), generator, dtype) for size in sizes]
        self.states = []
        for size in sizes:
            state = common.random_state(rule, (size,), generator).to(state_dtype)
            room = torch.zeros(state.numel() + shift, dtype=state_dtype)
            self.states.append(room[shift:].view_as(state).copy_(state))
        self.steps = [torch.tensor(float(k)) for k in range(len(sizes))]

    def lists(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        return self.params, self.grads, self.states, self.steps

    def copies(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        params, grads, states, steps = ([part.clone() for part in parts] for parts in self.lists())
        return params, grads, states, steps


def reference(
    rule: Rule,
    lists: tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]],
    *,
    lr: float = 1.0,
    weight_decay: float = 0.0,
    maximize: bool = False,
    nonfinite: int = 0,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    rounding_seed: int | None = None,
) -> None:
    """The plain-torch step in place, on copies."""
    params, grads, states, steps = lists
    meta = rule.flat_parameters().detach()
    counters = steps if rule.needs_step else []
    _ops_reference.step_(
        rule,
        params,
        grads,
        states,
        counters,
        meta,
        lr,
        weight_decay,
        maximize,
        nonfinite,
        grad_scale,
        found_inf,
        rounding_seed,
    )


@functools.cache
def functional(name: str, precision: str, architecture: int = 80) -> list[Tensor]:
    """Update and state by the kernel, plain torch and float64, over all kinds of gradients."""
    case = next(case for case in CASES if case.name == name)
    rule, exact_rule = case.make(), case.make(torch.float64)
    generator = torch.Generator().manual_seed(1)
    parts = [
        common.tricky_gradients(kind, (size,), generator)
        for kind, size in zip(common.GRADIENT_KINDS, (61, 64, 31, 32, 96, 53), strict=True)
    ]
    grad = torch.cat(parts)
    state = common.random_state(rule, (grad.numel(),), generator)
    update, new_state, _ = cuda_step.functional_step(
        rule, grad, state, 3, precision, architecture=architecture
    )
    with torch.no_grad():
        plain = rule.reference_step(grad, state, 3)
        exact = exact_rule.reference_step(grad.double(), state.double(), 3)
    return [update, plain[0], exact[0], new_state, plain[1], exact[1]]


@over_cases
@pytest.mark.parametrize("architecture", [75, 80])
def test_exact_step_is_as_accurate_as_plain_torch(case: common.RuleCase, architecture: int) -> None:
    results = functional(case.name, "exact", architecture)
    common.assert_as_accurate(*results[:3], "update")
    # The moments of RNNprop are squares of gradients, far above the other planes: apart.
    first = 2 if case.family == "rnnprop" else 0
    common.assert_as_accurate(*(part[:first] for part in results[3:]), "moments")
    common.assert_as_accurate(*(part[first:] for part in results[3:]), "state")


@over_families
def test_fast_step_keeps_its_stated_error(case: common.RuleCase) -> None:
    # Of h and c, which lie within about 1, and of the update relative to the largest one.
    results = functional(case.name, "fast")
    first = 2 if case.family == "rnnprop" else 0
    assert float((results[3] - results[5])[first:].abs().max()) <= 3e-3
    assert common.relative_error(results[0], results[2]) <= 2e-3


@over_cases
def test_nan_and_infinity_go_where_the_reference_puts_them(case: common.RuleCase) -> None:
    rule, exact_rule = case.make(), case.make(torch.float64)
    generator = torch.Generator().manual_seed(2)
    grad = common.tricky_gradients("nonfinite", (100,), generator)
    grad[:4] = torch.tensor([3e38, -3e38, 1e-45, -0.0])
    state = common.random_state(rule, (100,), generator)
    state[-40:, 5] = torch.nan
    update, planes, _ = cuda_step.functional_step(rule, grad, state, 0)
    with torch.no_grad():
        plain = rule.reference_step(grad, state, 0)
        exact = exact_rule.reference_step(grad.double(), state.double(), 0)
    common.assert_as_accurate(update, plain[0], exact[0], "update")
    first = 2 if case.family == "rnnprop" else 0
    common.assert_as_accurate(planes[first:], plain[1][first:], exact[1][first:], "state")


def test_saturated_inputs_stay_finite() -> None:
    # Preactivations of 1e4: every exponential overflows or vanishes.
    rule = CASES[1].make()
    grad = torch.tensor([1e6, -1e6, 1e30, -1e30, 0.0, 1.0])
    state = torch.zeros(80, 6)
    update, planes, _ = cuda_step.functional_step(rule, grad, state)
    with torch.no_grad():
        plain = rule.reference_step(grad, state)
    torch.testing.assert_close(update, plain[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(planes, plain[1], rtol=1e-5, atol=1e-6)


# Parameter dtype, state dtype, elements by which the state is off a vector's alignment, options.
STEPS: tuple[tuple[torch.dtype, torch.dtype, int, dict[str, Any]], ...] = (
    (torch.float32, torch.float32, 0, {}),
    (torch.float32, torch.float32, 1, {"lr": 0.3, "weight_decay": 0.1, "maximize": True}),
    (torch.bfloat16, torch.bfloat16, 0, {"lr": 0.3}),
    (torch.float16, torch.bfloat16, 1, {"lr": 2.0, "weight_decay": 0.01}),
    (torch.float64, torch.float32, 0, {"lr": 0.3, "weight_decay": 0.1}),
    (torch.float16, torch.float32, 0, {"grad_scale": torch.tensor([8.0])}),
)


# Compute capability 7.5 differs in products and in the conversion to bfloat16 only.
@over_families
@pytest.mark.parametrize(
    ("number", "architecture"), [*((n, 80) for n in range(len(STEPS))), (0, 75), (3, 75)]
)
def test_list_step_agrees_with_the_reference(
    case: common.RuleCase, number: int, architecture: int
) -> None:
    dtype, state_dtype, shift, options = STEPS[number]
    rule = case.make()
    problem = Problem(rule, (64, 0, 1, 45, 100, 3), "normal", dtype, state_dtype, shift)
    expected = problem.copies()
    params, grads, states, steps = problem.copies()
    exact = (
        [t.double() for t in params],
        [t.double() for t in grads],
        [t.double() for t in states],
        steps,
    )
    reference(rule, expected, **options)
    reference(case.make(torch.float64), exact, **options)
    cuda_step.step_(rule, *problem.lists(), architecture=architecture, **options)
    for what, results, targets, exacts in zip(
        ("params", "grads", "states", "steps"), problem.lists(), expected, exact, strict=True
    ):
        for result, target, true in zip(results, targets, exacts, strict=True):
            if what in ("params", "states") and result.dtype == torch.float32:
                common.assert_as_accurate(result, target, true, what)
                continue
            eps = torch.finfo(result.dtype).eps
            if what == "params" and dtype == torch.float64:
                eps = torch.finfo(torch.float32).eps  # of the update
            # Two roundings may fall on either side: one unit in the last place apart.
            torch.testing.assert_close(
                result, target, rtol=1.01 * max(eps, 4e-7), atol=4e-7, msg=f"{what} differ"
            )


def test_tensors_beyond_one_table_and_their_step_counters() -> None:
    # 70 tensors are two launches; each counter must go up once and be read before that.
    rule = FAMILIES[1].make()
    problem = Problem(rule, (1, 2, 0, 5, 33, 4, 7) * 10)
    expected = problem.copies()
    reference(rule, expected)
    _, counts = cuda_step.step_(rule, *problem.lists())
    assert len(counts) == 1 + 2
    assert common.same_bits(problem.steps, expected[3])
    for result, target in zip(problem.params, expected[0], strict=True):
        torch.testing.assert_close(result, target, rtol=1e-6, atol=1e-6)


@over_families
def test_found_inf_leaves_everything_alone(case: common.RuleCase) -> None:
    problem = Problem(case.make(), (40, 5))
    before = problem.copies()
    cuda_step.step_(
        case.make(), *problem.lists(), grad_scale=torch.tensor([2.0]), found_inf=torch.ones(1)
    )
    for parts, kept in zip(problem.lists(), before, strict=True):
        assert common.same_bits(parts, kept)


@over_families
@pytest.mark.parametrize("nonfinite", [1, 2], ids=["skip", "raise"])
def test_tensors_with_nonfinite_gradients(case: common.RuleCase, nonfinite: int) -> None:
    rule = case.make()
    problem = Problem(rule, (40, 37, 5))
    problem.grads[1][36] = torch.inf
    before = problem.copies()
    flags, _ = cuda_step.step_(rule, *problem.lists(), nonfinite=nonfinite)
    assert flags == [0, 1, 0, 1]
    for parts, kept in zip(problem.lists(), before, strict=True):
        left = parts if nonfinite == 2 else parts[1:2]
        assert common.same_bits(left, kept if nonfinite == 2 else kept[1:2])
    if nonfinite == 1:
        assert not torch.equal(problem.params[0], before[0][0])
        assert problem.steps[2] == before[3][2] + rule.needs_step


def test_finite_gradients_pass_the_scan() -> None:
    rule = FAMILIES[1].make()
    problem, other = Problem(rule, (40, 37)), Problem(rule, (40, 37))
    flags, _ = cuda_step.step_(rule, *problem.lists(), nonfinite=2)
    cuda_step.step_(rule, *other.lists())
    assert flags == [0, 0, 0]
    for parts, others in zip(problem.lists(), other.lists(), strict=True):
        assert common.same_bits(parts, others)


def test_a_float64_gradient_beyond_float32_counts_as_finite() -> None:
    rule = FAMILIES[0].make()
    problem = Problem(rule, (3, 3), dtype=torch.float64)
    problem.grads[0][1] = 1e300
    problem.grads[1][2] = torch.nan
    assert cuda_step.step_(rule, *problem.lists(), nonfinite=1)[0] == [0, 1, 1]


def test_grid_size_does_not_change_a_bit() -> None:
    rule = FAMILIES[0].make()
    one, other = Problem(rule, (130, 33)), Problem(rule, (130, 33))
    cuda_step.step_(rule, *one.lists(), grid=1)
    cuda_step.step_(rule, *other.lists(), grid=3)
    for parts, others in zip(one.lists(), other.lists(), strict=True):
        assert common.same_bits(parts, others)


def test_stochastic_rounding_is_unbiased_and_repeatable() -> None:
    rule = FAMILIES[0].make()
    size = 256

    def run(seed: int | None) -> Tensor:
        # The same coordinate everywhere, so that only the random bits differ.
        problem = Problem(rule, (size,), state_dtype=torch.bfloat16)
        problem.grads[0].fill_(0.3)
        problem.states[0].copy_(problem.states[0][:, :1].expand(-1, size).clone())
        cuda_step.step_(
            rule, *problem.lists(), stochastic_rounding=seed is not None, seed=seed or 0
        )
        return problem.states[0].double()

    first, second, nearest = run(1), run(2), run(None)
    assert torch.equal(first, run(1))
    assert not torch.equal(first, second)
    problem = Problem(rule, (size,), state_dtype=torch.bfloat16)
    with torch.no_grad():
        state = problem.states[0][:, :1].float()
        exact = rule.reference_step(torch.tensor([0.3]), state)[1].double()
    unit = 2.0 ** (torch.floor(torch.log2(exact.abs())) - 7)  # bf16's spacing
    assert bool(((first - exact).abs() <= 1.001 * unit).all())
    assert bool(((nearest - exact).abs() <= 0.501 * unit).all())
    # 512 draws of at most half a unit's deviation: the mean is within 5 of its deviations.
    bias = (torch.cat((first, second), dim=1).mean(dim=1, keepdim=True) - exact) / unit
    assert float(bias.abs().max()) <= 5 * 0.5 / (2 * size) ** 0.5
    assert abs(float(bias.mean())) <= 5 * 0.5 / (2 * size * 80) ** 0.5


@pytest.mark.parametrize(("family", "shift", "architecture"), [(0, 1, 80), (1, 0, 80), (1, 0, 75)])
def test_stochastic_rounding_draws_the_bits_of_the_reference(
    family: int, shift: int, architecture: int
) -> None:
    rule, seed = FAMILIES[family].make(), 2**63 + 12345
    problem = Problem(rule, (3, 36), state_dtype=torch.bfloat16, shift=shift)
    expected = problem.copies()
    reference(rule, expected, rounding_seed=seed - 2**64)
    cuda_step.step_(
        rule, *problem.lists(), stochastic_rounding=True, seed=seed, architecture=architecture
    )
    state, target = (torch.cat(parts, dim=1) for parts in (problem.states, expected[2]))
    # A last bit of the float32 value decides only where the draw lies next to it.
    assert float((state != target).double().mean()) <= 2e-3
    torch.testing.assert_close(state, target, rtol=2**-7, atol=1e-30)


@functools.cache
def counted(kernel: cuda_step.Kernel) -> tuple[Any, Any]:
    """Counts of launches of 512 and 1,024 coordinates: the difference is free of the set-up."""
    case = FAMILIES[0] if kernel.family == "lstm" else FAMILIES[1]
    rule = case.make()
    counts = []
    for tiles in (1, 2):
        problem = Problem(rule, (512 * tiles,), state_dtype=kernel.state_dtype)
        _, launches = cuda_step.step_(rule, *problem.lists(), precision=kernel.precision, grid=1)
        counts.append(launches[0])
    return counts[0], counts[1]


@pytest.mark.parametrize("kernel", KERNELS[::2], ids=lambda kernel: kernel.name)
def test_memory_traffic_is_the_least_possible(kernel: cuda_step.Kernel) -> None:
    small, large = counted(kernel)
    planes = 80 if kernel.family == "lstm" else 82
    state = 4 if kernel.state_dtype == torch.float32 else 2
    least = 2 * planes * state + 12
    assert (large.dram_bytes - small.dram_bytes) / 512 <= 1.001 * least
    for what in ("ld_global", "st_global"):
        moved, used = (
            large.space[what][name] - small.space[what][name] for name in ("sectors", "bytes")
        )
        # Lanes that read the same bytes make the figure exceed 1.
        assert used / (32 * moved) >= 0.98
    shared = large.shared_wavefronts - small.shared_wavefronts
    assert large.bank_conflicts - small.bank_conflicts <= 0.05 * shared


@pytest.mark.parametrize("kernel", KERNELS[::2], ids=lambda kernel: kernel.name)
def test_predicted_bound_of_an_h100_is_memory(kernel: cuda_step.Kernel) -> None:
    small, large = counted(kernel)
    predict = cuda_step.emulator().roofline.predict
    # Per-coordinate times, as if the grid filled the chip: the counts of the difference.
    bounds = [predict(counts, "H100-SXM")["times"] for counts in (small, large)]
    times = {unit: bounds[1][unit] - bounds[0][unit] for unit in bounds[0]}
    floor = (2 * (80 if kernel.family == "lstm" else 82) * 4 + 12) * 512 / 3.35e12
    limit = 1.25 if kernel.precision == "exact" else 1.05
    assert max(times.values()) <= limit * floor, times


@pytest.mark.parametrize("architecture", cuda_step.COMPILED)
def test_kernels_fit_their_registers_without_spilling(architecture: int) -> None:
    resources = cuda_step.emulator().toolchain.resources(
        cuda_step.module(cuda_step.COMPILED[architecture]), f"sm_{architecture}", sass=False
    )
    limits = {kernel.name: 65_536 // kernel.threads_on(architecture) for kernel in KERNELS}
    for name, limit in (limits | {"scan_kernel": 32, "count_kernel": 32}).items():
        found = next(use for mangled, use in resources.items() if name in mangled)
        assert found.spill_stores == found.spill_loads == 0, name
        assert found.registers <= limit, name
