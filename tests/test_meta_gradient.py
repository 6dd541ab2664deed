"""The meta-gradient of a window: fused against autograd, truncation, objectives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastl2o
from fastl2o import meta
from fastl2o.meta.tasks import (
    Bowl,
    GradientNoise,
    LogObjective,
    MLPClassification,
    Quadratic,
    RandomMLP,
    RandomScaling,
    Rescaled,
    SoftmaxRegression,
    SparseGradients,
    SumOf,
    Task,
    TaskRun,
    VmapRun,
    WeightNormalization,
    WithConvex,
)
from fastl2o.rules import HierarchicalRule, Rule
from tests.common import RuleCase

F64 = torch.float64
CASES = (
    RuleCase("lstm", "lstm", {"hidden_size": 5}),
    RuleCase(
        "lstm-identity", "lstm", {"hidden_size": 4, "num_layers": 1, "preprocess": "identity"}
    ),
    RuleCase("lstm-linear", "lstm", {"num_layers": 0, "p": 5.0}),
    RuleCase("rnnprop", "rnnprop", {"hidden_size": 4}),
)
over_cases = pytest.mark.parametrize("case", CASES, ids=str)
TASK = WithConvex(RandomScaling(Quadratic(dim=4), 1.0), num=3)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def begin(rule: Rule, task: Task = TASK, runs: int = 3, dtype: torch.dtype = F64) -> meta.Progress:
    return meta.start(rule, task.sample(runs, seeded(1), dtype))


def assert_near(got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Relative to the largest entry, as sums that cancel deserve."""
    scale = max(expected.abs().max().item(), 1e-30)
    assert (got - expected).abs().max().item() <= tolerance * scale


@over_cases
@pytest.mark.parametrize("objective", ["sum", "final", "log"])
@pytest.mark.parametrize("final_term", [True, False], ids=["21-terms", "20-terms"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-10), (torch.float32, 2e-5)], ids=str)
def test_fused_window_equals_autograd(
    case: RuleCase, objective: str, final_term: bool, dtype: torch.dtype, tolerance: float
) -> None:
    rule = case.make(dtype)
    results = {}
    for path in ("fused", "autograd"):
        estimator = meta.TruncatedBPTT(6, objective, final_term, path)
        progress = begin(rule, dtype=dtype)
        # The second window starts from a state and a step count that are not zero.
        results[path] = [estimator.window(rule, progress, lr=0.7, weight_decay=0.1) for _ in "ab"]
    for fused, eager in zip(results["fused"], results["autograd"], strict=True):
        assert_near(fused.gradient, eager.gradient, tolerance)
        assert_near(fused.losses, eager.losses, tolerance)
        assert_near(fused.loss, eager.loss, 10 * tolerance)


@over_cases
def test_float32_window_is_near_float64(case: RuleCase) -> None:
    gradients = []
    for dtype in (F64, torch.float32):
        rule = case.make(dtype)
        run = Quadratic(dim=5).sample(4, seeded(), F64)
        run.tensors = {name: tensor.to(dtype) for name, tensor in run.tensors.items()}
        gradients.append(meta.TruncatedBPTT(5).window(rule, meta.start(rule, run)).gradient)
    assert_near(gradients[1].double(), gradients[0], 1e-3)


def explicit_gradient(rule: Rule, run: TaskRun, windows: int, steps: int) -> tuple[Tensor, Tensor]:
    """Sum of the windows' gradients, and the losses, by a loop that shares no code with ours."""
    weights = [parameter for _, parameter in sorted(rule.named_parameters())]
    total = [torch.zeros_like(weight) for weight in weights]
    params, state, taken, visited = run.params, rule.init_state(run.params, F64), 0, []
    batch = run.next_batch()
    visited.append(run.losses(params, batch).detach())
    for _ in range(windows):
        params, state, terms = params.detach(), state.detach(), []
        for _ in range(steps):
            at = params.detach().requires_grad_()
            (grad,) = torch.autograd.grad(run.losses(at, batch).sum(), at)
            update, state = rule.reference_step(grad, state, taken)
            params, taken = params + update, taken + 1
            batch = run.next_batch()
            terms.append(run.losses(params, batch))
            visited.append(terms[-1].detach())
        pieces = torch.autograd.grad(torch.stack(terms).sum(dim=0).mean(), weights)
        total = [a + b for a, b in zip(total, pieces, strict=True)]
    return torch.cat([piece.flatten() for piece in total]), torch.stack(visited)


@over_cases
@pytest.mark.parametrize("windows", [1, 3])
def test_truncation_cuts_the_gradient_and_nothing_else(case: RuleCase, windows: int) -> None:
    rule = case.make(F64)
    task = MLPClassification("digits", hidden=(3,), batch_size=5, init_scale=0.3)
    expected, visited = explicit_gradient(rule, task.sample(2, seeded(), F64), windows, 4)
    progress = meta.start(rule, task.sample(2, seeded(), F64))
    results = [meta.TruncatedBPTT(4).window(rule, progress) for _ in range(windows)]
    names = rule.unflatten(torch.stack([result.gradient for result in results]).sum(dim=0))
    got = torch.cat([gradient.flatten() for _, gradient in sorted(names.items())])
    assert_near(got, expected, 1e-10)
    losses = torch.cat([results[0].losses[:1], *(result.losses[1:] for result in results)])
    assert_near(losses, visited, 1e-12)


def test_a_window_is_not_two_shorter_windows() -> None:
    rule = CASES[0].make(F64)
    whole = meta.TruncatedBPTT(6).window(rule, begin(rule)).gradient
    progress = begin(rule)
    halves = sum(meta.TruncatedBPTT(3).window(rule, progress).gradient for _ in range(2))
    assert (whole - halves).norm() > 1e-3 * whole.norm()


class Counting(Quadratic):
    """A quadratic whose runs count their evaluations."""

    def sample(self, *args: Any, **kwargs: Any) -> TaskRun:
        run = super().sample(*args, **kwargs)
        inner, self.count = run.loss_and_grad, 0

        def counted(params: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
            self.count += 1
            return inner(params, batch)

        run.loss_and_grad = counted
        return run


@pytest.mark.parametrize("objective", ["sum", "log"])
def test_no_evaluation_is_spent_on_the_meta_gradient(objective: str) -> None:
    rule, task = CASES[0].make(), Counting(dim=3)
    progress = begin(rule, task, dtype=torch.float32)
    for _ in range(3):
        meta.TruncatedBPTT(5, objective).window(rule, progress)
    # One at each of the 16 visited points: the window's last evaluation opens the next window.
    assert task.count == 16
    assert progress.step == 15


@pytest.mark.parametrize("path", ["fused", "autograd"])
@pytest.mark.parametrize("objective", ["sum", "final", "log"])
def test_gradient_does_not_depend_on_the_number_of_runs(path: str, objective: str) -> None:
    rule = CASES[0].make(F64)
    estimator = meta.TruncatedBPTT(5, objective, path=path)
    one = Quadratic(dim=3).sample(1, seeded(), F64)
    four = Quadratic(dim=3).sample(4, seeded(), F64)
    four.tensors = {name: tensor.repeat_interleave(4, 0) for name, tensor in one.tensors.items()}
    alone, together = (estimator.window(rule, meta.start(rule, run)) for run in (one, four))
    assert_near(together.gradient, alone.gradient, 1e-12)
    assert_near(together.loss, alone.loss, 1e-12)


@over_cases
@pytest.mark.parametrize("objective", ["sum", "final", "log"])
def test_second_order_is_the_derivative_of_the_loss(case: RuleCase, objective: str) -> None:
    rule = case.make(F64)
    estimator = meta.TruncatedBPTT(4, objective, second_order=True)
    assert estimator.path == "autograd"
    gradient = estimator.window(rule, begin(rule)).gradient
    direction = torch.randn(gradient.shape, generator=seeded(5), dtype=F64)
    direction /= direction.norm()
    pieces, values, step = rule.unflatten(direction), [], 1e-5
    for sign in (1, -2):
        with torch.no_grad():
            for name, parameter in rule.named_parameters():
                parameter.add_(pieces[name], alpha=sign * step)
        values.append(meta.TruncatedBPTT(4, objective).window(rule, begin(rule)).loss)
    measured = (values[0] - values[1]) / (2 * step)
    torch.testing.assert_close(gradient @ direction, measured, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "task",
    [
        MLPClassification("digits", hidden=(3,), batch_size=4),
        SumOf([GradientNoise(RandomMLP(4, (3,), 5), 0.5), SparseGradients(Quadratic(dim=3))]),
        WithConvex(RandomScaling(SoftmaxRegression(3, 1.0, 4), 1.0), num=3),
    ],
    ids=["digits", "sum", "convex"],
)
def test_full_data_loss_of_runs_on_minibatches(task: Task) -> None:
    """Minibatches move the parameters; the meta-loss and its gradient are of all data."""
    rule = CASES[0].make(F64)
    run = task.sample(2, seeded(1), F64)
    meta_parameters = rule.flat_parameters().detach().requires_grad_()
    params, state = run.params.clone(), rule.init_state(run.params, F64)
    first = last = run.losses(params, run.full_batch())
    assert not torch.equal(first, run.losses(params, run.next_batch()))
    run = task.sample(2, seeded(1), F64)
    logs = []
    for _ in range(6):
        grads = run.loss_and_grad(params.detach(), run.next_batch())[1]
        update, state = rule.reference_step(grads, state, 0, meta_parameters)
        params = params + update
        last = run.losses(params, run.full_batch())
        logs.append(torch.log((last + 1e-8) / (first + 1e-8)))
    expected_loss = torch.stack(logs).mean()
    (expected,) = torch.autograd.grad(expected_loss, meta_parameters)
    estimator = meta.TruncatedBPTT(3, "log", full_data=True)
    assert estimator.path == "autograd"
    progress = begin(rule, task, runs=2)
    result = estimator.window(rule, progress, 6)
    assert_near(result.gradient, expected, 1e-10)
    assert_near(result.loss, expected_loss.detach(), 1e-12)
    assert_near(result.losses[-1], last.detach(), 1e-12)
    assert_near(progress.first_losses, first, 1e-12)


def noisy_and_sparse(task: Task) -> Task:
    return GradientNoise(SparseGradients(task, 0.5), 0.5)


@pytest.mark.parametrize("change", [GradientNoise, SparseGradients, noisy_and_sparse])
@pytest.mark.parametrize("family", ["lstm", "hierarchical"])
@pytest.mark.parametrize("last", [True, False])
def test_rules_see_the_gradients_that_a_task_changes_and_meta_gradients_do_not(
    change: Any, family: str, last: bool
) -> None:
    rule: Rule = CASES[0].make(F64) if family == "lstm" else HierarchicalRule(3, 2, 2).double()
    task = change(Quadratic(dim=4))
    results = [
        meta.TruncatedBPTT(5, path=path, final_term=last).window(rule, begin(rule, task))
        for path in ("fused", "autograd")
    ]
    assert_near(results[1].losses, results[0].losses, 1e-12)
    assert_near(results[1].gradient, results[0].gradient, 1e-10)


def in_a_sum(task: Task) -> Task:
    return SumOf([task, LogObjective(Bowl())])


@pytest.mark.parametrize(
    "around",
    [
        lambda task: task,
        WithConvex,
        RandomScaling,
        Rescaled,
        LogObjective,
        WeightNormalization,
        in_a_sum,
        lambda task: GradientNoise(WithConvex(task, num=3)),
        lambda task: WithConvex(Rescaled(in_a_sum(WeightNormalization(task)))),
    ],
    ids=["itself", "convex", "scaled", "rescaled", "log", "normalized", "sum", "noise", "several"],
)
@pytest.mark.parametrize("change", [GradientNoise, SparseGradients, noisy_and_sparse])
def test_tasks_around_others_know_the_gradients_without_noise_and_gaps(
    change: Any, around: Any
) -> None:
    task = around(change(MLPClassification("digits", hidden=(3,), batch_size=4, init_scale=0.3)))
    run = task.sample(2, seeded(), F64)
    params = (run.params + 0.1).requires_grad_()
    batch = run.next_batch()
    losses = run.losses(params, batch)
    (expected,) = torch.autograd.grad(losses.sum(), params)
    with torch.no_grad():
        found, seen, own = run.loss_and_grads(params.detach(), batch)
        again = run.loss_and_grad(params.detach(), batch)
    assert run.changes_gradients
    assert_near(found, losses.detach(), 1e-12)
    assert_near(own, expected, 1e-12)
    assert torch.equal(seen, again[1])
    assert (seen - own).norm() > 0.1 * own.norm()


@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("around", [WithConvex, in_a_sum, Rescaled])
def test_meta_gradients_of_tasks_around_others_are_without_noise_and_gaps(
    around: Any, segments: int
) -> None:
    rule, task = CASES[0].make(F64), around(noisy_and_sparse(Quadratic(dim=4)))
    expected = meta.TruncatedBPTT(7, "log", path="autograd")
    fused = meta.TruncatedBPTT(7, "log", segments=segments)
    results = [each.window(rule, begin(rule, task)) for each in (fused, expected)]
    assert_near(results[0].losses, results[1].losses, 1e-12)
    assert_near(results[0].gradient, results[1].gradient, 1e-10)


def test_unroll_gradient_names_the_parameters_and_leaves_the_rule_alone() -> None:
    rule = CASES[3].make(F64)
    before = [parameter.clone() for parameter in rule.parameters()]
    run = TASK.sample(2, seeded(), F64)
    start_params = run.params.clone()
    grads, losses = meta.unroll_gradient(rule, run, steps=7)
    assert losses.shape == (8, 2)
    assert {name: grad.shape for name, grad in grads.items()} == {
        name: parameter.shape for name, parameter in rule.named_parameters()
    }
    expected, _ = explicit_gradient(rule, TASK.sample(2, seeded(), F64), 1, 7)
    got = torch.cat([gradient.flatten() for _, gradient in sorted(grads.items())])
    assert_near(got, expected, 1e-10)
    assert all(parameter.grad is None for parameter in rule.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, rule.parameters(), strict=True))
    assert torch.equal(run.params, start_params)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "lstm-mnist"}, "rule must be of type Rule"),
        ({"task_run": Quadratic(dim=3)}, "task_run must be of type TaskRun, such as task.sample"),
        ({"estimator": 5}, "estimator must be of type TruncatedBPTT"),
        ({"steps": 0}, "steps must be an int of at least 1, got 0"),
        ({"lr": float("nan")}, "lr must be a finite number"),
        ({"weight_decay": -1.0}, "weight_decay must be a finite number"),
    ],
)
def test_unroll_gradient_names_impossible_arguments(options: dict[str, Any], message: str) -> None:
    run = Quadratic(dim=3).sample(2, torch.Generator().manual_seed(0))
    arguments = {"rule": fastl2o.LSTMRule(2, 1), "task_run": run, "steps": 2, **options}
    with pytest.raises((ValueError, TypeError), match=message):
        meta.unroll_gradient(**arguments)


def test_estimator_refuses_impossible_arguments() -> None:
    for arguments, message in (
        ({"unroll": 0}, "unroll must be"),
        ({"unroll": 2.0}, "unroll must be an int"),
        ({"objective": "mean"}, "'sum', 'weighted', 'final', 'log', 'best'; got 'mean'"),
        ({"path": "jit"}, "'fused', 'autograd'"),
        ({"unroll": 1, "final_term": False}, "leaves no loss"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            meta.TruncatedBPTT(**arguments)
    rule = CASES[0].make()
    with pytest.raises(ValueError, match="steps must be"):
        meta.run_window(rule, begin(rule, dtype=torch.float32), 0)


class Square(Task):
    """f(x) = x^2 from x_0 = 1."""

    class Run(VmapRun):
        def loss(self, params: Tensor, *inputs: Tensor) -> Tensor:
            return params.square().sum()

        def loss_and_grad(self, params: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
            return params.square().sum(dim=1), 2 * params  # vmap would be most of the test's time

    def sample(
        self, num_runs: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> TaskRun:
        return self.Run({"params": torch.ones(num_runs, 1, dtype=dtype)}, torch.Generator())

    def config(self) -> dict[str, Any]:
        return {}


def test_square_is_solved_by_a_linear_rule() -> None:
    """The smallest published self-test: convergence_test.py in deepmind/learning-to-learn."""
    rule = fastl2o.LSTMRule(num_layers=0, preprocess="identity", output_scale=1.0)
    with torch.no_grad():
        for parameter in rule.parameters():
            parameter.zero_()
    trainer = meta.MetaTrainer(
        rule,
        [Square()],
        optimizer=torch.optim.Adam(rule.parameters(), lr=1e-2),
        runs=1,
        progress=False,
    )
    trainer.fit(1000)  # 200 runs of 100 steps, 5 windows of 20 each; published with 500 runs
    assert meta.run_losses(rule, Square(), runs=1, horizon=100)[-1].item() < 1e-5
