"""The step of a batch of runs, each by meta-parameters of its own, against steps of one run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastl2o
from fastl2o import ops
from fastl2o._ops_families import FAMILIES
from fastl2o._ops_runs import runs_step_
from fastl2o.rules import CoordinateRule
from tests.common import (
    RuleCase,
    over_backends,
    over_rules,
    over_small_rules,
    random_state,
    same_bits,
)

RUNS, STEP = 3, 4


def batch(case: RuleCase, dim: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Params, grads, states and rows of meta-parameters."""
    generator = torch.Generator().manual_seed(dim)
    rules = [case.make(dtype, seed=seed) for seed in range(RUNS)]
    params, grads = (torch.randn(RUNS, dim, generator=generator, dtype=dtype) for _ in range(2))
    states = torch.stack([random_state(rule, (dim,), generator).to(dtype) for rule in rules])
    return [params, grads, states, torch.stack([rule.flat_parameters().detach() for rule in rules])]


def step_batch(rule: CoordinateRule, parts: list[Tensor]) -> None:
    params, grads, states, meta = parts
    runs_step_(rule, params, grads, states, STEP, meta, lr=0.5, weight_decay=0.1)


def step_one_by_one(rule: CoordinateRule, parts: list[Tensor]) -> None:
    for param, grad, state, meta in zip(*parts, strict=True):
        ops.step_(
            rule, [param], [grad], [state], [torch.tensor(float(STEP))],
            lr=0.5, weight_decay=0.1, nonfinite="pass", meta=meta,
        )  # fmt: skip


@over_backends
@over_rules
@pytest.mark.parametrize("dim", [0, 10, 65])
def test_each_run_is_stepped_by_its_row(case: RuleCase, backend: str, dim: int) -> None:
    rule, got, expected = case.make(), batch(case, dim), batch(case, dim)
    if dim:
        got[1][1, 0] = expected[1][1, 0] = torch.nan
    with fastl2o.backend(backend):
        step_batch(rule, got)
        step_one_by_one(rule, expected)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@over_small_rules
def test_runs_in_float64_are_stepped_by_the_reference(case: RuleCase) -> None:
    rule = case.make(torch.float64)
    got, expected = (batch(case, 5, torch.float64) for _ in range(2))
    step_batch(rule, got)
    step_one_by_one(rule, expected)
    assert same_bits(got, expected)


@over_small_rules
def test_default_implementation_steps_runs_without_kernels(case: RuleCase) -> None:
    rule, got, expected = case.make(), batch(case, 5), batch(case, 5)
    fallback = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    taken = (STEP,) if rule.needs_step else ()
    family = FAMILIES[rule.family]
    config = family.arguments(rule)
    family.runs_step_.redispatch(fallback, *got[:3], *taken, got[3], *config, 0.5, 0.1)
    with fastl2o.backend("reference"):
        step_one_by_one(rule, expected)
    assert same_bits(got, expected)


@pytest.mark.parametrize("position", range(4))
def test_runs_of_another_shape_are_refused_and_nothing_is_changed(position: int) -> None:
    case = RuleCase("lstm", "lstm", {"hidden_size": 3, "num_layers": 1})
    parts = batch(case, 6)
    bad = [part[:, :-1].contiguous() if i == position else part for i, part in enumerate(parts)]
    before = [part.clone() for part in bad]
    with pytest.raises((ValueError, RuntimeError)):
        step_batch(case.make(), bad)
    assert same_bits(bad, before)


def test_autograd_learns_that_runs_have_changed() -> None:
    case = RuleCase("lstm", "lstm", {"hidden_size": 3, "num_layers": 1})
    parts = batch(case, 6)
    versions = [part._version for part in parts]
    step_batch(case.make(), parts)
    changed = [part._version != version for part, version in zip(parts, versions, strict=True)]
    assert changed == [True, False, True, False]
