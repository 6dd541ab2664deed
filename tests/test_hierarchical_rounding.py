"""Stochastic rounding of a hierarchical rule's bfloat16 planes: its bits, its mean, its seams."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor

import fastl2o
from fastl2o import HierarchicalRule, LearnedOptimizer, _rounding
from fastl2o import _ops_hierarchical_parts as parts
from tests.common import over_backends
from tests.optimizers import assert_same_bits, run_steps
from tests.test_hierarchical_ops import Problem

SIZES = (4, 5, 6, 3)
SHAPES: list[tuple[int, ...]] = [(5,), (0,), (10, 10), (), (31,), (3000,)]
SEED = -(2**62) + 12345


def small_rule(attention: bool = False) -> HierarchicalRule:
    rule = HierarchicalRule(*SIZES, attention=attention)
    rule.reset_parameters(torch.Generator().manual_seed(7))
    return rule


def some_way_into_its_run(
    rule: HierarchicalRule,
    shapes: list[tuple[int, ...]] = SHAPES,
    dtype: torch.dtype = torch.bfloat16,
) -> Problem:
    """Two steps on, the same on every backend; its planes numbers of bfloat16."""
    mine = Problem(rule, shapes)
    with fastl2o.backend("auto"):
        for _ in range(2):
            mine.step(rule, mine.draw())
    mine.planes = [planes.bfloat16().to(dtype) for planes in mine.planes]
    return mine


def stepped(
    rule: HierarchicalRule, seed: int | None, dtype: torch.dtype = torch.bfloat16, **options: Any
) -> list[Tensor]:
    """Everything after one more step."""
    mine = some_way_into_its_run(rule, dtype=dtype)
    mine.step(rule, mine.draw(), rounding_seed=seed, **options)
    return mine.everything()


def planes_of(tensors: list[Tensor], rule: HierarchicalRule) -> Tensor:
    """All planes side by side, (S, N)."""
    count = len(SHAPES)
    return torch.cat([p.reshape(rule.state_planes, -1) for p in tensors[count : 2 * count]], dim=1)


def test_backends_draw_the_same_bits() -> None:
    rule = small_rule()
    results = []
    for backend in ("auto", "reference"):
        with fastl2o.backend(backend):
            results.append(planes_of(stepped(rule, SEED), rule))
    kernel, reference = results
    # A last bit of the float32 value decides only where the draw lies next to it.
    assert float((kernel != reference).double().mean()) <= 1e-3
    torch.testing.assert_close(kernel, reference, rtol=2**-7, atol=1e-5)


@over_backends
def test_only_what_is_stored_is_rounded(backend: str) -> None:
    rule = small_rule()
    with fastl2o.backend(backend):
        rounded, plain = stepped(rule, SEED), stepped(rule, None)
        wide = stepped(rule, None, torch.float32)
    assert not torch.equal(planes_of(rounded, rule), planes_of(plain, rule))
    count = len(SHAPES)
    for tensors in (rounded, plain):
        torch.testing.assert_close(tensors[:count], wide[:count])  # parameters
        torch.testing.assert_close(tensors[2 * count :], wide[2 * count :])  # levels and counters


@over_backends
def test_rounding_is_unbiased_and_to_a_neighbour(backend: str) -> None:
    rule = small_rule()
    with fastl2o.backend(backend):
        exact = planes_of(stepped(rule, None, torch.float32), rule).double()
        unit = 2.0 ** (torch.floor(torch.log2(exact.abs().clamp(min=1e-37))) - 7)
        total, draws = torch.zeros_like(exact), 20 if backend == "cpu" else 8
        for seed in range(draws):
            drawn = planes_of(stepped(rule, seed), rule).double()
            assert bool(((drawn - exact).abs() <= 1.001 * unit).all())
            total += (drawn - exact) / unit
    # Half a unit is the largest deviation of a draw; 6 of the mean's are never reached by chance.
    assert float((total / draws).abs().max()) <= 6 * 0.5 / draws**0.5
    by_plane = (total / draws).mean(dim=1).abs()
    assert float(by_plane.max()) <= 5 * 0.5 / (draws * exact.shape[1]) ** 0.5


@over_backends
def test_draws_are_the_same_for_any_number_of_threads_and_differ_between_seeds(
    backend: str,
) -> None:
    rule, threads = small_rule(), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            with fastl2o.backend(backend):
                results.append(stepped(rule, 7))
    finally:
        torch.set_num_threads(threads)
    assert_same_bits(*results)
    with fastl2o.backend(backend):
        assert not torch.equal(planes_of(results[0], rule), planes_of(stepped(rule, 8), rule))


def test_planes_and_tensors_draw_their_own_bits() -> None:
    values = torch.full((2, 4000), 1.0 + 2.0**-8)  # halfway
    first, second = (_rounding.round_planes(values, SEED, tensor) for tensor in (0, 1))
    for one, other in ((first[0], first[1]), (first[0], second[0])):
        assert 0.4 < float((one == other).double().mean()) < 0.6


@over_backends
def test_nan_and_infinity_stay(backend: str) -> None:
    rule = small_rule()
    results = []
    for seed in (None, SEED):
        mine = some_way_into_its_run(rule, [(9,)])
        (grad,) = mine.draw()
        grad[2], grad[5] = torch.nan, torch.inf
        with fastl2o.backend(backend):
            mine.step(rule, [grad], rounding_seed=seed, nonfinite="pass")
        results.append(mine.planes[0])
    assert torch.equal(results[0].isnan(), results[1].isnan())
    assert torch.equal(results[0].isinf(), results[1].isinf())
    assert bool(results[1].isnan().any())


@over_backends
def test_parts_that_are_whole_draw_the_bits_of_the_step(backend: str) -> None:
    rule, shapes = small_rule(), [(5, 3), (300,)]
    whole, split = (some_way_into_its_run(rule, shapes) for _ in range(2))
    grads = whole.draw()
    with fastl2o.backend(backend):
        whole.step(rule, [grad.clone() for grad in grads], rounding_seed=SEED)
        parts.step_(
            *(rule, split.params, grads, split.planes, split.tensors, split.steps, split.hidden),
            counts=[param.numel() for param in split.params],
            reduce=lambda sums: None,
            lr=[1.0, 1.0],
            weight_decay=[0.0, 0.0],
            rounding_seed=SEED,
        )
    assert_same_bits(whole.planes, split.planes)


def test_skipped_and_empty_tensors_do_not_move_the_draws_of_others() -> None:
    rule = small_rule()
    values = []
    for bad in (False, True):
        mine = some_way_into_its_run(rule, [(0,), (6,), (400,)])
        grads = mine.draw()
        mine.hidden.zero_()
        if bad:
            grads[1][0] = torch.nan
        mine.step(rule, grads, rounding_seed=SEED, nonfinite="skip")
        values.append(mine.planes[2])
    # All but the mean of the log rates is as without the other tensor, but for that one feature.
    assert float((values[0] == values[1]).double().mean()) > 0.9


def optimizer_of(
    shapes: list[tuple[int, ...]], rule: HierarchicalRule, **options: Any
) -> LearnedOptimizer:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    groups: list[dict[str, Any]] = [{"params": params[:1]}, {"params": params[1:], "lr": 0.5}]
    return LearnedOptimizer(groups, rule, **{"state_dtype": torch.bfloat16, **options})


def everything(optimizer: LearnedOptimizer) -> list[Tensor]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    planes = [optimizer.state[p]["planes"] for p in params]
    return [p.detach() for p in params] + planes + [optimizer.state["global/0"]["hidden"]]


def test_resuming_repeats_every_bit_and_the_seed_decides() -> None:
    rule, shapes = small_rule(), [(40,), (7, 3)]
    straight = optimizer_of(shapes, rule, stochastic_rounding=True, seed=3)
    run_steps(straight, 5)
    first = optimizer_of(shapes, rule, stochastic_rounding=True, seed=3)
    run_steps(first, 3)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    resumed = LearnedOptimizer([{"params": g["params"]} for g in first.param_groups], rule)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    run_steps(resumed, 2, seed=103)
    assert_same_bits(everything(straight), everything(resumed))
    assert [group["rounding_step"] for group in resumed.param_groups] == [5, 5]
    assert [key for key in straight.state if isinstance(key, str)] == ["global/0"]

    def planes(**options: Any) -> Tensor:
        optimizer = optimizer_of([(500,), (3,)], rule, **options)
        run_steps(optimizer, 1)
        return everything(optimizer)[2]

    assert not torch.equal(planes(stochastic_rounding=True), planes())


def test_groups_that_round_and_groups_that_do_not_are_problems_of_their_own() -> None:
    optimizer = optimizer_of([(40,), (7, 3)], small_rule())
    optimizer.param_groups[1]["stochastic_rounding"] = True
    run_steps(optimizer, 1)
    assert [key for key in optimizer.state if isinstance(key, str)] == ["global/0", "global/1"]


def test_small_changes_add_up_instead_of_being_lost() -> None:
    # The log rate moves by less than half a unit a step and stands still otherwise.
    rule = small_rule()
    with torch.no_grad():
        rule.rate_bias.fill_(0.02)
    means = []
    for rounding in (False, True):
        optimizer = optimizer_of([(2000,), (2,)], rule, stochastic_rounding=rounding)
        run_steps(optimizer, 1)
        planes = everything(optimizer)[2]
        planes[-1] = -8.0
        run_steps(optimizer, 40)
        means.append(float(planes[-1].double().mean()))
    # Each step adds (1 - sigmoid(rate_momentum)) 0.02; half a unit of -8 is 0.015625.
    expected = -8.0 + 40 * 0.02 / (1.0 + float(rule.rate_momentum.detach().exp()))
    assert means[0] == -8.0
    assert means[1] == pytest.approx(expected, abs=2e-3)


def test_attention_takes_parameters_back_by_what_is_stored() -> None:
    rule = small_rule(attention=True)
    with torch.no_grad():
        rule.rate_bias.fill_(3.0)  # long steps
    results = []
    for rounding in (True, False):
        optimizer = optimizer_of([(300,), (4,)], rule, stochastic_rounding=rounding)
        run_steps(optimizer, 1)
        optimizer.eval()
        results.append(everything(optimizer)[:2])
    # The points ahead were rounded at random, not the parameters.
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounding_seed": 2**63}, "Invalid rounding_seed: 9223372036854775808"),
        ({"dtype": torch.float32}, r"planes\[0\]: stochastic rounding is of bfloat16"),
        ({"meta": torch.zeros(1, small_rule().num_meta_parameters)}, "takes no rounding_seed"),
    ],
)
def test_what_cannot_be_rounded_is_refused(change: dict[str, Any], message: str) -> None:
    rule = small_rule()
    options = {"rounding_seed": 1} | change
    mine = some_way_into_its_run(rule, dtype=options.pop("dtype", torch.bfloat16))
    before = [tensor.clone() for tensor in mine.everything()]
    with pytest.raises(ValueError, match=message):
        mine.step(rule, mine.draw(), **options)
    assert_same_bits(before, mine.everything())
