"""The trainer: learning, selection, non-finite windows, kills and full disks."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

import fastl2o
from fastl2o import meta
from fastl2o.meta.schedules import as_horizon, draw_horizon
from fastl2o.meta.tasks import Quadratic, TaskRun
from fastl2o.rules import Rule

ROOT = Path(__file__).resolve().parents[1]


def small_rule(seed: int = 0) -> Rule:
    rule = fastl2o.LSTMRule(hidden_size=4, num_layers=1, preprocess="identity")
    rule.reset_parameters(torch.Generator().manual_seed(seed))
    return rule


def small_trainer(**options: Any) -> meta.MetaTrainer:
    rule = options.pop("rule", None) or small_rule()
    settings: dict[str, Any] = {
        "tasks": [Quadratic(dim=3)],
        "estimator": meta.TruncatedBPTT(4),
        "horizon": 12,
        "runs": 4,
        "progress": False,
        **options,
    }
    return meta.MetaTrainer(rule, **settings)


def numbers(trainer: meta.MetaTrainer) -> list[Tensor]:
    """Everything that a continued training must have the bits of."""
    found: list[Tensor] = []

    def collect(value: Any) -> None:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                collect(value[key])
        elif isinstance(value, list):
            for item in value:
                collect(item)
        elif isinstance(value, (int, float)):
            found.append(torch.tensor(value, dtype=torch.float64))

    collect(trainer.state_dict())
    return found


def assert_same_bits(first: meta.MetaTrainer, second: meta.MetaTrainer) -> None:
    ours, theirs = numbers(first), numbers(second)
    assert len(ours) == len(theirs) > 20
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_training_lowers_the_losses_and_keeps_the_best() -> None:
    trainer = small_trainer(
        runs=32,
        optimizer=None,
        validation=meta.Validation(every=20, runs=32),
    )
    task = Quadratic(dim=3)
    before = meta.run_losses(trainer.rule, task, runs=64, horizon=12, seed=5)[-1].mean()
    result = trainer.fit(160)
    after = meta.run_losses(trainer.best_rule, task, runs=64, horizon=12, seed=5)[-1].mean()
    assert after < 0.7 * before
    assert result.outer_steps == 160
    assert result.best_step is not None
    assert result.best_step % 20 == 0
    assert result.best_score <= result.last_score
    assert result.skipped == 0


def test_best_rule_is_the_rule_at_its_best_validation() -> None:
    validation = meta.Validation(every=5, runs=8, metric="final")
    rule = small_rule()
    # Climbing makes the rule worse and worse.
    optimizer = torch.optim.SGD(rule.parameters(), lr=0.02, maximize=True)
    trainer = small_trainer(rule=rule, optimizer=optimizer, validation=validation)
    scores, kept = [], []
    for outer_steps in range(5, 45, 5):
        scores.append(trainer.fit(outer_steps).last_score)
        kept.append([p.detach().clone() for p in trainer.rule.parameters()])
    best = scores.index(min(scores))
    assert best < len(scores) - 1
    assert trainer.best_step == 5 * (best + 1)
    for got, expected in zip(trainer.best_rule.parameters(), kept[best], strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("metric", ["sum", "final", "log"])
def test_validation_scores(metric: str) -> None:
    rule, task = small_rule(), Quadratic(dim=3)
    validation = meta.Validation(runs=5, metric=metric, tasks=[task, Quadratic(dim=2)])
    score = validation.score(rule, [], 20, torch.float32)
    assert score == validation.score(rule, [], 20, torch.float32)
    expected = []
    for index, dim in enumerate((3, 2)):
        losses = meta.run_losses(
            rule, Quadratic(dim=dim), runs=5, horizon=20, seed=2**40 + index
        ).double()
        assert losses.shape == (21, 5)
        expected.append(
            {
                "sum": losses[:20].sum(dim=0),
                "final": losses[19:].mean(dim=0),
                "log": (losses[1:] / losses[0]).log().mean(dim=0),
            }[metric].mean()
        )
    assert score == pytest.approx(float(sum(expected)) / 2, rel=1e-9)


def test_a_rule_that_diverges_on_validation_is_never_best() -> None:
    class Nan(Quadratic):
        def sample(self, *args: Any, **kwargs: Any) -> TaskRun:
            run = super().sample(*args, **kwargs)
            run.tensors["target"][0, 0] = torch.nan
            return run

    trainer = small_trainer(validation=meta.Validation(every=1, tasks=[Nan(dim=3)]))
    result = trainer.fit(2)
    assert result.last_score == math.inf
    assert result.best_step is None


class Breaking(Quadratic):
    """Every third batch of runs is broken: NaN, infinite or exploding losses from some step on."""

    def __init__(self, dim: int, kind: str, period: int = 3) -> None:
        super().__init__(dim)
        self.kind, self.period, self.sampled = kind, period, 0

    def sample(self, *args: Any, **kwargs: Any) -> TaskRun:
        run = super().sample(*args, **kwargs)
        self.sampled += 1
        if self.sampled % self.period == 0:
            inner, factor = run.loss_and_grad, {"nan": torch.nan, "inf": torch.inf, "huge": 1e9}
            calls = iter(range(10**6))

            def broken(params: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
                losses, grads = inner(params, batch)
                scale = factor[self.kind] if next(calls) >= 2 else 1.0
                return losses * scale, grads * scale

            run.loss_and_grad = broken
        return run


@pytest.mark.parametrize("kind", ["nan", "inf", "huge"])
def test_broken_windows_are_skipped_and_counted(kind: str) -> None:
    task = Breaking(3, kind)
    trainer = small_trainer(tasks=[task])
    trainer.fit(6)
    before = [p.detach().clone() for p in trainer.rule.parameters()]
    result = trainer.fit(7)  # the first window of the third batch of runs
    assert result.skipped == 1
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.rule.parameters(), strict=True))
    result = trainer.fit(14)
    assert task.sampled == 6  # a skipped window draws new runs: 3 + 3 + 1 + 3 + 3 + 1 windows
    assert result.skipped == 2
    assert all(torch.isfinite(p).all() for p in trainer.rule.parameters())


def test_training_stops_when_every_window_is_broken() -> None:
    trainer = small_trainer(tasks=[Breaking(3, "nan", period=1)])
    with pytest.raises(RuntimeError, match="100 updates in a row were skipped"):
        trainer.fit(1000)
    assert trainer.outer_step == 100


def test_updates_are_what_the_optimizer_makes_of_the_clipped_gradient() -> None:
    rule = small_rule()
    trainer = small_trainer(
        rule=rule,
        optimizer=torch.optim.SGD(rule.parameters(), lr=0.5),
        clip_grad=0.1,
        schedule=lambda outer_step: 1.0 / (outer_step + 1),
    )
    for outer_step in range(2):
        before = rule.flat_parameters().detach()
        trainer.fit(outer_step + 1)
        moved = (rule.flat_parameters().detach() - before).norm().item()
        assert moved == pytest.approx(0.1 * 0.5 / (outer_step + 1), rel=1e-4)


def test_horizons_and_groups(tmp_path: Path) -> None:
    trainer = small_trainer(
        horizon=[(0, 6), (4, (8, 30))],
        groups=2,
        checkpoint_dir=tmp_path,
    )
    trainer.fit(30)
    with open(tmp_path / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["outer_step"] for row in rows] == [str(i + 1) for i in range(30)]
    for rows_of_group in (rows[0::2], rows[1::2]):
        position = 0
        for row in rows_of_group:
            horizon = int(row["horizon"])
            assert int(row["inner_step"]) == min(position + 4, horizon)
            position = int(row["inner_step"]) % horizon
    assert {row["horizon"] for row in rows[:4]} == {"6"}
    later = {int(row["horizon"]) for row in rows[8:]}
    assert later <= set(range(8, 31))
    assert len(later) > 1


def test_log_uniform_horizons() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = [draw_horizon(as_horizon((10, 1000)), 0, generator) for _ in range(2000)]
    assert min(draws) >= 10
    assert max(draws) <= 1000
    below = sum(draw < 100 for draw in draws) / 2000
    assert below == pytest.approx(0.5, abs=0.05)
    assert draw_horizon(as_horizon((7, 7)), 0, generator) == 7


def test_exponential_lengths() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = as_horizon({"mean": 40, "minimum": 10, "maximum": 200})
    assert lengths == meta.Exponential(40, 10, 200)
    draws = torch.tensor([draw_horizon(lengths, 0, generator) for _ in range(4000)]).double()
    assert draws.min() == 10
    assert draws.max() == 200
    # Half of the exponential part lies below mean * ln 2, and cutting at the maximum costs little.
    assert float(draws.median()) == pytest.approx(10 + 40 * math.log(2), abs=2.0)
    assert float(draws.mean()) == pytest.approx(10 + 40 * (1 - math.exp(-190 / 40)), abs=2.0)


def test_unrolls_are_drawn_for_each_batch_of_runs(tmp_path: Path) -> None:
    trainer = small_trainer(horizon=12, unroll=(2, 6), checkpoint_dir=tmp_path)
    trainer.fit(80)
    with open(tmp_path / "log.csv", newline="") as file:
        ends = [int(row["inner_step"]) for row in csv.DictReader(file)]
    unrolls = set()
    while 12 in ends:
        run, ends = ends[: ends.index(12) + 1], ends[ends.index(12) + 1 :]
        assert run == [*range(run[0], 12, run[0]), 12]
        unrolls.add(run[0])
    assert unrolls == {2, 3, 4, 5, 6}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": []}, "tasks must be"),
        ({"tasks": Quadratic()}, "tasks must be a sequence"),
        ({"runs": 0}, "runs must be"),
        ({"groups": 1.5}, "groups must be"),
        ({"horizon": 0}, "horizon must be"),
        ({"horizon": (20, 10)}, "low <= high"),
        ({"horizon": (1, 2, 3)}, "horizon must be an int or a"),
        ({"horizon": [(1, 100)]}, "rise from 0"),
        ({"horizon": "long"}, "horizon must be"),
        ({"horizon": {"mean": 3}}, "must hold mean, minimum and maximum"),
        ({"horizon": {"mean": 3, "minimum": 9, "maximum": 8}}, "maximum must be"),
        ({"unroll": 0}, "unroll must be"),
        ({"clip_grad": 0}, "clip_grad must be"),
        ({"divergence": -1.0}, "divergence must be"),
        ({"seed": -1}, "seed must be"),
        ({"task_weights": [1.0, 2.0]}, "one number for each of 1 tasks"),
        ({"task_weights": [0.0]}, "task_weights must be"),
        ({"optimizer": torch.optim.Adam(small_rule().parameters())}, "exactly rule.parameters"),
        ({"optimizer": "adam"}, "optimizer must be of type Optimizer, such as torch.optim.Adam"),
        ({"rule": "lstm"}, "rule must be of type Rule, such as fastl2o.LSTMRule"),
        ({"rule": torch.nn.LSTM(2, 2)}, "rule must be of type Rule"),
        ({"estimator": 20}, "estimator must be of type Estimator, such as"),
        ({"schedule": 3}, "schedule must be of type Callable, such as"),
        ({"validation": 5}, "validation must be of type Validation, such as"),
        ({"imitation": 0.3}, "imitation must be of type Imitation, such as"),
        ({"task_weights": 2.0}, "one number for each of 1 tasks"),
        ({"checkpoint_every": 0}, "checkpoint_every must be"),
    ],
    ids=str,
)
def test_impossible_settings_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        small_trainer(**options)


def test_imitation_leaves_the_main_optimizer_alone() -> None:
    trainer = small_trainer(imitation=meta.Imitation(probability=1.0))
    before = [p.detach().clone() for p in trainer.rule.parameters()]
    trainer.fit(5)
    assert not trainer.optimizer.state
    assert not all(
        torch.equal(a, b) for a, b in zip(before, trainer.rule.parameters(), strict=True)
    )


def test_progress_bar(capfd: pytest.CaptureFixture[str]) -> None:
    small_trainer(progress=True).fit(3)
    assert "meta-training: 100%" in capfd.readouterr().err
    small_trainer(progress=None).fit(3)
    assert capfd.readouterr().err == ""


def test_frozen_parameters_of_the_rule_stay() -> None:
    trainer = small_trainer()
    for parameter in trainer.rule.readout.parameters():
        parameter.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in trainer.rule.named_parameters()}
    trainer.fit(2)
    changed = {n for n, p in trainer.rule.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {name for name in before if not name.startswith("readout")}


def test_an_update_that_overflows_is_taken_back() -> None:
    rule = fastl2o.LSTMRule(hidden_size=4, num_layers=1, preprocess="identity")
    optimizer = torch.optim.SGD(rule.parameters(), lr=1e38)
    trainer = meta.MetaTrainer(
        rule,
        tasks=[meta.tasks.Quadratic(dim=3)],
        optimizer=optimizer,
        horizon=20,
        runs=4,
        progress=False,
        divergence=None,
    )
    with torch.no_grad():
        rule.readout.weight.fill_(1.0)
    trainer.fit(3)
    assert trainer.skipped > 0
    assert bool(torch.isfinite(rule.flat_parameters()).all())


@pytest.mark.parametrize("lr", [float("inf"), float("nan"), -1.0])
def test_learning_rate_of_the_optimizer_must_be_finite(lr: float) -> None:
    rule = fastl2o.LSTMRule(hidden_size=4, num_layers=1)
    optimizer = torch.optim.SGD(rule.parameters(), lr=0.1)
    optimizer.param_groups[0]["lr"] = lr
    with pytest.raises(ValueError, match="the optimizer's lr"):
        meta.MetaTrainer(rule, tasks=[meta.tasks.Quadratic(dim=3)], optimizer=optimizer)


def test_tensorboard_and_curves_show_what_the_log_holds(tmp_path: Path) -> None:
    logs = ("tensorboard", "curves")
    small_trainer(checkpoint_dir=tmp_path, checkpoint_every=5, logs=logs).fit(5)
    first = (tmp_path / "curves.png").read_bytes()
    small_trainer(checkpoint_dir=tmp_path, checkpoint_every=5, logs=logs).fit(20)
    assert first.startswith(b"\x89PNG")
    assert (tmp_path / "curves.png").read_bytes() != first
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    with open(tmp_path / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    shown = {event.step: event.value for event in events.Scalars("meta_loss")}
    assert shown == pytest.approx({int(r["outer_step"]): float(r["meta_loss"]) for r in rows})


@pytest.mark.parametrize("logs", [("csv",), "curves", 3])
def test_unknown_logs_are_named(logs: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="logs must be"):
        small_trainer(logs=logs)
