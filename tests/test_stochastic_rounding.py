"""Stochastic rounding of bfloat16 state: the same bits on all backends, unbiased, resumable."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor

import fastl2o
from fastl2o import LearnedOptimizer, _rounding, ops
from fastl2o.rules import LSTMRule, RNNPropRule, Rule
from tests import common
from tests.gpu_common import needs_triton
from tests.test_backends import run_python

RULES = (LSTMRule(5, 2), RNNPropRule(3, 1), LSTMRule(2, 3, preprocess="identity"))
over_rules = pytest.mark.parametrize(
    "rule", RULES, ids=lambda rule: f"{rule.family}-{rule.num_layers}"
)
SEED = -(2**62) + 12345
SIZES = (5, 0, 100, 1, 31)


def lists(rule: Rule) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Parameters, gradients, bfloat16 states and counters."""
    generator = torch.Generator().manual_seed(4)
    params = [torch.randn(size, generator=generator) for size in SIZES]
    grads = [torch.randn(size, generator=generator) for size in SIZES]
    states = [common.random_state(rule, (size,), generator).bfloat16() for size in SIZES]
    return params, grads, states, [torch.tensor(2.0) for _ in SIZES]


def stepped(rule: Rule, seed: int | None, backend: str = "auto") -> Tensor:
    """All states after one step, side by side: (S, N)."""
    params, grads, states, steps = lists(rule)
    with fastl2o.backend(backend):
        ops.step_(rule, params, grads, states, steps, rounding_seed=seed)
    return torch.cat(states, dim=1)


def unrounded(rule: Rule) -> Tensor:
    """The float32 states that a step rounds, in float64."""
    params, grads, states, steps = lists(rule)
    wide = [state.float() for state in states]
    ops.step_(rule, params, grads, wide, steps)
    return torch.cat(wide, dim=1).double()


def test_hash_is_a_bijection_that_does_not_change() -> None:
    words = torch.arange(1 << 16, dtype=torch.int64) * 65_537
    assert len(_rounding.mix_bits(words).unique()) == len(words)
    # Python's integers do not wrap: the tensors' products must not have lost anything.
    for word in (1, 2**31, 2**32 - 1):
        assert int(_rounding.mix_bits(torch.tensor(word))) == _rounding.mix_bits(word)
    assert _rounding.mix_bits(1) == 0x688990C0


@over_rules
def test_backends_draw_the_same_bits(rule: Rule) -> None:
    kernel, reference = stepped(rule, SEED, "auto"), stepped(rule, SEED, "reference")
    # A last bit of the float32 value decides only where the draw lies next to it.
    assert float((kernel != reference).double().mean()) <= 1e-3
    torch.testing.assert_close(kernel, reference, rtol=2**-7, atol=1e-30)


@pytest.mark.parametrize(
    ("rule", "backend"), [*((rule, "auto") for rule in RULES), (RULES[1], "reference")]
)
def test_rounding_is_unbiased_and_to_a_neighbour(rule: Rule, backend: str) -> None:
    exact, draws = unrounded(rule), 100
    unit = 2.0 ** (torch.floor(torch.log2(exact.abs().clamp(min=1e-37))) - 7)  # bfloat16's spacing
    total = torch.zeros_like(exact)
    for seed in range(draws):
        state = stepped(rule, seed, backend).double()
        assert bool(((state - exact).abs() <= 1.001 * unit).all())
        total += (state - exact) / unit
    # Half a unit is the largest deviation of a draw; 5 of the mean's are never reached by chance.
    assert float((total / draws).abs().max()) <= 5 * 0.5 / draws**0.5
    assert abs(float(total.mean() / draws)) <= 5 * 0.5 / (draws * exact.numel()) ** 0.5


@over_rules
def test_draws_are_repeatable_and_differ_between_seeds_tensors_and_planes(rule: Rule) -> None:
    assert torch.equal(stepped(rule, 7), stepped(rule, 7))
    assert not torch.equal(stepped(rule, 7), stepped(rule, 8))
    coordinates = torch.arange(1000)
    first, second = (_rounding.random_bits(SEED, index, coordinates, 3) for index in (0, 1))
    for one, other in ((first[0], first[1]), (first[0], second[0]), (first[0], first[0] >> 16)):
        assert float((one == other).double().mean()) <= 0.01
    beyond = _rounding.random_bits(SEED, 0, coordinates + 2**32, 3)
    assert float((beyond == first).double().mean()) <= 0.01


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_nan_and_infinity_stay(backend: str) -> None:
    rule = RULES[1]
    param, grad = torch.zeros(3), torch.tensor([torch.nan, torch.inf, 1.0])
    results = []
    for seed in (None, SEED):
        state = rule.init_state(param, torch.bfloat16)
        with fastl2o.backend(backend):
            ops.step_(
                rule, [param.clone()], [grad], [state], [torch.zeros(())],
                nonfinite="pass", rounding_seed=seed,
            )  # fmt: skip
        results.append(state)
    assert torch.equal(results[0].isnan(), results[1].isnan())
    assert torch.equal(results[0].isinf(), results[1].isinf())


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(map(torch.equal, left, right))


def train(steps: int, resume_at: int | None = None, **options: Any) -> tuple[list[Tensor], Any]:
    """Parameters and planes after some steps on a quadratic, perhaps through a checkpoint."""
    torch.manual_seed(0)
    rule = RNNPropRule(3, 1)
    params = [torch.nn.Parameter(torch.randn(n)) for n in (40, 7)]

    def make() -> LearnedOptimizer:
        groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.5}]
        return LearnedOptimizer(groups, rule, state_dtype=torch.bfloat16, **options)

    optimizer = make()
    for step in range(steps):
        if step == resume_at:
            buffer = io.BytesIO()
            torch.save(optimizer.state_dict(), buffer)
            buffer.seek(0)
            optimizer = make()
            optimizer.load_state_dict(torch.load(buffer, weights_only=True))
        for param in params:
            param.grad = param.detach().clone()
        optimizer.step()
    planes = [optimizer.state[param]["planes"] for param in params]
    return [param.detach().clone() for param in params] + planes, optimizer


def test_resuming_repeats_every_bit() -> None:
    straight, optimizer = train(6, stochastic_rounding=True, seed=3)
    resumed, _ = train(6, resume_at=3, stochastic_rounding=True, seed=3)
    other, _ = train(6, stochastic_rounding=True, seed=4)
    assert same(straight, resumed)
    assert not same(straight, other)
    assert [group["rounding_step"] for group in optimizer.param_groups] == [6, 6]


def test_off_is_the_default_and_rounds_to_nearest() -> None:
    plain, optimizer = train(4)
    off, _ = train(4, stochastic_rounding=False, seed=9)
    assert same(plain, off)
    assert not same(plain, train(4, stochastic_rounding=True)[0])
    assert optimizer.param_groups[0]["rounding_step"] == 0


def test_small_changes_add_up_instead_of_being_lost() -> None:
    # The second moment's average moves by less than half a unit a step and stands still otherwise.
    rule = RNNPropRule(2, 1, beta2=0.999)
    means = []
    for rounding in (False, True):
        param = torch.nn.Parameter(torch.zeros(2000))
        optimizer = LearnedOptimizer(
            [param], rule, state_dtype=torch.bfloat16, stochastic_rounding=rounding
        )
        param.grad = torch.ones(2000)
        optimizer.step()
        optimizer.state[param]["planes"][1] = 0.5
        for _ in range(40):
            optimizer.step()
        means.append(float(optimizer.state[param]["planes"][1].double().mean()))
    expected = 1.0 - 0.5 * 0.999**40
    assert means[0] == 0.5
    assert means[1] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "stochastic_rounding=True with state_dtype=torch.float32. Give"),
        ({"state_dtype": torch.float64}, "state_dtype=torch.float64. Give state_dtype=torch.bf"),
        ({"state_dtype": torch.bfloat16, "seed": -1}, "Invalid seed: -1. Accepted: an int"),
        ({"state_dtype": torch.bfloat16, "seed": 1.0}, "Invalid seed: 1.0"),
        ({"state_dtype": torch.bfloat16, "stochastic_rounding": 1}, "stochastic_rounding: 1"),
        ({"state_dtype": torch.bfloat16, "differentiable": True}, "has no derivative"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LearnedOptimizer([torch.zeros(2)], RULES[0], **{"stochastic_rounding": True, **options})


def test_ops_refuse_states_and_rules_that_are_not_rounded() -> None:
    rule, param = RULES[0], torch.zeros(2)
    state = rule.init_state(param)
    with pytest.raises(ValueError, match=r"states\[0\]: stochastic rounding is of bfloat16 states"):
        ops.step_(rule, [param], [param], [state], rounding_seed=1)
    with pytest.raises(ValueError, match="Invalid rounding_seed: 9223372036854775808"):
        ops.step_(rule, [param], [param], [state.bfloat16()], rounding_seed=2**63)


def test_switched_on_over_float32_states_nothing_changes() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = LearnedOptimizer([param], RULES[0])
    param.grad = torch.ones(3)
    optimizer.step()
    before = param.detach().clone()
    optimizer.param_groups[0].update(stochastic_rounding=True, state_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="its states were made in torch"):
        optimizer.step()
    assert torch.equal(param.detach(), before)


def test_capture_in_a_cuda_graph_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnCuda:
        dtype, is_cuda = torch.bfloat16, True

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="every replay would repeat the same random bits"):
        _rounding.check_seed(1, [OnCuda()], "states")  # type: ignore[list-item]


INTERPRETED = """
import torch, fastl2o
from tests import test_stochastic_rounding as t
for rule in t.RULES:
    kernel, reference = t.stepped(rule, t.SEED, "triton"), t.stepped(rule, t.SEED, "reference")
    assert float((kernel != reference).double().mean()) <= 2e-3
    torch.testing.assert_close(kernel, reference, rtol=2**-7, atol=1e-30)
    assert not torch.equal(kernel, t.stepped(rule, None, "triton"))
print("alike")
"""


@needs_triton
def test_the_triton_step_draws_the_same_bits() -> None:
    assert run_python(INTERPRETED, TRITON_INTERPRET="1").split() == ["alike"]
