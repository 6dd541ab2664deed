"""The ops as torch sees them, and the in-place step: options, dtypes, errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import fastl2o
from fastl2o import _ops_reference, ops
from fastl2o._ops_families import FAMILIES
from fastl2o.rules import LSTMRule, RNNPropRule
from tests.common import (
    SMALL_RULE_CASES,
    Lists,
    RuleCase,
    assert_as_accurate,
    autograd_unroll,
    needs_cpu_kernels,
    over_backends,
    over_rules,
    over_small_rules,
    random_state,
    random_window,
    relative_error,
    same_bits,
    tricky_gradients,
)


@over_small_rules
def test_fakes_give_shapes_without_values(case: RuleCase) -> None:
    rule = case.make()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        grad = mode.from_tensor(torch.randn(4, 2))
        state = mode.from_tensor(torch.zeros(rule.state_planes, 4, 2))
        update, new_state = ops.step(rule, grad, state, 1)
        assert (update.shape, new_state.shape) == (grad.shape, state.shape)
        grads = mode.from_tensor(torch.randn(4, 2, 3))
        state = mode.from_tensor(torch.zeros(rule.state_planes, 2, 3))
        weights = mode.from_tensor(torch.ones(4, 2))
        family = FAMILIES[rule.family]
        taken = (0,) if rule.needs_step else ()
        meta = mode.from_tensor(rule.flat_parameters().detach())
        d_meta, d_state = family.unroll_backward(
            grads, state, *taken, meta, weights, 3, *family.arguments(rule), 1.0, 0.0
        )
        assert (d_meta.shape, d_state.shape) == (meta.shape, state.shape)


@over_small_rules
def test_default_implementation_runs_without_kernels(case: RuleCase) -> None:
    """What the dispatcher runs where there is no kernel is the reference, on the op's arguments."""
    rule = case.make(torch.float64)
    window = random_window(rule, steps=4, dtype=torch.float64)
    taken = (window.step,) if rule.needs_step else ()
    family = FAMILIES[rule.family]
    name = f"fastl2o::{rule.family}_unroll_backward"
    default = torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeExplicitAutograd")
    assert default
    fallback = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    result = family.unroll_backward.redispatch(
        fallback,
        window.grads,
        window.state,
        *taken,
        rule.flat_parameters().detach(),
        window.loss_weights,
        window.steps,
        *family.arguments(rule),
        0.7,
        0.1,
    )
    for ours, automatic in zip(
        result, autograd_unroll(rule, window, lr=0.7, weight_decay=0.1), strict=True
    ):
        assert relative_error(ours, automatic) < 1e-12


@over_backends
@over_rules
def test_step_in_place_equals_the_formula(case: RuleCase, backend: str) -> None:
    rule, exact_rule = case.make(), case.make(torch.float64)
    lists = Lists(rule, "mixed")
    before = Lists(rule, "mixed")
    with fastl2o.backend(backend):
        lists.run(rule, lr=0.5, weight_decay=0.1, maximize=True)
    for index, param in enumerate(before.params):
        outcomes = []
        for made, dtype in ((rule, torch.float32), (exact_rule, torch.float64)):
            grad, state = -before.grads[index].to(dtype), before.states[index].to(dtype)
            update, new_state = made.reference_step(grad, state, index)
            outcomes.append(((1 - 0.5 * 0.1) * param.to(dtype) + 0.5 * update, new_state))
        (plain, plain_state), (exact, exact_state) = outcomes
        assert_as_accurate(lists.params[index], plain, exact, f"parameter {index}")
        assert_as_accurate(lists.states[index], plain_state, exact_state, f"state {index}")
        assert lists.steps[index] == index + (1 if rule.needs_step else 0)


@over_backends
def test_learning_rate_zero_moves_the_state_only(backend: str) -> None:
    rule = LSTMRule(3, 2)
    lists = Lists(rule)
    params = [param.clone() for param in lists.params]
    with fastl2o.backend(backend):
        lists.run(rule, lr=0.0)
    assert same_bits(lists.params, params)
    assert not same_bits(lists.states[2:3], Lists(rule).states[2:3])


@over_backends
@over_small_rules
def test_grad_scale_is_taken_out_and_written_back(case: RuleCase, backend: str) -> None:
    rule = case.make()
    plain, scaled = Lists(rule), Lists(rule)
    scaled.grads = [4.0 * grad for grad in scaled.grads]
    with fastl2o.backend(backend):
        plain.run(rule)
        scaled.run(rule, grad_scale=torch.tensor([4.0]), found_inf=torch.tensor([0.0]))
    assert same_bits(plain.all(), scaled.all())


@over_backends
@over_small_rules
def test_found_inf_touches_nothing(case: RuleCase, backend: str) -> None:
    rule = case.make()
    lists = Lists(rule, "nonfinite")
    before = lists.copy()
    with fastl2o.backend(backend):
        lists.run(rule, grad_scale=torch.tensor([4.0]), found_inf=torch.tensor([1.0]))
    assert same_bits(lists.all(), before)


@over_backends
@over_small_rules
def test_nonfinite_raise_names_the_tensor_and_touches_nothing(case: RuleCase, backend: str) -> None:
    rule = case.make()
    lists = Lists(rule)
    lists.grads[6][2, 1] = -torch.inf
    before = lists.copy()
    with (
        fastl2o.backend(backend),
        pytest.raises(RuntimeError, match="gradient 6 of the list holds"),
    ):
        lists.run(rule)
    assert same_bits(lists.all(), before)


@over_backends
@over_small_rules
def test_nonfinite_skip_leaves_that_tensor_only(case: RuleCase, backend: str) -> None:
    rule = case.make()
    lists, clean = Lists(rule), Lists(rule)
    lists.grads[6][2, 1] = torch.nan
    before = Lists(rule)
    with fastl2o.backend(backend):
        lists.run(rule, nonfinite="skip")
        clean.run(rule)
    for name in ("params", "states", "steps"):
        left, right = getattr(lists, name), getattr(clean, name)
        assert same_bits(left[:6] + left[7:], right[:6] + right[7:]), name
        assert same_bits(left[6:7], getattr(before, name)[6:7]), name


@over_backends
def test_nonfinite_pass_feeds_it_to_the_rule(backend: str) -> None:
    rule = LSTMRule(3, 1)
    lists = Lists(rule)
    lists.grads[6][2, 1] = torch.nan
    with fastl2o.backend(backend):
        lists.run(rule, nonfinite="pass")
    assert torch.isnan(lists.params[6]).sum() == 1


@over_backends
def test_low_precision_and_double_parameters(backend: str) -> None:
    rule = LSTMRule(3, 2)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        lists, before = Lists(rule, dtype=dtype), Lists(rule, dtype=dtype)
        with fastl2o.backend(backend):
            lists.run(rule, lr=0.5)
        for index, param in enumerate(before.params):
            grad = before.grads[index].float()
            update, _ = rule.reference_step(grad, before.states[index])
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            expected = (param.to(wide) + 0.5 * update.to(wide)).detach()
            # A rounding of the update may tip the parameter's own: one unit in the last place.
            torch.testing.assert_close(
                lists.params[index], expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-7
            )


def test_reference_step_in_blocks_is_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = RNNPropRule(3, 1)
    whole, blocks = Lists(rule), Lists(rule)
    with fastl2o.backend("reference"):
        whole.run(rule)
        monkeypatch.setattr(_ops_reference, "STEP_BLOCK", 7)
        blocks.run(rule)
    for left, right in zip(whole.all(), blocks.all(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-7)


@over_backends
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12), seed=st.integers(0, 99))
def test_cutting_a_tensor_in_pieces_changes_nothing(
    backend: str, sizes: list[int], seed: int
) -> None:
    """The rule is coordinate-wise: only the gradient of a coordinate and its own state count."""
    rule = SMALL_RULE_CASES[0].make()
    generator = torch.Generator().manual_seed(seed)
    param = torch.randn(sum(sizes), generator=generator)
    grad = tricky_gradients("mixed", (sum(sizes),), generator)
    state = random_state(rule, (sum(sizes),), generator)
    pieces = [list(whole.clone().split(sizes)) for whole in (param, grad)]
    states = [piece.contiguous() for piece in state.clone().split(sizes, dim=1)]
    with fastl2o.backend(backend):
        ops.step_(rule, *pieces, states)
        ops.step_(rule, [param], [grad], [state])
    torch.testing.assert_close(torch.cat(pieces[0]), param, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(torch.cat(states, dim=1), state, rtol=1e-6, atol=1e-7)


def test_float64_state_runs_in_float64() -> None:
    rule = LSTMRule(3, 1).double()
    param, grad = torch.randn(9, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    state = rule.init_state(param, torch.float64)
    update, new_state = rule.reference_step(grad, state)
    expected = param + update.detach()
    ops.step_(rule, [param], [grad], [state])
    assert torch.equal(param, expected)
    assert torch.equal(state, new_state)


@over_backends
def test_autograd_notices_an_in_place_step(backend: str) -> None:
    rule = LSTMRule(3, 1)
    param = torch.randn(4, requires_grad=True)
    loss = (param * param).sum()
    with fastl2o.backend(backend):
        ops.step_(rule, [param], [torch.ones(4)], [rule.init_state(param)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@over_backends
def test_step_reads_the_meta_parameters_of_the_moment(backend: str) -> None:
    rule = LSTMRule.as_sgd(1.0, num_layers=0)
    param, grad = torch.zeros(2), torch.ones(2)
    with fastl2o.backend(backend):
        ops.step_(rule, [param], [grad], [rule.init_state(param)])
        rule.readout.weight.data.mul_(10.0)
        ops.step_(rule, [param], [grad], [rule.init_state(param)])
    assert param.tolist() == [-11.0, -11.0]


def test_bad_lists_and_options_are_named() -> None:
    rule, adam = LSTMRule(3, 1), RNNPropRule(3, 1)
    param, grad = torch.zeros(4), torch.ones(4)
    state, adam_state = rule.init_state(param), adam.init_state(param)
    with pytest.raises(ValueError, match="expected lists of one length, got 1, 2, 1"):
        ops.step_(rule, [param], [grad, grad], [state])
    with pytest.raises(ValueError, match="params, grads, states and steps"):
        ops.step_(adam, [param], [grad], [adam_state])
    with pytest.raises(
        ValueError, match=r"nonfinite: 'ignore'; pass one of 'pass', 'skip', 'raise'"
    ):
        ops.step_(rule, [param], [grad], [state], nonfinite="ignore")
    ops.step_(rule, [], [], [])
    assert not param.any()


@needs_cpu_kernels
@over_small_rules
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_list_has_the_bits_of_its_tensors_stepped_alone(case: RuleCase, threads: int) -> None:
    """Whichever tiles the coordinates share, on whichever thread."""
    rule, generator = case.make(), torch.Generator().manual_seed(0)
    sizes = (1, 47, 48, 0, 49, 100, 3, 96, 1000, 5, 5, 5, 130, 31, 32, 33, 0)
    params, grads = ([torch.randn(n, generator=generator) for n in sizes] for _ in range(2))
    states = [random_state(rule, (n,), generator) for n in sizes]
    alone = [[tensor.clone() for tensor in each] for each in (params, grads, states)]
    steps = [[torch.full((), 3.0) for _ in sizes] for _ in range(2)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ops.step_(rule, params, grads, states, steps[0])
    finally:
        torch.set_num_threads(before)
    for index in range(len(sizes)):
        ops.step_(rule, *([each[index]] for each in (*alone, steps[1])))
    assert same_bits([*params, *states, *steps[0]], [*alone[0], *alone[2], *steps[1]])


@over_backends
def test_bad_tensors_are_refused_and_nothing_changes(backend: str) -> None:
    rule = LSTMRule(3, 1)
    good, bad = Lists(rule), Lists(rule)
    before = good.copy()
    for part, tensor in (
        ("grads", torch.zeros(2, 3, 5)),
        ("grads", torch.zeros(2, 3, 4, dtype=torch.float64)),
        ("states", torch.zeros(5, 2, 3, 4)),
        ("params", torch.zeros(2, 3, 4, dtype=torch.int64)),
    ):
        setattr(bad, part, [*getattr(good, part)[:7], tensor, *getattr(good, part)[8:]])
        lists = [
            getattr(bad if name == part else good, name) for name in ("params", "grads", "states")
        ]
        with fastl2o.backend(backend), pytest.raises((ValueError, TypeError, RuntimeError)):
            ops.step_(rule, *lists)
        assert same_bits(good.all(), before)


@over_backends
@over_rules
def test_rows_of_meta_parameters_step_each_tensor_by_its_own(case: RuleCase, backend: str) -> None:
    rules = [case.make(seed=seed) for seed in range(3)]
    shapes = [(65,), (0,), (3, 5)]
    generator = torch.Generator().manual_seed(4)
    params = [torch.randn(shape, generator=generator) for shape in shapes]
    grads = [torch.randn(shape, generator=generator) for shape in shapes]
    states = [rule.init_state(p) for rule, p in zip(rules, params, strict=True)]
    steps = [torch.tensor(float(i)) for i in range(3)]
    own = [[t.clone() for t in tensors] for tensors in (params, states, steps)]
    meta = torch.stack([rule.flat_parameters().detach() for rule in rules])
    with fastl2o.backend(backend):
        ops.step_(rules[0], params, grads, states, steps, lr=0.5, nonfinite="pass", meta=meta)
        for i, rule in enumerate(rules):
            each = [[tensors[i]] for tensors in (own[0], grads, own[1], own[2])]
            ops.step_(rule, *each, lr=0.5, nonfinite="pass")
    for got, expected in zip((params, states, steps), own, strict=True):
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_meta_parameters_of_another_shape_are_refused() -> None:
    rule = fastl2o.LSTMRule(hidden_size=3, num_layers=1)
    params = [torch.ones(2), torch.ones(3)]
    before = [p.clone() for p in params]
    states = [rule.init_state(p) for p in params]
    rows = rule.flat_parameters().detach().repeat(3, 1)
    for meta, options, message in (
        (rows, {}, r"or \(2, 76\) with a row for each tensor, got \(3, 76\)"),
        (rows[0, :5], {}, r"meta: expected shape \(76,\)"),
        (rows[:2], {"nonfinite": "skip"}, "takes nonfinite='pass'"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.step_(rule, params, params, states, meta=meta, **{"nonfinite": "pass", **options})
    assert all(map(torch.equal, params, before))
