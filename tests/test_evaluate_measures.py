"""Steps to a loss, gaps at a loss and distances are what they are by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fastl2o.evaluate import (
    Entrant,
    Setting,
    compare,
    gap_at_level,
    log_spaced,
    majority,
    normalised_distance,
    steps_to_reach,
    train,
)
from fastl2o.evaluate import _training as training_module

NAN, INF = math.nan, math.inf


class Parabola:
    """f(x) = x^2 / 2 from x = 2^3, 2^4, ...: every number is a power of two, hence exact."""

    tensor_sizes = (1,)

    def sample(self, num_runs: int, generator: torch.Generator) -> Parabola:
        self.params = 2.0 ** torch.arange(3, 3 + num_runs).unsqueeze(1)
        self.generator = generator
        return self

    def next_batch(self) -> tuple[()]:
        return ()

    def loss_and_grad(self, params, batch):
        return params.square().sum(1) / 2, params.clone()


@pytest.mark.parametrize(
    ("window", "target", "steps"),
    [
        (1, 3.0, 2.0),  # losses 5, 4, 2, 6, 1, 1
        (1, 5.0, 0.0),
        (1, 0.5, INF),
        (2, 3.0, 2.0),
        (2, 2.9, 5.0),  # means 4.5, 3, 4, 3.5, 1
        (3, 3.0, 4.0),  # means 11/3, 4, 3, 8/3
        (1, INF, INF),
        (1, NAN, INF),
    ],
)
def test_steps_to_reach_a_target_in_the_mean_of_a_window(window, target, steps) -> None:
    losses = torch.tensor([[5.0], [4.0], [2.0], [6.0], [1.0], [1.0]])
    assert steps_to_reach(losses, torch.tensor([target]), window).item() == steps


def test_a_run_that_was_not_finite_in_between_may_reach_its_target() -> None:
    losses = torch.tensor([[5.0, 5.0], [NAN, INF], [1.0, 1.0]])
    assert steps_to_reach(losses, torch.tensor([2.0, 2.0])).tolist() == [2.0, 2.0]
    assert steps_to_reach(losses, torch.tensor([2.0, 2.0]), 2).tolist() == [INF, INF]


def test_twice_the_contraction_reaches_the_baseline_in_half_the_steps(monkeypatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(training_module, "perf_counter", lambda: float(next(ticks)))
    # Rate 1/2 halves x each step, rate 3/4 halves it twice.
    entrants = [Entrant.fixed("SGD", 0.75), Entrant.tuned("SGD"), Entrant.fixed("SGD", 0.25)]
    setting = Setting(horizon=8, runs=2, tuning_runs=1, learning_rates=(0.5,))
    result = compare(Parabola(), entrants, setting)
    assert result.baseline == "SGD"
    fast, baseline, slow = (row.to_baseline for row in result.rows)
    # The clock ticks once a step, and once before the first.
    assert fast == (4.0, 5.0, 2, [4.0, 4.0])
    assert baseline == (8.0, 9.0, 2, [8.0, 8.0])
    assert slow == (INF, INF, 0, [INF, INF])
    assert [row.seconds for row in result.rows] == [9.0, 9.0, 9.0]
    header, cells = result.cells()
    column = header.index("to SGD's loss")
    assert [row[column] for row in cells] == ["4 steps, 5 s", "8 steps, 9 s", "never (0/2)"]


def test_the_baseline_is_the_best_on_the_tuning_runs_unless_another_is_named() -> None:
    entrants = [Entrant.tuned("Adam"), Entrant.tuned("SGD")]
    setting = Setting(horizon=8, runs=2, tuning_runs=1, learning_rates=(0.5,))
    assert compare(Parabola(), entrants, setting).baseline == "SGD"
    assert compare(Parabola(), entrants, setting, baseline="Adam").baseline == "Adam"
    untuned = compare(Parabola(), [Entrant.fixed("Adam", 1e-3)], setting)
    assert untuned.baseline is None
    assert untuned.rows[0].to_baseline is None
    assert (untuned.rows[0].name, untuned.rows[0].learning_rate) == ("Adam, lr 0.001", 1e-3)


def test_curves_hold_every_run_at_log_spaced_steps() -> None:
    setting = Setting(horizon=8, runs=2, steps=(7,))
    entrant = Entrant.fixed("SGD", 0.5)
    result = compare(Parabola(), [entrant], setting)
    assert result.points == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    # x = 8 and 16 halve, so losses 32 and 128 fall by 4.
    assert result.rows[0].curves == [[start / 4**t for t in range(9)] for start in (32.0, 128.0)]
    whole = train(Parabola(), entrant.at(0.5), horizon=8, runs=2, seed=0)
    assert torch.equal(whole.losses.T, torch.tensor(result.rows[0].curves))


@pytest.mark.parametrize("horizon", [1, 2, 9, 10, 1000, 10_000])
def test_log_spaced_steps_reach_from_0_to_the_horizon(horizon: int) -> None:
    steps = log_spaced(horizon)
    assert (steps[0], steps[-1]) == (0, horizon)
    assert list(steps) == sorted(set(steps))
    assert len(steps) <= 2 + 10 * math.log10(horizon) + 1


@pytest.mark.parametrize(
    ("values", "expected"),
    [([2.0], 2.0), ([3.0, 1.0, 2.0], 2.0), ([1.0, INF], INF), ([1.0, 2.0, INF, 1.0], 2.0)],
)
def test_more_than_half_of_the_runs_do_not_exceed_the_majority(values, expected) -> None:
    assert majority(torch.tensor(values)) == expected
    assert sum(value <= expected for value in values) > len(values) / 2


def test_gap_where_the_training_loss_first_falls_to_a_level() -> None:
    # Falls through 3 halfway between the first points; touches 2 at the second, and later again.
    train_loss = torch.tensor([[4.0], [2.0], [5.0], [1.0]])
    test_loss = torch.tensor([[4.0], [2.5], [9.0], [3.0]])
    for level, gap in [(3.0, 0.25), (2.0, 0.5), (4.0, 0.0), (6.0, 0.0), (1.5, 2.25), (1.0, 2.0)]:
        found = gap_at_level(train_loss, test_loss, torch.tensor([level]))
        assert found.item() == pytest.approx(gap), level
    assert math.isnan(gap_at_level(train_loss, test_loss, torch.tensor([0.5])).item())
    assert math.isnan(gap_at_level(train_loss, test_loss, torch.tensor([NAN])).item())


def test_distance_is_0_for_equal_parameters_and_at_most_sqrt_2() -> None:
    one = torch.tensor([[0.0, 0.0], [1.0, 2.0], [3.0, 4.0], [1.0, 1.0]])
    other = torch.tensor([[0.0, 0.0], [1.0, 2.0], [0.0, 0.0], [-1.0, -1.0]])
    expected = torch.tensor([0.0, 0.0, 1.0, math.sqrt(2)], dtype=torch.float64)
    torch.testing.assert_close(normalised_distance(one, other), expected)
