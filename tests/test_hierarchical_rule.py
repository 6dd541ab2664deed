"""The hierarchical rule: its reference step against the equations, its states, its derivatives."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastl2o
from fastl2o import HierarchicalRule
from fastl2o.rules.hierarchical import ProblemState

F64 = torch.float64


def make(
    *sizes: int, seed: int = 0, dtype: torch.dtype = F64, attention: bool = False
) -> HierarchicalRule:
    """A rule none of whose meta-parameters is zero, the same for every dtype."""
    rule = HierarchicalRule(*sizes, attention=attention).double()
    generator = torch.Generator().manual_seed(seed)
    rule.reset_parameters(generator)
    with torch.no_grad():
        for parameter in rule.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=F64)
            parameter.copy_((parameter + 0.1 * noise).float())
    return rule.to(dtype)


def problem(
    rule: HierarchicalRule, shapes: list[tuple[int, ...]], seed: int = 0
) -> tuple[list[Tensor], ProblemState]:
    """Gradients and a fresh state of tensors of these shapes, in float64."""
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(shape, generator=generator, dtype=F64) for shape in shapes]
    return grads, rule.init_problem(grads, seed, F64)


def detached(state: ProblemState) -> ProblemState:
    """The state without its graph."""
    planes, tensors = ([tensor.detach() for tensor in part] for part in state[:2])
    return ProblemState(planes, tensors, state.steps, state.hidden.detach())


# The equations of section 3 of the specification, a number at a time
# --------------------------------------------------------------------------------------------------


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def cell(w: dict[str, Any], name: str, x: list[float], h: list[float], j: list[float]) -> list[Any]:
    n, xh = len(h), x + h
    gates = zip(w[f"{name}.gates"], w[f"{name}.gates_bias"], j[: 2 * n], strict=True)
    ru = [sigmoid(dot(row, xh) + b + inject) for row, b, inject in gates]
    xrh = x + [r * old for r, old in zip(ru[:n], h, strict=True)]
    rows = zip(w[f"{name}.candidate"], w[f"{name}.candidate_bias"], j[2 * n :], strict=True)
    c = [math.tanh(dot(row, xrh) + b + inject) for row, b, inject in rows]
    return [u * old + (1 - u) * new for u, old, new in zip(ru[n:], h, c, strict=True)]


def mapped(w: dict[str, Any], name: str, x: list[float]) -> list[float]:
    rows = zip(w[f"{name}.weight"], w[f"{name}.bias"], strict=True)
    return [dot(row, x) + b for row, b in rows]


def by_the_equations(
    rule: HierarchicalRule, grads: list[Tensor], state: ProblemState
) -> tuple[list[list[float]], list[list[list[float]]], list[list[float]], list[float]]:
    """Updates, columns of new planes, new tensor states and the new global state."""
    w = {name: value.tolist() for name, value in rule.named_parameters()}
    size, scales = rule.param_size, rule.num_scales
    z, at = state.hidden.tolist(), size + 2 * scales
    rates = [rate for planes in state.planes for rate in planes[at].flatten().tolist()]
    mean_rate = sum(rates) / len(rates)
    updates, columns, tensors = [], [], []
    for grad, planes, tensor, steps in zip(
        grads, state.planes, state.tensors, state.steps, strict=True
    ):
        k = tensor.tolist()[:-1]
        pairs = zip(mapped(w, "tensor_to_param", k), mapped(w, "global_to_param", z), strict=True)
        j = [a + b for a, b in pairs]
        ds, etas, rows, inputs, looks, before = [], [], [], [], [], []
        for g, old in zip(
            grad.flatten().tolist(), planes.reshape(len(planes), -1).T.tolist(), strict=True
        ):
            h, gbar, lam, rate = (
                old[:size],
                old[size : size + scales],
                old[size + scales : at],
                old[at],
            )
            before.append(old[-1])
            beta_g = sigmoid(dot(w["average_decay"], h) + w["average_decay_bias"]) if steps else 0.0
            beta_l = sigmoid(dot(w["square_decay"], h) + w["square_decay_bias"]) if steps else 0.0
            betas = [beta_g ** (0.5**s) for s in range(scales)]
            gbar = [b * a + (1 - b) * g for a, b in zip(gbar, betas, strict=True)]
            lam = [
                beta_l * q + (1 - beta_l) * (a * a + 1e-12) for q, a in zip(lam, gbar, strict=True)
            ]
            m = [math.asinh(a / math.sqrt(q + 1e-16)) for a, q in zip(gbar, lam, strict=True)]
            logs = [math.log(q + 1e-16) for q in lam]
            x = [*m, *(m[s] * m[s + 1] for s in range(scales - 1))]
            x += [value - sum(logs) / scales for value in logs] + [rate - mean_rate]
            h = cell(w, "param_gru", x, h, j)
            ds.append(dot(w["direction"], h) + dot(w["shortcut"], m))
            if rule.attention:
                looks.append(dot(w["attention_direction"], h) + dot(w["attention_shortcut"], m))
            etas.append(max(-33.0, min(33.0, rate + dot(w["rate"], h) + w["rate_bias"])))
            kept = sigmoid(w["rate_momentum"])
            rows.append([*h, *gbar, *lam, kept * rate + (1 - kept) * etas[-1]])
            inputs.append(h + x)
        rms = math.sqrt(sum(d * d for d in ds) / len(ds) + 1e-16)
        offset = w["log_rate_offset"]
        updates.append([-math.exp(e + offset) * d / rms for e, d in zip(etas, ds, strict=True)])
        if rule.attention:
            rms = math.sqrt(sum(d * d for d in looks) / len(looks) + 1e-16)
            ahead = [-math.exp(e) * d / rms for e, d in zip(etas, looks, strict=True)]
            updates[-1] = [
                u + new - old for u, new, old in zip(updates[-1], ahead, before, strict=True)
            ]
        columns.append([[*r, a] for r, a in zip(rows, ahead, strict=True)] if looks else rows)
        means = [sum(column) / len(inputs) for column in zip(*inputs, strict=True)]
        k = cell(w, "tensor_gru", means, k, mapped(w, "global_to_tensor", z))
        tensors.append([*k, sum(row[-1] for row in rows) / len(rows)])
    means = [sum(column) / len(tensors) for column in zip(*(t[:-1] for t in tensors), strict=True)]
    return updates, columns, tensors, cell(w, "global_gru", means, z, [0.0] * 3 * len(z))


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("sizes", [(10, 20, 20, 4), (2, 3, 4, 1), (3, 1, 2, 5)], ids=str)
def test_step_is_the_specification(sizes: tuple[int, ...], attention: bool) -> None:
    """With attention, updates move the point ahead, and the state says how far it is ahead."""
    rule = make(*sizes, attention=attention)
    grads, state = problem(rule, [(3, 2), (), (4,)])
    state = state._replace(steps=[0, 0, 2])
    first = rule.param_size + rule.num_scales
    state.planes[2][first : first + rule.num_scales] = 0.1  # averages of squares
    for _ in range(3):
        updates, columns, tensors, z = by_the_equations(rule, grads, state)
        found, state = rule.reference_step(grads, state)
        state = detached(state)
        for update, expected in zip(found, updates, strict=True):
            assert isinstance(update, Tensor)
            torch.testing.assert_close(update.detach().flatten(), torch.tensor(expected, dtype=F64))
        for planes, expected_columns in zip(state.planes, columns, strict=True):
            torch.testing.assert_close(
                planes.reshape(len(planes), -1).T, torch.tensor(expected_columns, dtype=F64)
            )
        for tensor, expected in zip(state.tensors, tensors, strict=True):
            torch.testing.assert_close(tensor, torch.tensor(expected, dtype=F64))
        torch.testing.assert_close(state.hidden, torch.tensor(z, dtype=F64))
        grads = [torch.randn_like(grad) for grad in grads]


def test_published_sizes() -> None:
    rule = HierarchicalRule()
    assert (rule.num_meta_parameters, rule.state_planes) == (8349, 19)
    rule = HierarchicalRule(attention=True)
    assert (rule.num_meta_parameters, rule.state_planes) == (8363, 20)
    assert torch.equal(rule.attention_direction, rule.direction)
    assert torch.equal(rule.attention_shortcut, rule.shortcut)


@pytest.mark.parametrize("attention", [False, True])
def test_derivatives(attention: bool) -> None:
    rule = make(2, 3, 2, 2, attention=attention)
    grads, state = problem(rule, [(2,), (1, 2)])
    warm = rule.reference_step(grads, state)[1]
    inputs = [*grads, *warm.planes, *warm.tensors, warm.hidden, rule.flat_parameters()]

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        problem = ProblemState(list(tensors[2:4]), list(tensors[4:6]), [1, 1], tensors[6])
        updates, new = rule.reference_step(tensors[:2], problem, tensors[7])
        return (*(u for u in updates if u is not None), *new.planes, *new.tensors, new.hidden)

    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(run, leaves, atol=1e-5)


def test_clip_of_log_rates_lets_gradients_through() -> None:
    rule = make(2, 3, 2, 2)
    grads, state = problem(rule, [(3,)])
    state.planes[0][-1] = 50.0
    meta = rule.flat_parameters().detach().requires_grad_()
    updates, new = rule.reference_step(grads, state, meta)
    assert isinstance(updates[0], Tensor)
    assert float(updates[0].detach().abs().max()) < 10 * math.exp(33.0)
    (gradient,) = torch.autograd.grad(new.planes[0][-1].sum(), meta)
    assert float(rule.unflatten(gradient)["rate_bias"]) > 0.0


def test_tensors_without_gradient_or_elements_rest() -> None:
    rule = make(3, 2, 2, 2)
    grads, state = problem(rule, [(3,), (4,), (0,)])
    updates, new = rule.reference_step([grads[0], None, grads[2]], state)
    alone = ProblemState(state.planes[:1], state.tensors[:1], [0], state.hidden)
    own_updates, own = rule.reference_step(grads[:1], alone)
    assert updates[1] is None
    assert updates[2] is not None
    assert updates[2].shape == (0,)
    assert isinstance(updates[0], Tensor)
    assert isinstance(own_updates[0], Tensor)
    assert torch.equal(updates[0], own_updates[0])
    assert torch.equal(new.hidden, own.hidden)
    assert new.steps == [1, 0, 0]
    assert torch.equal(new.planes[1], state.planes[1])
    nothing, same = rule.reference_step([None, None, grads[2]], state)
    assert nothing[:2] == [None, None]
    assert torch.equal(same.hidden, state.hidden)


def test_a_tensor_that_joins_later_starts_without_averages() -> None:
    rule = make(3, 2, 2, 2)
    grads, state = problem(rule, [(3,), (4,)])
    _, state = rule.reference_step([grads[0], None], state)
    _, state = rule.reference_step(grads, state)
    averages = state.planes[1][rule.param_size : rule.param_size + rule.num_scales]
    assert torch.equal(averages, grads[1].expand_as(averages))
    assert state.steps == [2, 1]


def test_initial_rates_are_seeded_and_in_range() -> None:
    rule = HierarchicalRule()
    params = [torch.zeros(200, 5), torch.zeros(300)]
    first, again, other = (rule.init_problem(params, seed) for seed in (0, 0, 1))
    rates = torch.cat([planes[-1].flatten() for planes in first.planes])
    assert torch.equal(first.planes[0], again.planes[0])
    assert not torch.equal(first.planes[0], other.planes[0])
    assert float(rates.min()) >= math.log(1e-6)
    assert float(rates.max()) <= math.log(1e-2)
    for planes, tensor in zip(first.planes, first.tensors, strict=True):
        torch.testing.assert_close(tensor[-1], planes[-1].mean())


def test_initial_rates_are_between_the_rules_own() -> None:
    rule = HierarchicalRule(lowest_rate=1e-3, highest_rate=4e-3)
    state = rule.init_problem([torch.zeros(40)] * 50, seed=0)
    rates = torch.cat([planes[-1] for planes in state.planes])
    assert math.log(1e-3) <= float(rates.min()) < math.log(1.2e-3)
    assert math.log(3.3e-3) < float(rates.max()) <= math.log(4e-3)
    rule = HierarchicalRule(lowest_rate=3e-3, highest_rate=3e-3)
    first, other = (rule.init_problem([torch.zeros(3)], seed) for seed in (0, 1))
    assert torch.equal(first.planes[0], other.planes[0])
    torch.testing.assert_close(first.planes[0][-1], torch.full((3,), math.log(3e-3)))


def test_initialisation_is_seeded_and_as_published() -> None:
    rule, twin = HierarchicalRule(), HierarchicalRule()
    rule.reset_parameters(torch.Generator().manual_seed(1))
    twin.reset_parameters(torch.Generator().manual_seed(1))
    assert torch.equal(rule.flat_parameters(), twin.flat_parameters())
    for cell in (rule.param_gru, rule.tensor_gru, rule.global_gru):
        assert torch.equal(cell.gates_bias, torch.full_like(cell.gates_bias, 2.2))
        spread = float(cell.gates.detach().std())
        assert spread == pytest.approx(0.5 / math.sqrt(cell.gates.shape[1]), rel=0.1)
    scalars = ("square_decay_bias", "average_decay_bias", "rate_momentum", "log_rate_offset")
    values = [float(getattr(rule, name).detach()) for name in scalars]
    assert values == pytest.approx([3.2, 2.2, 3.2, -1.0])


def test_timescales_are_in_half_of_the_upper_levels_update_gates() -> None:
    rule, before = HierarchicalRule(), HierarchicalRule()
    for each in (rule, before):
        each.reset_parameters(torch.Generator().manual_seed(1))
    rule.draw_timescales(10.0, 1000.0, torch.Generator().manual_seed(2))
    memories = []
    for level in ("tensor_gru", "global_gru"):
        bias = getattr(rule, level).gates_bias.detach()
        memories.append(1 / (1 - bias[20:30].sigmoid()))
        bias[20:30] = getattr(before, level).gates_bias.detach()[20:30]
    kept = rule.rate_momentum.detach()
    torch.testing.assert_close(kept.sigmoid(), torch.tensor(0.999))  # log rates: `high` steps
    kept.copy_(before.rate_momentum.detach())
    assert torch.equal(rule.flat_parameters(), before.flat_parameters())
    steps = torch.cat(memories)
    assert 9.99 <= steps.min() < 50 < steps.log().mean().exp() < 200 < steps.max() <= 1001
    with pytest.raises(ValueError, match="at least low"):
        rule.draw_timescales(10.0, 5.0)


def test_a_pickle_from_before_rules_had_rates_of_their_own_has_the_published_ones() -> None:
    rule = HierarchicalRule(2, 2, 2)
    del vars(rule)["lowest_rate"], vars(rule)["highest_rate"]
    old = pickle.loads(pickle.dumps(rule))
    assert old.config() == HierarchicalRule(2, 2, 2).config()
    rates = old.init_problem([torch.zeros(50)], seed=0).planes[0][-1]
    assert math.log(1e-6) <= float(rates.min()) <= float(rates.max()) <= math.log(1e-2)


@pytest.mark.parametrize("rates", [{}, {"lowest_rate": 0.01, "highest_rate": 0.01}])
def test_file_copy_and_pickle_round_trips(rates: dict[str, float], tmp_path: Path) -> None:
    rule = HierarchicalRule(3, 4, 5, 2, **rates)
    rule.save(tmp_path / "rule.safetensors", {"task": "none"})
    loaded = fastl2o.load(tmp_path / "rule.safetensors")
    for twin in (loaded, copy.deepcopy(rule), pickle.loads(pickle.dumps(rule))):
        assert isinstance(twin, HierarchicalRule)
        assert twin.config() == rule.config()
        assert torch.equal(twin.flat_parameters(), rule.flat_parameters())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"param_size": 0}, "param_size"),
        ({"tensor_size": 65}, "tensor_size"),
        ({"global_size": 2.0}, "global_size"),
        ({"num_scales": 9}, "num_scales"),
        ({"lowest_rate": 0.0}, "lowest_rate: 0.0; pass a number from 4.7e-15 to 2.1e.14"),
        ({"lowest_rate": 0.1}, "highest_rate: 0.01; pass a number from lowest_rate = 0.1 to"),
        ({"highest_rate": math.inf}, "highest_rate: inf"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises((TypeError, ValueError), match=named):
        HierarchicalRule(**arguments)
