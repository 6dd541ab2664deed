"""The hierarchical rule's ops on every backend: the in-place step of problems, and windows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastl2o
from fastl2o import HierarchicalRule, ops
from fastl2o import _ops_hierarchical as hierarchical
from fastl2o.rules.hierarchical import ProblemState
from tests.common import over_backends
from tests.test_hierarchical_rule import F64, detached, make

SHAPES: list[tuple[int, ...]] = [(5, 3), (), (0,), (65,), (1,), (7, 0, 2), (300,)]
RULES = [(10, 20, 20, 4), (7, 9, 11, 3), (1, 2, 1, 1)]


class Problem:
    """Tensors in the layout of the list op, and the same in float64."""

    def __init__(
        self,
        rule: HierarchicalRule,
        shapes: list[tuple[int, ...]],
        dtype: torch.dtype = torch.float32,
        state_dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.params = [torch.randn(s, generator=self.generator).to(dtype) for s in shapes]
        state = rule.init_problem(self.params, seed, state_dtype)
        self.planes, self.tensors = state.planes, state.tensors
        self.steps = [torch.zeros(()) for _ in shapes]
        self.hidden = state.hidden.unsqueeze(0)

    def draw(self) -> list[Tensor]:
        """Gradients whose size differs from tensor to tensor."""
        drawn = [torch.randn(p.shape, generator=self.generator) for p in self.params]
        scales = 10.0 ** torch.randn(len(drawn), generator=self.generator)
        return [(g * s).to(p.dtype) for g, s, p in zip(drawn, scales, self.params, strict=True)]

    def wide(self) -> tuple[list[Tensor], ProblemState]:
        """Parameters and state in float64."""
        return [p.double() for p in self.params], ProblemState(
            [p.double() for p in self.planes],
            [t.double() for t in self.tensors],
            [int(step) for step in self.steps],
            self.hidden[0].double(),
        )

    def everything(self) -> list[Tensor]:
        """All tensors that a step may change."""
        return [*self.params, *self.planes, *self.tensors, *self.steps, self.hidden]

    def step(self, rule: HierarchicalRule, grads: list[Tensor], **options: Any) -> None:
        """One step by the op, lr 1 and no decay unless given."""
        count = len(self.params)
        given: dict[str, Any] = {"lr": [1.0] * count, "weight_decay": [0.0] * count, **options}
        hierarchical.step_(
            rule, self.params, grads, self.planes, self.tensors, self.steps, self.hidden, **given
        )


def close(found: Tensor, expected: Tensor, scale: float = 1e-5) -> None:
    """Within `scale` of the largest number."""
    assert found.shape == expected.shape
    if expected.numel():
        size = float(expected.abs().max())
        assert float((found.double() - expected).abs().max()) <= scale * (size + 1e-30)


@over_backends
@pytest.mark.parametrize("sizes", RULES, ids=str)
def test_steps_are_the_reference_in_float64(sizes: tuple[int, ...], backend: str) -> None:
    rule = make(*sizes, dtype=torch.float32)
    twin = make(*sizes)
    mine = Problem(rule, SHAPES)
    lr, decay = [0.5 + 0.1 * i for i in range(7)], [0.1 * i for i in range(7)]
    params, state = mine.wide()
    for _ in range(4):
        grads = mine.draw()
        with fastl2o.backend(backend):
            mine.step(rule, grads, lr=lr, weight_decay=decay)
        updates, state = twin.reference_step([g.double() for g in grads], state)
        state = detached(state)
        for i, update in enumerate(updates):
            assert update is not None
            params[i] = (1 - lr[i] * decay[i]) * params[i] + lr[i] * update.detach()
    for found, expected in zip(mine.params, params, strict=True):
        close(found, expected)
    for found, expected in zip(mine.planes, state.planes, strict=True):
        close(found, expected)
    for found, expected in zip(mine.tensors, state.tensors, strict=True):
        close(found, expected)
    close(mine.hidden[0], state.hidden)
    assert [int(step) for step in mine.steps] == state.steps


def problems_are_apart(backend: str) -> None:
    """Two problems in one call against each in a call of its own."""
    rule = make(3, 4, 5, 2, dtype=torch.float32)
    both = [Problem(rule, [(40,), (3, 5)], seed=seed) for seed in (1, 2)]
    alone = [Problem(rule, [(40,), (3, 5)], seed=seed) for seed in (1, 2)]
    unused = torch.full((1, 5), 3.0)  # a problem without tensors keeps its state
    hidden = torch.cat([*(problem.hidden for problem in both), unused])
    with fastl2o.backend(backend):
        for _ in range(3):
            grads = [problem.draw() for problem in both]
            lists = [
                [tensor for problem in both for tensor in getattr(problem, name)]
                for name in ("planes", "tensors", "steps")
            ]
            params = [param for problem in both for param in problem.params]
            hierarchical.step_(
                rule, params, [*grads[0], *grads[1]], *lists, hidden,
                problems=[0, 0, 1, 1], lr=[1.0] * 4, weight_decay=[0.0] * 4,
            )  # fmt: skip
            for problem, own in zip(alone, grads, strict=True):
                problem.step(rule, own)
    for first, second in zip(both, alone, strict=True):
        for a, b in zip(first.everything()[:-1], second.everything()[:-1], strict=True):
            assert torch.equal(a, b)
    assert torch.equal(hidden, torch.cat([*(problem.hidden for problem in alone), unused]))


@over_backends
def test_problems_of_one_call_are_apart(backend: str) -> None:
    problems_are_apart(backend)


def skipped_tensors_rest(backend: str) -> None:
    """A call that skips a tensor against one without it."""
    rule = make(3, 4, 5, 2, dtype=torch.float32)
    mine, alone = Problem(rule, [(9,), (33,)]), Problem(rule, [(9,)])
    grads = mine.draw()
    grads[1][7] = torch.nan
    before = [t.clone() for t in (mine.params[1], mine.planes[1], mine.tensors[1], mine.steps[1])]
    alone.planes[0].copy_(mine.planes[0])
    alone.tensors[0].copy_(mine.tensors[0])
    alone.params[0].copy_(mine.params[0])
    with fastl2o.backend(backend):
        mine.step(rule, grads, nonfinite="skip")
        alone.step(rule, grads[:1])
    after = (mine.params[1], mine.planes[1], mine.tensors[1], mine.steps[1])
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(mine.params[0], alone.params[0])
    assert torch.equal(mine.hidden, alone.hidden)


@over_backends
def test_skipped_tensors_take_no_part(backend: str) -> None:
    skipped_tensors_rest(backend)


@over_backends
def test_calls_that_raise_or_found_inf_change_nothing(backend: str) -> None:
    rule = make(3, 4, 5, 2, dtype=torch.float32)
    mine = Problem(rule, [(9,), (33,)])
    grads = mine.draw()
    before = [tensor.clone() for tensor in mine.everything()]
    with fastl2o.backend(backend):
        mine.step(rule, grads, found_inf=torch.ones(()))
        grads[1][7] = torch.inf
        with pytest.raises(RuntimeError, match="gradient 1 of the list holds NaN or Inf"):
            mine.step(rule, grads)
        for wrong in (
            {"problems": [0, 1]},
            {"problems": [0]},
            {"lr": [1.0]},
        ):
            with pytest.raises((ValueError, RuntimeError), match=r"problems|lr|lists"):
                mine.step(rule, mine.draw(), **wrong)
        mine.tensors[1] = mine.tensors[1][:-1].clone()
        before[5] = before[5][:-1]
        with pytest.raises((ValueError, RuntimeError), match=r"tensor.state"):
            mine.step(rule, mine.draw())
    assert all(torch.equal(a, b) for a, b in zip(before, mine.everything(), strict=True))


@over_backends
def test_scaled_and_negated_gradients(backend: str) -> None:
    rule = make(3, 4, 5, 2, dtype=torch.float32)
    mine, plain = Problem(rule, [(9,), (33,)]), Problem(rule, [(9,), (33,)])
    grads = mine.draw()
    scaled = [grad * 8 for grad in grads]
    with fastl2o.backend(backend):
        mine.step(rule, scaled, grad_scale=torch.tensor(8.0), maximize=True)
        plain.step(rule, [-grad for grad in grads])
    for a, b in zip([*mine.everything(), *scaled], [*plain.everything(), *grads], strict=True):
        assert torch.equal(a, b)


@over_backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype: torch.dtype, backend: str) -> None:
    rule = make(3, 4, 5, 2, dtype=torch.float32)
    state_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    mine = Problem(rule, [(9,), (33,)], dtype, state_dtype)
    twin = Problem(rule, [(9,), (33,)], torch.float32, state_dtype)
    before = [param.clone() for param in mine.params]
    twin.params = [param.float() for param in mine.params]
    grads = mine.draw()
    with fastl2o.backend(backend):
        mine.step(rule, grads, lr=[1000.0] * 2)
        twin.step(rule, [grad.float() for grad in grads], lr=[1000.0] * 2)
    for a, b, start in zip(mine.params, twin.params, before, strict=True):
        assert not torch.equal(a, start)
        torch.testing.assert_close(a.float(), b.to(dtype).float())
    for a, b in zip(mine.planes, twin.planes, strict=True):
        assert a.dtype == state_dtype
        torch.testing.assert_close(a, b)


@over_backends
@pytest.mark.parametrize(("steps", "last"), [(1, True), (5, True), (5, False)])
@pytest.mark.parametrize("first", [0, 3])
def test_window_gradient_is_that_of_autograd_in_float64(
    steps: int, last: bool, first: int, backend: str
) -> None:
    window_gradient_is_that_of_autograd(steps, last, first, backend)


@over_backends
def test_given_gradients_of_the_updates_take_the_weights_place(backend: str) -> None:
    window_gradient_is_that_of_autograd(5, False, 3, backend, given=True)


def test_window_gradient_with_attention_is_that_of_autograd_in_float64() -> None:
    window_gradient_is_that_of_autograd(4, True, 3, "auto", attention=True)


def window_gradient_is_that_of_autograd(
    steps: int,
    last: bool,
    first: int,
    backend: str,
    attention: bool = False,
    given: bool = False,
) -> None:
    rule, twin = (
        make(4, 5, 6, 3, dtype=dtype, attention=attention) for dtype in (torch.float32, F64)
    )
    sizes, runs = (5, 0, 33, 1), 2
    generator = torch.Generator().manual_seed(steps)
    params = torch.randn(runs, sum(sizes), generator=generator)
    count = steps + 1 if last else steps
    grads = torch.randn(count, *params.shape, generator=generator)
    weights = torch.rand(count, runs, generator=generator)
    state = rule.init_runs(params, sizes, generator)
    if first:  # averages as steps leave them behind
        for t in range(first):
            hierarchical.runs_step_(rule, params, grads[0] * (t + 1), state, t, sizes, 1.0, 0.0)
    lr, decay = 0.7, 0.1
    upstream = torch.randn(steps, *params.shape, generator=generator) if given else None
    with fastl2o.backend(backend):
        d_meta, d_state = ops.unroll_backward(
            rule, grads, state, None if given else weights, steps=steps, step=first, sizes=sizes,
            lr=lr, weight_decay=decay, d_updates=upstream,
        )  # fmt: skip
    leaves = (
        twin.flat_parameters().detach().requires_grad_(),
        state.double().requires_grad_(),
    )
    moved, inner = torch.zeros_like(params, dtype=F64), leaves[1]
    total = torch.zeros((), dtype=F64)
    for t in range(steps):
        update, inner = twin.reference_runs_step(
            grads[t].double(), inner, first + t, sizes, leaves[0]
        )
        moved = (1 - lr * decay) * moved + lr * update
        if upstream is not None:
            total = total + (upstream[t].double() * update).sum()
        elif t + 1 < count:
            value = (grads[t + 1].double() * moved).sum(dim=1)
            total = total + (weights[t + 1].double() * value).sum()
    expected = torch.autograd.grad(total, leaves)
    for found, wanted in zip((d_meta, d_state), expected, strict=True):
        assert found.dtype == torch.float32
        error = (found.double() - wanted).norm()
        assert float(error) <= 1e-5 * float(wanted.norm()) + 1e-30


def test_window_arguments_are_checked() -> None:
    rule = make(3, 4, 5, 2, dtype=torch.float32)
    grads, weights = torch.randn(4, 2, 7), torch.ones(4, 2)
    state = rule.init_runs(grads[0], (3, 4))
    with pytest.raises(ValueError, match="sizes"):
        ops.unroll_backward(rule, grads, state, weights, steps=3, sizes=(3, 3))
    with pytest.raises(ValueError, match="init_runs"):
        ops.unroll_backward(rule, grads, state, weights, steps=3)
    with pytest.raises(TypeError, match="coordinate-wise"):
        ops.step(rule, grads[0], state)  # type: ignore[arg-type]


@over_backends
@pytest.mark.parametrize("sizes", RULES, ids=str)
def test_rows_of_meta_parameters_step_each_problem_by_its_own(
    sizes: tuple[int, int, int, int], backend: str
) -> None:
    rules = [make(*sizes, dtype=torch.float32, seed=seed) for seed in range(3)]
    problems = [Problem(rule, SHAPES[:4], seed=seed) for seed, rule in enumerate(rules)]
    together = [Problem(rule, SHAPES[:4], seed=seed) for seed, rule in enumerate(rules)]
    grads = [problem.draw() for problem in problems]
    meta_rows = torch.stack([rule.flat_parameters().detach() for rule in rules])
    hidden = torch.cat([problem.hidden for problem in together])
    count = 4 * len(rules)
    with fastl2o.backend(backend):
        hierarchical.step_(
            rules[0],
            [p for problem in together for p in problem.params],
            [grad for own in grads for grad in own],
            [p for problem in together for p in problem.planes],
            [t for problem in together for t in problem.tensors],
            [step for problem in together for step in problem.steps],
            hidden,
            problems=[number for number in range(len(rules)) for _ in range(4)],
            lr=[1.0] * count,
            weight_decay=[0.0] * count,
            meta=meta_rows,
        )
        for problem, rule, own in zip(problems, rules, grads, strict=True):
            problem.step(rule, own)
    for number, (alone, other) in enumerate(zip(problems, together, strict=True)):
        other.hidden = hidden[number : number + 1]
        # torch's matrix products round by where in memory their rows begin
        exactly = {} if backend == "reference" else {"rtol": 0, "atol": 0}
        for one, two in zip(alone.everything(), other.everything(), strict=True):
            torch.testing.assert_close(one, two, **exactly)


def refused_rows_change_nothing(backend: str) -> None:
    """A call with meta-parameters for each problem whose second problem's gradients hold NaN."""
    rule = make(3, 4, 5, 2, dtype=torch.float32)
    problems = [Problem(rule, [(9,), (33,)], seed=seed) for seed in (1, 2)]
    hidden = torch.cat([problem.hidden for problem in problems])
    mine = [tensor for problem in problems for tensor in problem.everything()[:-1]] + [hidden]
    # in the caller's order, which need not be that of the problems
    order = [(1, 0), (0, 0), (1, 1), (0, 1)]
    lists = [
        [getattr(problems[number], name)[index] for number, index in order]
        for name in ("params", "planes", "tensors", "steps")
    ]
    grads = [torch.ones_like(param) for param in lists[0]]
    grads[2][7] = torch.nan
    before = [tensor.clone() for tensor in mine]

    def step(**options: Any) -> None:
        hierarchical.step_(
            rule, lists[0], grads, *lists[1:], hidden, problems=[1, 0, 1, 0], lr=[1.0] * 4,
            weight_decay=[0.0] * 4, meta=rule.flat_parameters().detach().repeat(2, 1), **options,
        )  # fmt: skip

    with fastl2o.backend(backend):
        step(found_inf=torch.ones(()))
        with pytest.raises(RuntimeError, match="gradient 2 of the list holds NaN or Inf"):
            step()
    assert all(torch.equal(a, b) for a, b in zip(before, mine, strict=True))


@over_backends
def test_rows_of_meta_parameters_refused_change_nothing(backend: str) -> None:
    refused_rows_change_nothing(backend)
