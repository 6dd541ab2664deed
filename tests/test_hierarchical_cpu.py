"""The hierarchical rule's C++ step against its plain-torch reference in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.hierarchical_cpu import (
    DEFAULT,
    ODD,
    SHAPES,
    SMALLEST,
    TOLERANCE,
    Problem,
    assert_close,
    assert_stepped,
    make_rule,
    needs_core,
    needs_ops,
    over_isa,
    reference,
    run_core,
    run_op,
    same_bits,
)


@needs_core
@over_isa
@pytest.mark.parametrize("sizes", [DEFAULT, ODD, SMALLEST], ids=["default", "odd", "smallest"])
@pytest.mark.parametrize("taken", [0, 2])
def test_a_step_is_the_reference_step(isa: str, sizes: tuple[int, ...], taken: int) -> None:
    rule = make_rule(sizes)
    before = Problem.make(rule, taken=taken)
    after = run_core(isa, rule, before)
    assert_stepped(rule, before, after, [grad.double() for grad in before.grads])


@needs_core
@over_isa
def test_thread_count_does_not_change_a_bit(isa: str) -> None:
    rule = make_rule()
    problem = Problem.make(rule, [(30000,), (3,), (5000,), *[(40,)] * 20])
    one = run_core(isa, rule, problem).tensors()
    for threads in (2, 3, 5):
        assert same_bits(one, run_core(isa, rule, problem, threads).tensors())


@needs_ops
def test_what_an_earlier_step_left_in_the_workspace_is_not_read() -> None:
    rule = make_rule()
    large = Problem.make(rule, [(9000,), (40,)], taken=0)
    for grad in large.grads:
        grad.fill_(float("nan"))
    run_op(rule, large, nonfinite=0)
    before = Problem.make(rule)
    after = before.clone()
    run_op(rule, after)
    assert_stepped(rule, before, after, [grad.double() for grad in before.grads])


@needs_ops
@pytest.mark.parametrize("planes", [torch.float32, torch.bfloat16])
def test_every_type_of_parameter(planes: torch.dtype) -> None:
    rule = make_rule()
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    shapes = [(65,), (130,), (2, 50), (49,)]
    before = Problem.make(rule, shapes, dtypes, planes)
    after = before.clone()
    count = len(shapes)
    run_op(rule, after, lr=[0.5] * count, weight_decay=[0.1] * count)
    assert_stepped(
        rule,
        before,
        after,
        [grad.double() for grad in before.grads],
        param_tolerance=2**-8,
        planes_tolerance=TOLERANCE if planes == torch.float32 else 2**-8,
        lr=0.5,
        weight_decay=0.1,
    )


@needs_ops
def test_a_float64_parameter_is_not_rounded_on_the_way() -> None:
    rule = make_rule()
    before = Problem.make(rule, [(65,)], [torch.float64])
    before.params[0] += 1e3
    after = before.clone()
    run_op(rule, after)
    update, _ = reference(rule, [before.grads[0]], before.problem_state())
    assert update[0] is not None
    assert_close(after.params[0] - before.params[0], update[0].detach(), 1e-5)


@needs_ops
def test_maximize_and_grad_scale() -> None:
    rule = make_rule()
    before = Problem.make(rule)
    after = before.clone()
    run_op(rule, after, maximize=True, grad_scale=torch.tensor(4.0))
    assert_stepped(rule, before, after, [-grad.double() / 4 for grad in before.grads])
    for grad, old in zip(after.grads, before.grads, strict=True):
        assert grad.equal(old / 4)


@needs_ops
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_skipped_tensor_rests_and_is_left_out_of_all_means(value: float) -> None:
    rule = make_rule()
    before = Problem.make(rule)
    before.grads[0][2, 1] = value
    after = before.clone()
    run_op(rule, after, nonfinite=1)
    assert_stepped(rule, before, after, [None, *(grad.double() for grad in before.grads[1:])])


@needs_ops
def test_a_bad_gradient_is_raised_and_nothing_changed() -> None:
    rule = make_rule()
    before = Problem.make(rule)
    before.grads[4][64] = float("inf")
    after = before.clone()
    with pytest.raises(RuntimeError, match="gradient 4 of the list holds NaN or Inf"):
        run_op(rule, after)
    assert same_bits(before.tensors(), after.tensors())


@needs_ops
def test_found_inf_changes_nothing() -> None:
    rule = make_rule()
    before = Problem.make(rule)
    after = before.clone()
    run_op(rule, after, found_inf=torch.ones(()), grad_scale=torch.tensor(2.0))
    assert same_bits(before.tensors(), after.tensors())


@needs_ops
def test_a_tensor_that_joins_later_starts_with_its_own_first_step() -> None:
    rule = make_rule()
    before = Problem.make(rule, [(65,), (7,)])
    fresh = Problem.make(rule, [(33,)], taken=0, seed=5)
    for name in ("params", "grads", "planes", "states", "steps"):
        getattr(before, name).extend(getattr(fresh, name))
    after = before.clone()
    run_op(rule, after)
    assert_stepped(rule, before, after, [grad.double() for grad in before.grads])
    assert [int(step) for step in after.steps] == [3, 3, 1]


@needs_ops
def test_two_problems_in_one_call_are_two_calls() -> None:
    rule = make_rule()
    parts = [Problem.make(rule, [(65,), (7,)]), Problem.make(rule, [(300,), (), (0,)], seed=1)]
    together = Problem(
        *(
            [tensor.clone() for pair in zip_longest_pairs(name, parts) for tensor in pair]
            for name in ("params", "grads", "planes", "states", "steps")
        ),
        torch.cat([part.hidden for part in parts] + [torch.full((1, 20), 3.0)]),
    )
    problems = [index for pair in zip_longest_pairs("params", parts, True) for index in pair]
    run_op(rule, together, problems=problems)
    for part in parts:
        run_op(rule, part)
    for index, part in enumerate(parts):
        own = [i for i, problem in enumerate(problems) if problem == index]
        for name in ("params", "planes", "states", "steps"):
            assert same_bits([getattr(together, name)[i] for i in own], getattr(part, name))
        assert same_bits([together.hidden[index]], [part.hidden[0]])
    assert together.hidden[2].eq(3.0).all()  # a problem without tensors keeps its state


def zip_longest_pairs(
    name: str, parts: Sequence[Problem], indices: bool = False
) -> list[list[Any]]:
    """The tensors of the problems in turn, or the problem each belongs to."""
    longest = max(len(part.params) for part in parts)
    return [
        [
            index if indices else getattr(part, name)[k]
            for index, part in enumerate(parts)
            if k < len(part.params)
        ]
        for k in range(longest)
    ]


@needs_ops
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": [1.0]}, "lr holds 1 numbers"),
        ({"problems": [1] * len(SHAPES)}, "global_states has 1 rows"),
        ({"problems": [0]}, "problems holds 1 numbers"),
        ({"meta": torch.zeros(5)}, "meta holds 5 numbers"),
        ({"nonfinite": 3}, "nonfinite is 3"),
        ({"num_scales": 9}, "num_scales is 9"),
        ({"global_states": torch.zeros(1, 3)}, "global_states must be"),
    ],
)
def test_wrong_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    rule = make_rule()
    before = Problem.make(rule, taken=0)
    after = before.clone()
    with pytest.raises(RuntimeError, match=message):
        run_op(rule, after, **changes)
    assert same_bits(before.tensors(), after.tensors())
