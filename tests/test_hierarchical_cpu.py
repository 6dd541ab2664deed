"""The hierarchical rule's C++ kernels against its plain-torch reference in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastl2o.ops  # noqa: F401  (loads the ops)
from fastl2o import backends
from fastl2o.rules.hierarchical import HierarchicalRule, ProblemState
from tests.test_cpu_kernels import core

needs_core = pytest.mark.skipif(core is None, reason="fastl2o_core is not built: run `make build`")
needs_ops = pytest.mark.skipif(
    "cpu" not in backends.available(), reason="fastl2o._C is not built: run `make build`"
)
over_isa = pytest.mark.parametrize("isa", core.instruction_sets() if core else ["baseline"])

DEFAULT, ODD, SMALLEST = (10, 20, 20, 4), (7, 9, 11, 3), (1, 1, 1, 1)
SHAPES = ((5, 3), (7,), (), (0,), (65,), (2049,), (1,))
TOLERANCE = 1e-5  # of the largest number of a tensor, of the norm of a gradient


def make_rule(sizes: Sequence[int] = DEFAULT, seed: int = 0) -> HierarchicalRule:
    """A rule in float64 that float32 holds exactly, none of whose readouts is zero."""
    rule = HierarchicalRule(*sizes)
    generator = torch.Generator().manual_seed(seed)
    rule.reset_parameters(generator)
    with torch.no_grad():
        rule.rate.normal_(0.0, 0.1, generator=generator)
        rule.rate_bias.fill_(0.01)
    return rule.double()


def reference(
    rule: HierarchicalRule, grads: Sequence[Tensor | None], state: ProblemState
) -> tuple[list[Tensor | None], ProblemState]:
    """The specification's step."""
    return rule.reference_step(grads, state)


@dataclass
class Problem:
    """Parameters, gradients and float32 state of one problem, as the op takes them."""

    params: list[Tensor]
    grads: list[Tensor]
    planes: list[Tensor]
    states: list[Tensor]
    steps: list[Tensor]
    hidden: Tensor  # (1, global_size)

    @classmethod
    def make(
        cls,
        rule: HierarchicalRule,
        shapes: Sequence[tuple[int, ...]] = SHAPES,
        dtypes: Sequence[torch.dtype] = (torch.float32,),
        planes: torch.dtype = torch.float32,
        taken: int = 2,
        seed: int = 0,
    ) -> Problem:
        """A problem some way into its run: `taken` steps of the reference."""
        generator = torch.Generator().manual_seed(seed)
        params = [torch.randn(shape, generator=generator) for shape in shapes]
        state = rule.init_problem(params, seed, torch.float64)
        for _ in range(taken):
            with torch.no_grad():
                grads = [random_grad(param, generator) for param in params]
                _, state = reference(rule, [grad.double() for grad in grads], state)
        stored = [plane.to(planes) for plane in state.planes]
        own = [tensor.float() for tensor in state.tensors]
        for tensor, plane in zip(own, stored, strict=True):
            if plane.numel():
                tensor[-1] = plane[-1].double().mean()
        typed = [param.to(dtypes[i % len(dtypes)]) for i, param in enumerate(params)]
        return cls(
            typed,
            [random_grad(param, generator).to(param.dtype) for param in typed],
            stored,
            own,
            [torch.tensor(float(step)) for step in state.steps],
            state.hidden.float()[None],
        )

    def clone(self) -> Problem:
        lists = (self.params, self.grads, self.planes, self.states, self.steps)
        return Problem(*([t.clone() for t in part] for part in lists), self.hidden.clone())

    def tensors(self) -> list[Tensor]:
        return [
            *self.params, *self.grads, *self.planes, *self.states, *self.steps, self.hidden
        ]  # fmt: skip

    def problem_state(self) -> ProblemState:
        """The same state in float64, for the reference."""
        return ProblemState(
            [plane.double() for plane in self.planes],
            [tensor.double() for tensor in self.states],
            [int(step) for step in self.steps],
            self.hidden[0].double(),
        )


def random_grad(param: Tensor, generator: torch.Generator) -> Tensor:
    scale = 10.0 ** float(torch.randn((), generator=generator))
    return scale * torch.randn(param.shape, generator=generator)


def run_op(rule: HierarchicalRule, problem: Problem, **changes: Any) -> None:
    """The in-place op on the CPU kernels, whatever backend is the default."""
    count = len(problem.params)
    arguments: dict[str, Any] = dict(
        params=problem.params,
        grads=problem.grads,
        planes=problem.planes,
        tensor_states=problem.states,
        steps=problem.steps,
        global_states=problem.hidden,
        problems=[],
        meta=rule.flat_parameters().detach().float(),
        **rule.config(),
        lr=[1.0] * count,
        weight_decay=[0.0] * count,
        maximize=False,
        nonfinite=2,
    )
    torch.ops.fastl2o.hierarchical_step_(**(arguments | changes))


def run_core(isa: str, rule: HierarchicalRule, problem: Problem, threads: int = 1) -> Problem:
    """One step of the binding, which works in place on float32 arrays."""
    new = problem.clone()
    states = np.stack([tensor.numpy() for tensor in new.states])
    steps = np.array([float(step) for step in new.steps], np.float32)
    meta = rule.flat_parameters().detach().float().numpy()
    arrays = ([t.numpy() for t in part] for part in (new.params, new.grads, new.planes))
    core.hierarchical_step(
        isa,
        list(rule.config().values()),
        meta,
        *arrays,
        states,
        steps,
        new.hidden.numpy(),
        [0] * len(new.params),
        threads=threads,
    )
    new.states = list(torch.from_numpy(states))
    new.steps = list(torch.from_numpy(steps))
    return new


def assert_close(result: Tensor, exact: Tensor, tolerance: float = TOLERANCE) -> None:
    if exact.numel():
        error = (result.double() - exact).abs().max()
        assert float(error) <= tolerance * float(exact.abs().max()) + 1e-30


def assert_stepped(
    rule: HierarchicalRule,
    before: Problem,
    after: Problem,
    grads: Sequence[Tensor | None],
    *,
    param_tolerance: float = TOLERANCE,
    planes_tolerance: float = TOLERANCE,
    lr: float = 1.0,
    weight_decay: float = 0.0,
) -> None:
    """`after` is one step of the reference on from `before`."""
    with torch.no_grad():
        updates, state = reference(rule, grads, before.problem_state())
    for i, update in enumerate(updates):
        moved = before.params[i].double()
        if update is not None and update.numel():
            moved = (1 - lr * weight_decay) * moved + lr * update
        assert_close(after.params[i], moved, param_tolerance)
        assert_close(after.planes[i], state.planes[i], planes_tolerance)
        assert_close(after.states[i], state.tensors[i])
        assert int(after.steps[i]) == state.steps[i]
    assert_close(after.hidden[0], state.hidden)


def same_bits(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(
        a.numpy().tobytes() == b.numpy().tobytes() if a.dtype != torch.bfloat16 else a.equal(b)
        for a, b in zip(one, other, strict=True)
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


# The unroll
# --------------------------------------------------------------------------------------------------


def pack_row(state: ProblemState) -> Tensor:
    """The row (W,) of one run: planes, tensor states, global state."""
    return torch.cat([*(t.reshape(-1) for t in (*state.planes, *state.tensors)), state.hidden])


@dataclass
class Window:
    """Recorded gradients and the state before them, of several runs."""

    grads: Tensor  # (K, R, D)
    state: Tensor  # (R, W)
    weights: Tensor  # (K, R)
    steps: int
    taken: int
    sizes: tuple[int, ...]


def make_window(
    rule: HierarchicalRule, sizes: tuple[int, ...], steps: int, runs: int, taken: int, last: bool
) -> Window:
    generator = torch.Generator().manual_seed(3)
    rows = []
    for run in range(runs):
        problem = Problem.make(rule, [(size,) for size in sizes], taken=taken, seed=run)
        rows.append(pack_row(problem.problem_state()).float())
    shape = (steps + int(last), runs)
    grads = torch.randn(*shape, sum(sizes), generator=generator)
    weights = torch.rand(shape, generator=generator)
    return Window(grads, torch.stack(rows), weights, steps, taken, sizes)


def autograd_unroll(
    rule: HierarchicalRule, window: Window, lr: float, weight_decay: float
) -> tuple[Tensor, Tensor]:
    """dL/d meta and dL/d state in float64 through the reference steps."""
    sizes, planes, K = list(window.sizes), rule.state_planes, rule.tensor_size
    widths = [planes * size for size in sizes] + [K + 1] * len(sizes) + [rule.global_size]
    rows = window.state.double().requires_grad_()
    meta = rule.flat_parameters().detach().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for run, row in enumerate(rows):
        parts = row.split(widths)
        count = len(sizes)
        state = ProblemState(
            [part.view(planes, -1) for part in parts[:count]],
            list(parts[count : 2 * count]),
            [window.taken] * count,
            parts[-1],
        )
        grads, weights = window.grads[:, run].double(), window.weights[:, run].double()
        adjoint = torch.zeros(sum(sizes), dtype=torch.float64)
        d_updates = []
        for t in range(len(grads) - 1, -1, -1):
            if t < window.steps:
                d_updates.append(lr * adjoint)
            adjoint = weights[t] * grads[t] + (1 - lr * weight_decay) * adjoint
        for t, d_update in enumerate(reversed(d_updates)):
            updates, state = rule.reference_step(grads[t].split(sizes), state, meta)
            for update, upstream in zip(updates, d_update.split(sizes), strict=True):
                if update is not None:
                    total = total + (update * upstream).sum()
    d_meta, d_state = torch.autograd.grad(total, (meta, rows))
    return d_meta, d_state


def core_unroll(isa: str, rule: HierarchicalRule, window: Window, threads: int = 1):
    meta = rule.flat_parameters().detach().float().numpy()
    arrays = (window.grads.numpy(), window.state.numpy())
    d_meta, d_state = core.hierarchical_unroll_backward(
        isa,
        list(rule.config().values()),
        meta,
        *arrays,
        window.taken == 0,
        window.weights.numpy(),
        window.steps,
        list(window.sizes),
        0.7,
        0.1,
        threads,
    )
    return torch.from_numpy(d_meta), torch.from_numpy(d_state)


WINDOWS = {
    "first-step": (DEFAULT, (15, 7, 1, 0, 65), 1, 1, 0, True),
    "from-start": (DEFAULT, (15, 2049), 6, 2, 0, True),
    "later": (DEFAULT, (5, 0, 40), 5, 3, 2, False),
    "odd": (ODD, (65, 33), 4, 2, 1, True),
    "smallest": (SMALLEST, (9, 3), 4, 2, 1, True),
    "long": (DEFAULT, (10,), 40, 2, 0, True),
}


@needs_core
@over_isa
@pytest.mark.parametrize("case", WINDOWS)
def test_unroll_backward_agrees_with_autograd(isa: str, case: str) -> None:
    rule = make_rule(WINDOWS[case][0])
    window = make_window(rule, *WINDOWS[case][1:])
    exact = autograd_unroll(rule, window, 0.7, 0.1)
    for result, target in zip(core_unroll(isa, rule, window), exact, strict=True):
        assert float((result - target).norm()) <= TOLERANCE * float(target.norm())


@needs_core
@pytest.mark.parametrize("sizes", [(9000, 500), (30, 5)])
def test_unroll_threads_do_not_change_a_bit(sizes: tuple[int, ...]) -> None:
    rule = make_rule()
    window = make_window(rule, sizes, 3, 3, 0, True)
    isa = core.instruction_sets()[-1]
    one = core_unroll(isa, rule, window)
    for threads in (2, 5):
        assert same_bits(one, core_unroll(isa, rule, window, threads))


@needs_core
def test_windows_too_long_to_be_recorded_are_replayed_from_checkpoints() -> None:
    # 42 steps of 12,000 coordinates take more than 32 MB of states. Steps whose gradients have no
    # weight change nothing, so that the start of the window is a window that is recorded whole.
    rule = make_rule()
    window = make_window(rule, (12000,), 42, 1, 0, False)
    window.weights[18:] = 0.0
    start = Window(window.grads[:18], window.state, window.weights[:18], 17, 0, window.sizes)
    isa = core.instruction_sets()[-1]
    pairs = zip(core_unroll(isa, rule, window), core_unroll(isa, rule, start), strict=True)
    for result, target in pairs:
        assert float((result - target).norm()) <= TOLERANCE * float(target.norm())


@needs_ops
def test_the_unroll_op_agrees_with_autograd() -> None:
    rule = make_rule()
    window = make_window(rule, (15, 0, 70), 3, 2, 1, True)
    exact = autograd_unroll(rule, window, 0.7, 0.1)
    results = torch.ops.fastl2o.hierarchical_unroll_backward(
        window.grads,
        window.state,
        window.taken,
        rule.flat_parameters().detach().float(),
        window.weights,
        window.steps,
        list(window.sizes),
        **rule.config(),
        lr=0.7,
        weight_decay=0.1,
    )
    for result, target in zip(results, exact, strict=True):
        assert float((result - target).norm()) <= TOLERANCE * float(target.norm())


@needs_ops
def test_a_window_that_does_not_fit_is_refused() -> None:
    rule = make_rule()
    window = make_window(rule, (15, 7), 2, 1, 0, True)
    arguments = (window.grads, window.state, 0, rule.flat_parameters().detach().float())
    rest = dict(rule.config(), lr=1.0, weight_decay=0.0)
    op = torch.ops.fastl2o.hierarchical_unroll_backward
    for weights, steps, sizes, message in (
        (window.weights, 2, [15, 8], "sizes add up to 23"),
        (window.weights, 4, [15, 7], "steps is 4"),
        (window.weights[:1], 2, [15, 7], "loss_weights must be"),
        (window.weights, 2, [22], "state must be"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*arguments, weights, steps, sizes, **rest)
