"""Evolution strategies: their means against exact gradients, and what they are made of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastl2o
from fastl2o import meta
from fastl2o.meta.tasks import GradientNoise, MLPClassification, Quadratic, Task
from fastl2o.meta.unroll import Perturbations
from fastl2o.rules import Rule
from tests.common import RuleCase

TASK = Quadratic(dim=2)
CASES = (
    RuleCase("lstm", "lstm", {"hidden_size": 3, "preprocess": "identity"}),
    RuleCase("rnnprop", "rnnprop", {"hidden_size": 3}),
    RuleCase("hierarchical", "hierarchical", {"param_size": 3, "tensor_size": 2, "global_size": 2}),
)
# The difference of two float32 losses still has four digits, and the bias, of order sigma^2, is far
# below the errors of the means.
SIGMA = 1e-3
PAIRS, REPEATS = 100, 32


def linear_rule() -> fastl2o.LSTMRule:
    """Gradient descent with a bias: two meta-parameters, and runs that converge."""
    rule = fastl2o.LSTMRule.as_sgd(0.05, num_layers=0)
    with torch.no_grad():
        rule.readout.bias.fill_(0.05)
    return rule


def begin(
    rule: Rule, estimator: meta.Estimator, runs: int, task: Task = TASK, seed: int = 0
) -> meta.Progress:
    generator = torch.Generator().manual_seed(seed)
    return estimator.begin(rule, estimator.sample(task, runs, generator, torch.float32))


def exact(rule: Rule, steps: int, objective: str) -> Tensor:
    """The gradient on the problems that ``begin`` draws, differentiated all the way."""
    estimator = meta.TruncatedBPTT(steps, objective, second_order=True)
    return estimator.window(rule, begin(rule, estimator, PAIRS)).gradient


def estimates(rule: Rule, estimator: meta.ES, *windows: int) -> list[Tensor]:
    """Of the same problems, disturbed each time anew: sums over windows of these many steps."""
    found = []
    for seed in range(REPEATS):
        progress = begin(rule, estimator, 2 * PAIRS)
        progress.perturbations = Perturbations(seed)
        gradients = [estimator.window(rule, progress, steps).gradient for steps in windows]
        found.append(torch.stack(gradients).sum(dim=0))
    return found


def mean_and_error(samples: list[Tensor]) -> tuple[Tensor, Tensor]:
    stacked = torch.stack(samples)
    return stacked.mean(0), stacked.std(0) / len(samples) ** 0.5


@pytest.mark.parametrize("objective", ["sum", "weighted", "final", "log", "best"])
def test_mean_of_es_is_the_exact_gradient(objective: str) -> None:
    rule = linear_rule()
    gradient = exact(rule, 5, objective)
    mean, error = mean_and_error(estimates(rule, meta.ES(sigma=SIGMA, objective=objective), 5))
    assert ((mean - gradient).abs() <= 3.5 * error).all()
    assert (error <= 0.1 * gradient.norm()).all(), "the comparison must be able to fail"


class Along(Perturbations):
    """Every pair is disturbed along one direction, for a central difference of the meta-loss."""

    def __init__(self, direction: Tensor) -> None:
        super().__init__(seed=0)
        self.direction = direction

    def noise(self, window: int, pairs: int, size: int) -> Tensor:
        return self.direction.expand(pairs, size)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_es_agrees_with_back_propagation_for_every_family(case: RuleCase) -> None:
    rule, estimator = case.make(), meta.ES(sigma=1e-2, objective="sum")
    gradient = exact(rule, 4, "sum")
    progress = begin(rule, estimator, 2 * PAIRS)
    progress.perturbations = Along(gradient / gradient.norm())
    # Along the gradient's own direction the difference is its length.
    found = estimator.window(rule, progress, 4).gradient
    torch.testing.assert_close(found, gradient, rtol=2e-3, atol=2e-3 * float(gradient.abs().max()))


def test_mean_of_pes_over_windows_is_the_gradient_of_the_whole_horizon() -> None:
    rule = linear_rule()
    gradient = exact(rule, 12, "sum")
    mean, error = mean_and_error(estimates(rule, meta.PES(3, SIGMA, "sum"), 3, 3, 3, 3))
    assert ((mean - gradient).abs() <= 3.5 * error).all()
    assert (error <= 0.2 * gradient.norm()).all()
    mean, error = mean_and_error(estimates(rule, meta.ES(3, SIGMA, "sum"), 3, 3, 3, 3))
    assert ((mean - gradient).abs() > 5 * error).any(), "truncated windows are biased"


def test_steps_of_a_short_last_window_weigh_as_much_in_pes_as_the_others() -> None:
    """Where the unroll does not divide the horizon, they had weighed more under "log"."""
    rule = linear_rule()
    gradient = exact(rule, 7, "log") * 7 / 3  # of a mean over 7 steps, of sums of means over 3
    mean, error = mean_and_error(estimates(rule, meta.PES(3, SIGMA, "log"), 3, 3, 1))
    assert ((mean - gradient).abs() <= 3.5 * error).all()
    assert (error <= 0.1 * gradient.norm()).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_undisturbed_pairs_follow_the_rule(case: RuleCase) -> None:
    rule, task = case.make(), MLPClassification(hidden=(3,), batch_size=8)
    estimator, plain = meta.PES(unroll=3, sigma=1e-30), meta.TruncatedBPTT(unroll=3)
    losses = {}
    for chosen, runs in ((estimator, 4), (plain, 2)):
        progress = begin(rule, chosen, runs, task, seed=3)
        progress.run.generator.manual_seed(7)  # after the disturbances' seed, which one draws
        losses[chosen] = torch.cat([chosen.window(rule, progress).losses for _ in range(2)])
    plus, minus = losses[estimator].chunk(2, dim=1)
    torch.testing.assert_close(plus, losses[plain], rtol=1e-5, atol=1e-6)
    assert torch.equal(plus, minus)


def test_runs_of_a_pair_share_problem_minibatches_and_noise() -> None:
    task = GradientNoise(MLPClassification(hidden=(3,), batch_size=8), 0.5)
    run = meta.ES().sample(task, 6, torch.Generator().manual_seed(0), torch.float32)
    assert torch.equal(*run.params.chunk(2))
    losses, grads = run.loss_and_grad(run.params, run.next_batch())
    assert torch.equal(*losses.chunk(2))
    assert torch.equal(*grads.chunk(2))
    assert torch.equal(losses, run.losses(run.params, run.full_batch())) is False
    assert len(grads[:3].unique(dim=0)) == 3


def test_between_windows_es_goes_on_from_the_first_run_and_pes_from_both() -> None:
    rule, task = CASES[0].make(), Quadratic(dim=3)
    generator = torch.Generator().manual_seed(0)
    for kind, same in ((meta.ES, True), (meta.PES, False)):
        estimator = kind(unroll=3, sigma=0.1)
        run = estimator.sample(task, 4, generator, torch.float32)
        progress = estimator.begin(rule, run)
        estimator.window(rule, progress)
        assert torch.equal(*progress.params.chunk(2)) is same
        assert torch.equal(*progress.state.chunk(2, rule.runs_axis)) is same


def test_disturbances_are_made_from_counters() -> None:
    noise = Perturbations(seed=5)
    first, second = noise.noise(0, 4, 1000), noise.noise(1, 4, 1000)
    assert torch.equal(first, Perturbations(5).noise(0, 4, 1000))
    assert not torch.equal(first, second)
    assert not torch.equal(first, Perturbations(6).noise(0, 4, 1000))
    both = torch.cat((first, second)).flatten()
    assert abs(float(both.mean())) < 4 / len(both) ** 0.5
    assert abs(float(both.var()) - 1) < 4 * (2 / len(both)) ** 0.5
    assert abs(float(torch.corrcoef(torch.stack((first.flatten(), second.flatten())))[0, 1])) < 0.07
    for window in (first, second):
        total = noise.add(window)
        noise.windows += 1
    restored = Perturbations(5, windows=2)
    third = noise.noise(2, 4, 1000)
    assert torch.equal(restored.add(third), noise.add(third))
    assert torch.equal(total, first + second + third), "the sum is kept, not copied"


@pytest.mark.parametrize("kind", [meta.ES, meta.PES])
def test_training_by_evolution_lowers_the_loss_and_resumes(
    kind: type[meta.ES], tmp_path: Path
) -> None:
    def trainer(steps: int, folder: str) -> fastl2o.LSTMRule:
        rule = fastl2o.LSTMRule(hidden_size=4, num_layers=1, preprocess="identity")
        rule.reset_parameters(torch.Generator().manual_seed(0))
        meta.MetaTrainer(
            rule,
            [Quadratic(dim=3)],
            kind(unroll=5, sigma=0.02),
            horizon=20,
            optimizer=torch.optim.Adam(rule.parameters(), lr=1e-2),
            runs=16,
            groups=2,
            checkpoint_dir=tmp_path / folder,
            progress=False,
        ).fit(steps)
        return rule

    before = meta.run_losses(trainer(0, "zero"), Quadratic(dim=3), runs=32, horizon=20)
    whole = trainer(60, "whole")
    after = meta.run_losses(whole, Quadratic(dim=3), runs=32, horizon=20)
    assert after[-1].mean() < 0.5 * before[-1].mean()
    trainer(33, "parts")
    parts = trainer(60, "parts")
    assert torch.equal(parts.flat_parameters(), whole.flat_parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: meta.ES(unroll=0), "unroll must be"),
        (lambda: meta.ES(sigma=0), "sigma must be"),
        (lambda: meta.ES(objective="mean"), "objective must be one of"),
        (lambda: meta.PES(unroll=None), "unroll must be"),
        (lambda: meta.PES(objective="final"), "'log', 'sum'"),
        (lambda: meta.ES().check_runs(3), "even for ES"),
        (lambda: meta.MetaTrainer(linear_rule(), [Quadratic()], meta.PES(), runs=5), "even for PE"),
        (lambda: _window_without_length(), "steps must be given"),
        (lambda: meta.ES().begin(linear_rule(), _plain_run()), "needs runs in pairs"),
        (lambda: _window_of_another_start(), "not started by ES.begin"),
    ],
)
def test_impossible_arguments_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def _plain_run() -> meta.tasks.TaskRun:
    return Quadratic(dim=2).sample(2, torch.Generator().manual_seed(0))


def _window_without_length() -> None:
    rule = linear_rule()
    estimator = meta.ES()
    run = estimator.sample(Quadratic(dim=2), 2, torch.Generator(), torch.float32)
    estimator.window(rule, estimator.begin(rule, run))


def _window_of_another_start() -> None:
    rule = linear_rule()
    meta.ES(3).window(rule, meta.start(rule, _plain_run()))
