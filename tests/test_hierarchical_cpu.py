"""The hierarchical rule's C++ step against its plain-torch reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.common import needs_cpu_kernels
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
    run_core,
    run_op,
    same_bits,
)
from tests.test_cpu_kernels import over_isa
from tests.test_cpu_kernels import pytestmark as needs_core


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


@needs_cpu_kernels
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


@needs_cpu_kernels
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


@needs_cpu_kernels
def test_a_float64_parameter_is_not_rounded_on_the_way() -> None:
    rule = make_rule()
    before = Problem.make(rule, [(65,)], [torch.float64])
    before.params[0] += 1e3
    after = before.clone()
    run_op(rule, after)
    update, _ = rule.reference_step([before.grads[0]], before.problem_state())
    assert update[0] is not None
    assert_close(after.params[0] - before.params[0], update[0].detach(), 1e-5)


@needs_cpu_kernels
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


@needs_cpu_kernels
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
