"""The rules: values against torch.nn.LSTMCell and torch.optim, derivatives, sizes, bad input."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn

from fastl2o.rules import FAMILIES, LSTMRule, RNNPropRule, Rule, _cells, from_config
from tests.common import (
    GRADIENT_KINDS,
    RuleCase,
    over_rules,
    over_small_rules,
    random_state,
    relative_error,
    tricky_gradients,
)

ROUNDING = 1e-13  # of float64 after a few hundred operations


def torch_cells(rule: Rule) -> list[nn.LSTMCell]:
    """The rule's layers as torch modules."""
    cells = []
    for layer in rule.layers:
        width, hidden_size = layer.weight_ih.shape[1], layer.weight_hh.shape[1]
        cell = nn.LSTMCell(width, hidden_size, dtype=layer.bias.dtype)
        with torch.no_grad():
            cell.weight_ih.copy_(layer.weight_ih)
            cell.weight_hh.copy_(layer.weight_hh)
            cell.bias_ih.copy_(layer.bias)
            cell.bias_hh.zero_()
        cells.append(cell)
    return cells


def run_cells(rule: Rule, x: Tensor, planes: Tensor) -> tuple[Tensor, Tensor]:
    """The LSTM layers and the readout by torch.nn, on rows of inputs (N, in) and planes (S, N)."""
    hidden_size, after = rule.hidden_size, []
    for number, cell in enumerate(torch_cells(rule)):
        start = 2 * number * hidden_size
        h, c = planes[start : start + 2 * hidden_size].split(hidden_size)
        x, c = cell(x, (h.T, c.T))
        after += [x.T, c.T]
    output = nn.functional.linear(x, rule.readout.weight, rule.readout.bias).squeeze(1)
    return output, torch.cat(after) if after else planes


@over_rules
def test_step_equals_torch_lstm_cells(case: RuleCase) -> None:
    rule = case.make(torch.float64)
    generator = torch.Generator().manual_seed(1)
    grad = tricky_gradients("mixed", (41,), generator, torch.float64)
    state = random_state(rule, (41,), generator, torch.float64)
    update, new_state = rule.reference_step(grad, state, step=4)
    if isinstance(rule, LSTMRule):
        x = grad.unsqueeze(1)
        if rule.preprocess == "log_sign":
            x1 = torch.log(grad.abs() + rule.eps) / rule.p
            x = torch.stack((x1.clamp(min=-1), (math.exp(rule.p) * grad).clamp(-1, 1)), dim=1)
        output, expected_state = run_cells(rule, x, state)
        expected = rule.output_scale * output
    else:
        b1, b2 = rule.beta1, rule.beta2
        m = b1 * state[0] + (1 - b1) * grad
        v = b2 * state[1] + (1 - b2) * grad**2
        r = torch.sqrt(v / (1 - b2**5)) + 1e-8
        features = torch.stack((grad / r, m / (1 - b1**5) / r), dim=1)
        projection = rule.projection
        z = nn.functional.elu(nn.functional.linear(features, projection.weight, projection.bias))
        output, planes = run_cells(rule, z, state[2:])
        expected_state = torch.cat((torch.stack((m, v)), planes))
        expected = -rule.step_size * torch.tanh(output)
    assert relative_error(update, expected) < ROUNDING
    assert relative_error(new_state, expected_state) < ROUNDING


def test_published_sizes() -> None:
    assert (LSTMRule().num_meta_parameters, LSTMRule().state_planes) == (5141, 80)
    assert LSTMRule(preprocess="identity").num_meta_parameters == 5061
    assert (RNNPropRule().num_meta_parameters, RNNPropRule().state_planes) == (6641, 82)
    linear = LSTMRule(num_layers=0)
    assert (linear.num_meta_parameters, linear.state_planes) == (3, 0)


def test_flat_order_is_the_documented_one() -> None:
    names = [name for name, _ in RNNPropRule(num_layers=2).layout]
    layers = [f"layers.{k}.{part}" for k in (0, 1) for part in ("weight_ih", "weight_hh", "bias")]
    projection = ["projection.weight", "projection.bias"]
    assert names == [*projection, *layers, "readout.weight", "readout.bias"]
    assert [name for name, _ in LSTMRule().layout] == [*layers, "readout.weight", "readout.bias"]


@over_rules
def test_flat_vector_round_trip(case: RuleCase) -> None:
    rule = case.make()
    flat = rule.flat_parameters()
    assert flat.shape == (rule.num_meta_parameters,)
    parts = rule.unflatten(flat)
    for name, parameter in rule.named_parameters():
        assert torch.equal(parts[name], parameter)
    assert torch.equal(rule.flat_buffer(torch.device("cpu")), flat)
    grad = torch.randn(5)
    ours = rule.reference_step(grad, rule.init_state(grad))
    given = rule.reference_step(grad, rule.init_state(grad), 0, flat)
    assert torch.equal(ours[0], given[0])
    assert torch.equal(ours[1], given[1])


def test_flat_buffer_sees_writes_through_data() -> None:
    rule = LSTMRule(3, 1)
    first = rule.flat_buffer(torch.device("cpu"))
    rule.readout.bias.data.fill_(7.0)
    assert rule.flat_buffer(torch.device("cpu"))[-1] == 7.0
    assert rule.flat_buffer(torch.device("cpu")) is first
    rule.double()
    assert rule.flat_buffer(torch.device("cpu"), torch.float64).dtype == torch.float64
    rule.readout.bias = nn.Parameter(torch.tensor([9.0]))
    assert rule.flat_buffer(torch.device("cpu"))[-1] == 9.0


@over_small_rules
def test_gradcheck(case: RuleCase) -> None:
    rule = case.make(torch.float64)
    generator = torch.Generator().manual_seed(2)
    grad = tricky_gradients("normal", (3,), generator, torch.float64)
    grad[0] *= 1e-5  # the linear part of the preprocessing
    state = random_state(rule, (3,), generator, torch.float64).requires_grad_()
    meta = rule.flat_parameters().detach().requires_grad_()

    def run(grad: Tensor, state: Tensor, meta: Tensor) -> tuple[Tensor, Tensor]:
        return rule.reference_step(grad, state, 2, meta)

    assert torch.autograd.gradcheck(run, (grad.requires_grad_(), state, meta), eps=1e-7, atol=1e-5)


@over_rules
def test_hand_written_backward_equals_autograd(case: RuleCase) -> None:
    rule = case.make(torch.float64)
    generator = torch.Generator().manual_seed(3)
    grad = tricky_gradients("mixed", (23,), generator, torch.float64).requires_grad_()
    state = random_state(rule, (23,), generator, torch.float64)
    if rule.family == "rnnprop":
        state[:2, :11] = 0.0  # the first step, where zero gradients leave v at 0
    state.requires_grad_()
    meta = rule.flat_parameters().detach().requires_grad_()
    outputs = rule.reference_step(grad, state, 1, meta)
    upstream = [torch.randn_like(output) for output in outputs]
    automatic = torch.autograd.grad(outputs, (grad, state, meta), upstream, allow_unused=True)
    by_hand = rule.reference_backward(*upstream, grad.detach(), state.detach(), 1, meta.detach())
    for auto, hand in zip(automatic, by_hand, strict=True):
        expected = torch.zeros_like(hand) if auto is None else auto
        assert bool(torch.isfinite(hand).all())
        # Entry by entry: RNNprop's derivatives span 16 orders of magnitude.
        scale = float(hand.abs().max()) if hand.numel() else 0.0
        torch.testing.assert_close(hand, expected, rtol=1e-9, atol=1e-12 * scale)


def test_reference_step_can_be_differentiated_twice() -> None:
    rule = LSTMRule(2, 1, preprocess="identity").double()
    grad = torch.randn(3, dtype=torch.float64, requires_grad=True)
    state = rule.init_state(grad, torch.float64)
    assert torch.autograd.gradgradcheck(lambda g: rule.reference_step(g, state)[0], (grad,))


@pytest.mark.parametrize("kind", GRADIENT_KINDS)
@over_rules
def test_finite_gradients_give_finite_steps(case: RuleCase, kind: str) -> None:
    rule = case.make()
    grad = tricky_gradients(kind, (63,), torch.Generator().manual_seed(4)).requires_grad_()
    state = rule.init_state(grad)
    for step in range(3):
        update, state = rule.reference_step(grad, state, step)
    assert bool(torch.isfinite(update).all())
    assert bool(torch.isfinite(state).all())
    if isinstance(rule, RNNPropRule):
        assert float(update.detach().abs().max()) <= rule.step_size * (1 + 1e-6)
    # RNNprop's derivative at tiny gradients is 1e8: large, and still a number.
    update.sum().backward()
    assert grad.grad is not None
    assert bool(torch.isfinite(grad.grad).all())


@over_rules
def test_nan_gradients_stay_nan_and_stay_alone(case: RuleCase) -> None:
    rule = case.make()
    grad = torch.tensor([0.5, math.nan, -0.25])
    state = random_state(rule, (3,), torch.Generator().manual_seed(5))
    update, new_state = rule.reference_step(grad, state, 1)
    assert torch.isnan(update).tolist() == [False, True, False]
    assert not bool(torch.isnan(new_state[:, [0, 2]]).any())
    if rule.state_planes:
        assert bool(torch.isnan(new_state[:, 1]).any())


def test_published_preprocessing_variants_are_one_function() -> None:
    grad = tricky_gradients("mixed", (2000,), torch.Generator().manual_seed(6), torch.float64)
    for p, eps in ((10.0, 0.0), (5.0, 2.0**-23), (10.0, 1e-8)):
        x1, x2 = _cells.log_sign_features(grad, p, eps)
        large = grad.abs() >= math.exp(-p)
        safe = torch.where(large, grad.abs(), 1.0)
        two_case_x1 = torch.where(large, safe.log() / p, -1.0)
        two_case_x2 = torch.where(large, grad.sign(), math.exp(p) * grad)
        assert float((x1 - two_case_x1).abs().max()) <= eps / math.exp(-p) / p + 1e-15
        assert float((x2 - two_case_x2).abs().max()) <= 1e-15
    zero = torch.zeros(1)
    assert _cells.log_sign_features(zero, 10.0, 0.0).tolist() == [[-1.0], [0.0]]


@pytest.mark.parametrize("epsilon_dtype", [(1e-6, torch.float64), (1e-4, torch.float32)], ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_as_sgd_is_sgd(
    num_layers: int, momentum: float, epsilon_dtype: tuple[float, torch.dtype]
) -> None:
    epsilon, dtype = epsilon_dtype
    rule = LSTMRule.as_sgd(0.1, momentum, epsilon, num_layers=num_layers, dtype=dtype)
    param = torch.zeros(50, dtype=dtype, requires_grad=True)
    check_against(rule, torch.optim.SGD([param], lr=0.1, momentum=momentum), param, dtype)


def test_as_sgd_without_layers_is_sgd_to_the_last_bit() -> None:
    rule = LSTMRule.as_sgd(0.25, num_layers=0)
    grad = torch.randn(100)
    update, state = rule.reference_step(grad, rule.init_state(grad))
    assert torch.equal(update, -0.25 * grad)
    assert state.shape == (0, 100)


@pytest.mark.parametrize("epsilon_dtype", [(1e-6, torch.float64), (1e-4, torch.float32)], ids=str)
@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_as_adam_is_adam(num_layers: int, epsilon_dtype: tuple[float, torch.dtype]) -> None:
    epsilon, dtype = epsilon_dtype
    rule = RNNPropRule.as_adam(0.1, epsilon=epsilon, num_layers=num_layers, dtype=dtype)
    param = torch.zeros(50, dtype=dtype, requires_grad=True)
    adam = torch.optim.Adam([param], lr=0.1, betas=(0.95, 0.95), eps=1e-8)
    check_against(rule, adam, param, dtype)


def check_against(
    rule: Rule, optimizer: torch.optim.Optimizer, param: Tensor, dtype: torch.dtype
) -> None:
    """20 steps of N(0, 1) gradients through both; the limits are those of the construction."""
    ours, state = torch.zeros_like(param), rule.init_state(param, dtype)
    for step in range(20):
        param.grad = torch.randn(param.shape, dtype=torch.float64).to(dtype)
        update, state = rule.reference_step(param.grad, state, step)
        ours = (ours + update).detach()
        optimizer.step()
    limit = 1e-9 if dtype == torch.float64 else 3e-6
    assert relative_error(ours, param.detach()) < limit


def test_step_number_may_be_a_tensor() -> None:
    rule = RNNPropRule(3, 1)
    grad = torch.randn(5)
    state = random_state(rule, (5,), torch.Generator().manual_seed(7))
    for step in (0, 1, 999, 10_000):
        number = rule.reference_step(grad, state, step)
        tensor = rule.reference_step(grad, state, torch.tensor(float(step)))
        torch.testing.assert_close(number, tensor, rtol=1e-6, atol=1e-8)


def test_low_precision_inputs_are_computed_in_float32() -> None:
    rule = LSTMRule(4, 1)
    grad = torch.randn(7).bfloat16()
    state = random_state(rule, (7,), torch.Generator().manual_seed(8), torch.bfloat16)
    update, new_state = rule.reference_step(grad, state)
    exact, exact_state = rule.reference_step(grad.float(), state.float())
    assert update.dtype == torch.float32
    assert torch.equal(update, exact)
    assert torch.equal(new_state, exact_state.bfloat16())


@over_rules
def test_config_copies_and_pickles(case: RuleCase) -> None:
    rule = case.make()
    rule.flat_buffer(torch.device("cpu"))
    twin = from_config(rule.family, rule.config())
    assert twin.config() == rule.config()
    assert repr(twin) == repr(rule)
    assert (
        eval(repr(rule), {cls.__name__: cls for cls in FAMILIES.values()}).config() == rule.config()
    )
    for made in (copy.deepcopy(rule), pickle.loads(pickle.dumps(rule))):
        assert torch.equal(made.flat_parameters(), rule.flat_parameters())
        with torch.no_grad():
            made.readout.bias.add_(1.0)
        before, after = rule.flat_buffer(torch.device("cpu")), made.flat_buffer(torch.device("cpu"))
        assert after[-1] == before[-1] + 1.0


@pytest.mark.parametrize("family", ["lstm", "rnnprop"])
def test_initialisation_is_seeded_and_as_published(family: str) -> None:
    rule, twin = FAMILIES[family](), FAMILIES[family]()
    rule.reset_parameters(torch.Generator().manual_seed(1))
    twin.reset_parameters(torch.Generator().manual_seed(1))
    assert torch.equal(rule.flat_parameters(), twin.flat_parameters())
    layer = rule.layers[1]
    forget = layer.bias.detach()[20:40].mean()
    assert abs(float(forget) - 1.0) < 0.15
    # Both publications draw the gates with this spread; truncation at two sd takes 12 % off.
    assert float(layer.weight_ih.detach().std()) == pytest.approx(1 / math.sqrt(40), rel=0.2)


@pytest.mark.parametrize("family", ["lstm", "rnnprop"])
def test_timescales_are_in_half_of_the_gates(family: str) -> None:
    rule, before = FAMILIES[family](), FAMILIES[family]()
    for each in (rule, before):
        each.reset_parameters(torch.Generator().manual_seed(1))
    rule.draw_timescales(10.0, 1000.0, torch.Generator().manual_seed(2))
    memories = []
    for layer, as_drawn in zip(rule.layers, before.layers, strict=True):
        enter, forget = layer.bias.detach().sigmoid().chunk(4)[:2]
        memories.append(1 / (1 - forget[:10]))
        # What is kept and what is let in add up to 1: an average.
        torch.testing.assert_close(enter[:10] + forget[:10], torch.ones(10))
        assert torch.equal(layer.bias[30:], as_drawn.bias[30:])
        assert torch.equal(layer.bias[10:20], as_drawn.bias[10:20])
        assert torch.equal(layer.weight_ih, as_drawn.weight_ih)
    steps = torch.cat(memories)
    assert steps.min() >= 9.99
    assert steps.max() <= 1001
    assert 50 < steps.log().mean().exp() < 200  # log-uniform: about 100
    with pytest.raises(ValueError, match="low"):
        rule.draw_timescales(1.0, 10.0)
    with pytest.raises(ValueError, match="at least low"):
        rule.draw_timescales(10.0, 5.0)


def test_a_family_without_memories_refuses_timescales() -> None:
    with pytest.raises(ValueError, match="'hierarchical' has no units with memories to draw"):
        Rule.draw_timescales(FAMILIES["hierarchical"](), 2.0, 3.0)


BAD_ARGUMENTS = [
    (LSTMRule, {"hidden_size": 0}, ValueError, "hidden_size"),
    (LSTMRule, {"hidden_size": 65}, ValueError, "hidden_size"),
    (LSTMRule, {"hidden_size": 20.0}, TypeError, "hidden_size"),
    (LSTMRule, {"hidden_size": True}, TypeError, "hidden_size"),
    (LSTMRule, {"num_layers": 4}, ValueError, "num_layers"),
    (LSTMRule, {"num_layers": -1}, ValueError, "num_layers"),
    (LSTMRule, {"preprocess": "log"}, ValueError, "preprocess"),
    (LSTMRule, {"p": 0.0}, ValueError, "p:"),
    (LSTMRule, {"p": 81.0}, ValueError, "p:"),
    (LSTMRule, {"p": "10"}, TypeError, "p:"),
    (LSTMRule, {"eps": -1e-8}, ValueError, "eps"),
    (LSTMRule, {"output_scale": math.nan}, ValueError, "output_scale"),
    (LSTMRule, {"output_scale": math.inf}, ValueError, "output_scale"),
    (RNNPropRule, {"num_layers": 0}, ValueError, "num_layers"),
    (RNNPropRule, {"beta1": 1.0}, ValueError, "beta1"),
    (RNNPropRule, {"beta2": -0.1}, ValueError, "beta2"),
    (RNNPropRule, {"step_size": 0.0}, ValueError, "step_size"),
]


@pytest.mark.parametrize(("cls", "arguments", "error", "name"), BAD_ARGUMENTS, ids=str)
def test_bad_arguments_are_named(
    cls: type[Rule], arguments: dict[str, object], error: type[Exception], name: str
) -> None:
    with pytest.raises(error, match=name):
        cls(**arguments)


def test_bad_inputs_of_a_step_are_named() -> None:
    rule, grad = LSTMRule(3, 1), torch.randn(4)
    state = rule.init_state(grad)
    with pytest.raises(ValueError, match=r"state: expected shape \(6, 4\)"):
        rule.reference_step(grad, state[1:])
    with pytest.raises(TypeError, match="view_as_real"):
        rule.reference_step(grad.to(torch.complex64), state)
    with pytest.raises(ValueError, match="flat: expected shape"):
        rule.reference_step(grad, state, 0, torch.zeros(3))
    with pytest.raises(ValueError, match="unknown sizes"):
        from_config("lstm", {"sizes": 3})
    with pytest.raises(ValueError, match="this version knows hierarchical, lstm, rnnprop"):
        from_config("gru", {})
    with pytest.raises(ValueError, match="momentum"):
        LSTMRule.as_sgd(0.1, momentum=0.9, num_layers=0)
