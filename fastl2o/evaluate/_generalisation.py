"""Generalisation: the gap between test and training loss, and stability.

Stability (Hardt, Recht and Singer, arXiv 1509.01240) is how far two runs come apart whose training
sets differ in one example, from the same start and on the same minibatches: an optimizer under
which they stay close generalises.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from ._measures import gap_at_level, mean_std, normalised_distance
from ._setting import Setting
from ._training import Bar, MakeOptimizer, Task, TaskRun, training

__all__ = ["Gap", "Generalisation", "GeneralisationRow", "check_generalisation", "generalise"]


@runtime_checkable
class DataRun(TaskRun, Protocol):
    """A run on a training set, beside which there are test data."""

    def example_losses(self, params: Tensor, held_out: bool) -> Tensor:
        """Losses ``(R, N)`` of all training examples, or of all test examples."""
        ...

    def twin(self, generator: torch.Generator) -> TaskRun:
        """The same runs, each with one training example replaced."""
        ...


class Gap(NamedTuple):
    """Test minus training loss over the runs that reached a training loss.

    Example:
        >>> Gap(mean=0.25, std=0.0, reached=1).reached
        1
    """

    mean: float
    std: float
    reached: int


@dataclass(frozen=True)
class GeneralisationRow:
    """What one optimizer did; lists are of one list a run, a number for each point.

    Attributes:
        train_loss, test_loss: over the whole training set and all test data.
        distance, normalised_distance: of the parameters from those of the twin run.
        loss_difference: mean over test examples of the absolute difference of their losses under
            the two parameters.
        separated: runs that came apart from their twins: whose minibatches held the example in
            which the training sets differ.
        gap_at_equal_loss: by step s, the gap where the training loss first falls to the baseline's
            training loss after s steps, in the same run; empty without a baseline.

    Example:
        >>> from fastl2o import evaluate, meta
        >>> task = meta.tasks.MLPClassification("digits", hidden=(4,), split="meta_valid")
        >>> makes = {"Adam": evaluate.Entrant.fixed("Adam", 0.01).at(0.01)}
        >>> result = evaluate.generalise(task, makes, evaluate.Setting(horizon=5, runs=2))
        >>> row = result.rows[0]
        >>> len(row.train_loss) == 2, len(row.train_loss[0]) == len(result.points)
        (True, True)
    """

    name: str
    train_loss: list[list[float]]
    test_loss: list[list[float]]
    distance: list[list[float]]
    normalised_distance: list[list[float]]
    loss_difference: list[list[float]]
    separated: int
    gap_at_equal_loss: dict[str, Gap]

    def final(self, name: str) -> str:
        """Mean ±std over runs of a list's last numbers, as text."""
        return str(mean_std(torch.tensor([run[-1] for run in getattr(self, name)])))


@dataclass(frozen=True)
class Generalisation:
    """Rows of all optimizers; ``points`` are the steps of their lists.

    Example:
        >>> from fastl2o import evaluate, meta
        >>> task = meta.tasks.MLPClassification("digits", hidden=(4,), split="meta_valid")
        >>> makes = {"Adam": evaluate.Entrant.fixed("Adam", 0.01).at(0.01)}
        >>> result = evaluate.generalise(task, makes, evaluate.Setting(horizon=5, runs=2))
        >>> result.runs, [row.name for row in result.rows]
        (2, ['Adam'])
    """

    points: list[int]
    runs: int
    baseline: str | None
    rows: list[GeneralisationRow]

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the table, as text."""
        levels = list(self.rows[0].gap_at_equal_loss)
        lines = []
        for row in self.rows:
            gaps = [self._gap_cell(row.gap_at_equal_loss[level]) for level in levels]
            numbers = ("train_loss", "test_loss", "normalised_distance", "loss_difference")
            train, test, distance, difference = map(row.final, numbers)
            separated = f"{row.separated}/{self.runs}"
            lines.append([row.name, train, test, *gaps, distance, difference, separated])
        header = [f"gap at {self.baseline}'s loss of {level}" for level in levels]
        ends = ("distance", "loss difference", "apart")
        return ["optimizer", "training loss", "test loss", *header, *ends], lines

    def _gap_cell(self, gap: Gap) -> str:
        if not gap.reached:
            return "not reached"
        few = f" ({gap.reached}/{self.runs})" if gap.reached < self.runs else ""
        return f"{gap.mean:.3g} ±{gap.std:.2g}{few}"

    def notes(self) -> list[str]:
        """What the columns of the table are, a sentence each."""
        notes = [
            f"training and test loss: over the whole sets after {self.points[-1]} steps",
        ]
        if self.rows[0].gap_at_equal_loss:
            notes.append(
                "gap at an optimizer's loss of step s: test minus training loss where the training "
                "loss first falls to that optimizer's after s steps, run by run (how many runs got "
                "there, if not all)"
            )
        notes.append(
            "distance and loss difference: between runs whose training sets differ in one example, "
            "same start and minibatches (arXiv 1509.01240): sqrt(|w - w'|^2 / (|w|^2 + |w'|^2)) "
            "after the last step, and the mean absolute difference of the test examples' losses; "
            "apart: runs that came apart, whose minibatches held that example"
        )
        return notes


def check_generalisation(task: Task, setting: Setting) -> None:
    """Refuse a task whose generalisation cannot be measured, before anything is trained.

    Raises:
        ValueError: for a task without training and test data, saying what to do.

    Example:
        >>> from fastl2o import meta
        >>> try:
        ...     check_generalisation(meta.tasks.Quadratic(dim=3), Setting(runs=1))
        ... except ValueError as error:
        ...     print("no training and test data" in str(error))
        True
    """
    _pair(task, setting)


def _pair(task: Task, setting: Setting) -> tuple[DataRun, TaskRun]:
    """Fresh runs and their twins."""
    run = task.sample(setting.runs, torch.Generator().manual_seed(setting.seed))
    if not isinstance(run, DataRun):
        raise ValueError(
            f"{task!r} has no training and test data to measure generalisation on; take a task on "
            "images without transforms (mnist, digits, or a recipe's mlp, conv or autoencoder)"
        )
    return run, run.twin(torch.Generator().manual_seed(setting.tuning_seed))


class _Record:
    """Measurements ``(P, R)`` of one optimizer."""

    def __init__(self, points: Sequence[int], runs: int) -> None:
        self.rows = {step: index for index, step in enumerate(points)}
        names = ("train_loss", "test_loss", "distance", "normalised_distance", "loss_difference")
        self.values = {
            name: torch.full((len(points), runs), math.nan, dtype=torch.float64) for name in names
        }
        self.separated = torch.zeros(runs, dtype=torch.bool)

    def add(self, step: int, run: DataRun, params: Tensor, other: Tensor) -> None:
        test, other_test = (run.example_losses(w, held_out=True).double() for w in (params, other))
        found = {
            "train_loss": run.example_losses(params, held_out=False).double().mean(1),
            "test_loss": test.mean(1),
            "distance": (params - other).double().norm(dim=1),
            "normalised_distance": normalised_distance(params, other),
            "loss_difference": (test - other_test).abs().mean(1),
        }
        for name, values in found.items():
            self.values[name][self.rows[step]] = values
        self.separated |= (params != other).any(1)


def generalise(
    task: Task,
    makes: Mapping[str, MakeOptimizer],
    setting: Setting,
    *,
    baseline: str | None = None,
    bar: Bar | None = None,
) -> Generalisation:
    """Train pairs of runs whose training sets differ in one example; measure at log-spaced steps.

    Args:
        task: whose runs are on a training set, such as ``meta.tasks.MLPClassification``.
        makes: what steps the runs, by name.
        baseline: the name whose training losses are the levels of ``gap_at_equal_loss``.
        bar: a progress bar; advanced by ``2 * horizon`` for each optimizer.

    Raises:
        ValueError: for a task without training and test data.

    Example:
        >>> from fastl2o import evaluate, meta
        >>> task = meta.tasks.MLPClassification("digits", hidden=(4,), split="meta_valid")
        >>> makes = {"Adam": evaluate.Entrant.fixed("Adam", 0.01).at(0.01)}
        >>> report = generalise(task, makes, Setting(horizon=5, runs=2))
        >>> report.points, len(report.rows[0].distance)
        ([0, 1, 2, 3, 4, 5], 2)
    """
    records: dict[str, _Record] = {}
    for name, make in makes.items():
        run, twin = _pair(task, setting)
        record = records[name] = _Record(setting.points, setting.runs)
        last = 0
        # Ends with the first of the two that goes non-finite in all of its runs.
        pairs = zip(
            training(run, make, setting.horizon),
            training(twin, make, setting.horizon),
            strict=False,
        )
        for point, other in pairs:
            if point.step in record.rows:
                record.add(point.step, run, point.params, other.params)
            if bar is not None:
                bar.update(2 * (point.step - last))
            last = point.step
        if bar is not None:
            bar.update(2 * (setting.horizon - last))
    levels = None if baseline is None else records[baseline].values["train_loss"]
    return Generalisation(
        points=list(setting.points),
        runs=setting.runs,
        baseline=baseline,
        rows=[_row(name, record, levels, setting) for name, record in records.items()],
    )


def _row(name: str, record: _Record, levels: Tensor | None, setting: Setting) -> GeneralisationRow:
    gaps = {}
    for step in setting.reported_steps if levels is not None else ():
        assert levels is not None
        train, test = record.values["train_loss"], record.values["test_loss"]
        found = gap_at_level(train, test, levels[record.rows[step]])
        found = found[found.isfinite()]
        spread = mean_std(found) if len(found) else (math.nan, math.nan)
        gaps[f"step {step}"] = Gap(*spread, len(found))
    lists = {key: values.T.tolist() for key, values in record.values.items()}
    separated = int(record.separated.sum())
    return GeneralisationRow(name=name, separated=separated, gap_at_equal_loss=gaps, **lists)
