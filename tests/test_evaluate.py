"""The comparison with hand-designed optimizers is fair, and says what happened."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch

import fastl2o
from fastl2o import meta
from fastl2o.evaluate import (
    HAND_DESIGNED,
    LEARNING_RATES,
    Entrant,
    Setting,
    compare,
    mean_std,
    pick_learning_rate,
    render_table,
    threads,
    train,
)


class RecordedTask:
    """Two-coordinate slopes whose minibatches are random offsets; remembers what was drawn."""

    def __init__(self) -> None:
        self.draws: list[list[torch.Tensor]] = []

    def sample(self, num_runs: int, generator: torch.Generator) -> RecordedTask:
        self.params = torch.randn(num_runs, 2, generator=generator)
        self.generator = generator
        self.draws.append([self.params.clone()])
        return self

    def next_batch(self) -> torch.Tensor:
        batch = torch.randn(len(self.params), 1, generator=self.generator)
        self.draws[-1].append(batch)
        return batch

    def loss_and_grad(self, params, batch):
        return (params + batch).square().sum(1), 2 * (params + batch)


def setting(**changes) -> Setting:
    return Setting(**{"horizon": 4, "runs": 3, "tuning_runs": 2, **changes})


def with_baselines(**rules: fastl2o.rules.Rule) -> list[Entrant]:
    return [*(Entrant.learned(name, rule) for name, rule in rules.items()), *Entrant.baselines()]


def test_grid_has_13_half_decades_from_1e_5_to_10() -> None:
    assert len(LEARNING_RATES) == 13
    assert (LEARNING_RATES[0], LEARNING_RATES[-1]) == (1e-5, 10.0)
    ratios = [b / a for a, b in itertools.pairwise(LEARNING_RATES)]
    assert ratios == pytest.approx([math.sqrt(10)] * 12)


def test_every_optimizer_sees_the_same_start_and_minibatches() -> None:
    task = RecordedTask()
    rule = fastl2o.LSTMRule(hidden_size=2, num_layers=1)
    compare(task, with_baselines(rule=rule), setting())
    reported = [draws for draws in task.draws if len(draws[0]) == 3]
    tuning = [draws for draws in task.draws if len(draws[0]) == 2]
    assert len(reported) == 5
    assert len(tuning) == 4 * 13
    for group in (reported, tuning):
        for draws in group:
            assert len(draws) == 1 + 5  # parameters, then one minibatch a loss
            assert all(torch.equal(a, b) for a, b in zip(draws, group[0], strict=True))
    assert not torch.equal(tuning[0][0], reported[0][0][:2])


@pytest.mark.parametrize("name", HAND_DESIGNED)
def test_batched_runs_train_like_single_ones(name: str) -> None:
    run = meta.tasks.Quadratic(dim=3).sample(4, torch.Generator().manual_seed(0))

    class Selected:
        def __init__(self, rows: slice) -> None:
            self.rows = rows

        def sample(self, num_runs: int, generator: torch.Generator) -> Selected:
            return self

        @property
        def params(self):
            return run.params[self.rows]

        def next_batch(self):
            return ()

        def loss_and_grad(self, params, batch):
            matrix, target = (tensor[self.rows] for tensor in run.context())
            residual = (matrix @ params.unsqueeze(2)).squeeze(2) - target
            grads = 2 * (residual.unsqueeze(1) @ matrix).squeeze(1)
            return residual.square().sum(1), grads

    def losses(rows: slice):
        def make(params, run):
            return HAND_DESIGNED[name]([params], lr=0.01)

        selected = Selected(rows)
        return train(selected, make, horizon=5, runs=len(selected.params), seed=0).losses

    together = losses(slice(None))
    single = torch.cat([losses(slice(row, row + 1)) for row in range(4)], dim=1)
    torch.testing.assert_close(together, single)


def test_learning_rate_is_chosen_by_the_criterion() -> None:
    task = meta.tasks.Quadratic(dim=3)
    rates = (1e-5, 1e-2, 1e3)
    result = compare(task, Entrant.baselines(), setting(horizon=20, learning_rates=rates))
    assert [row.learning_rate for row in result.rows][:2] == [1e-2, 1e-2]
    assert result.rows[0].edge is False
    edge = compare(task, Entrant.baselines(), setting(horizon=20, learning_rates=(1e-5, 1e-4)))
    assert edge.rows[0].edge is True
    assert "* the best rate is at the edge of the grid" in edge.notes()


def test_criterion_final_looks_at_the_end_only() -> None:
    losses = torch.tensor([[9.0], [9.0], [9.0], [9.0], [1.0]])
    assert setting(criterion="final").tuning_score(losses) == 1.0
    assert setting(criterion="sum").tuning_score(losses) == 36.0


def test_rates_that_diverge_are_never_chosen() -> None:
    assert pick_learning_rate({0.1: math.inf, 1.0: 5.0, 10.0: math.nan}) == 1.0


def test_diverged_runs_are_counted_and_json_stays_valid() -> None:
    hopeless = fastl2o.LSTMRule.as_sgd(1e18)
    result = compare(
        meta.tasks.Quadratic(dim=3), with_baselines(hopeless=hopeless), setting(horizon=30, runs=2)
    )
    assert result.rows[0].diverged == 2
    assert result.rows[1].diverged == 0
    document = json.dumps(result.to_json(), allow_nan=False)
    assert json.loads(document)["rows"][0]["values"]["step 30"]["mean"] is None
    assert "2/2" in result.table()


def test_ratios_are_to_the_best_baseline_of_each_column() -> None:
    result = compare(
        meta.tasks.Quadratic(dim=3),
        with_baselines(adam=fastl2o.RNNPropRule.as_adam(0.1)),
        setting(),
    )
    learned, *others = result.rows
    for column, spread in learned.values.items():
        best = min(row.values[column].mean for row in others)
        assert learned.ratios[column] == pytest.approx(spread.mean / best)


def test_mean_std_over_runs() -> None:
    assert mean_std(torch.tensor([1.0, 3.0])) == pytest.approx((2.0, math.sqrt(2)))
    assert mean_std(torch.tensor([4.0])) == (4.0, 0.0)


def test_table_is_aligned() -> None:
    text = render_table(["name", "x"], [["a", "1.25"], ["long name", "2"]])
    assert text.splitlines() == [
        "name          x",
        "---------  ----",
        "a          1.25",
        "long name     2",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"horizon": 0}, "horizon must be at least 1, got 0"),
        ({"runs": 0}, "runs must be at least 1"),
        ({"learning_rates": ()}, "learning_rates is empty"),
        ({"steps": (5,)}, r"0\.\.4 .*got \[5\]"),
    ],
)
def test_impossible_settings_are_refused(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        setting(**changes)


def test_a_sum_that_no_rate_can_change_is_refused() -> None:
    task, one = meta.tasks.Quadratic(dim=3), setting(horizon=1)
    with pytest.raises(ValueError, match="criterion 'sum' of horizon 1 is the loss before any"):
        compare(task, Entrant.baselines(), one)
    assert compare(task, [Entrant.learned("untuned", fastl2o.LSTMRule())], one).rows
    assert compare(task, [Entrant.fixed("Adam", 1e-3)], one).rows
    assert compare(task, Entrant.baselines(), setting(horizon=1, criterion="final")).rows


def test_the_notes_say_what_the_columns_are() -> None:
    rule = Entrant.learned("sgd", fastl2o.LSTMRule.as_sgd(0.1))
    notes = compare(meta.tasks.Quadratic(dim=3), [rule], setting()).notes()
    assert notes == [
        "sum of 4: the losses before each of the 4 steps",
        "last 1: mean at the end, the loss after the last step included",
        "diverged: runs that went non-finite or ended above their first loss",
    ]


@pytest.mark.parametrize("count", [0, 100_000])
def test_impossible_numbers_of_threads_are_refused(count: int) -> None:
    with (
        pytest.raises(ValueError, match=rf"threads must be from 1 to \d+.*got {count}"),
        threads(count),
    ):
        pass


@pytest.mark.parametrize(
    ("entrants", "baseline", "message"),
    [
        ([], None, "nothing to compare"),
        ([Entrant.tuned("Adam"), Entrant.tuned("Adam")], None, "Adam given more than once"),
        (Entrant.baselines(), "Momentum", r"\(SGD, Nesterov, RMSprop, Adam\), got 'Momentum'"),
        ([Entrant.fixed("Adam", 0.1)], "Adam", r"\(there are none\), got 'Adam'"),
    ],
)
def test_impossible_comparisons_are_refused(entrants, baseline, message) -> None:
    with pytest.raises(ValueError, match=message):
        compare(meta.tasks.Quadratic(dim=3), entrants, setting(), baseline=baseline)
