"""Learned rules against hand-designed optimizers on one task.

Every optimizer starts from the same parameters and sees the same minibatches; each hand-designed
one gets its best learning rate out of a grid, found on other seeds than those reported.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from ._generalisation import Generalisation, generalise
from ._measures import Spread, majority, mean_std, nan_last, pick_learning_rate
from ._optimizers import Entrant
from ._setting import Setting
from ._tables import plain, render_table
from ._training import Bar, Task, Trained, train, warm_up

__all__ = ["Comparison", "Reach", "Row", "check_entrants", "compare", "steps_of"]


class Reach(NamedTuple):
    """How soon runs got to the loss that the baseline ends at.

    Example:
        >>> from fastl2o import evaluate, meta
        >>> setting = evaluate.Setting(horizon=5, runs=2, tuning_runs=2, learning_rates=(0.01, 0.1))
        >>> entrants = [evaluate.Entrant.tuned("SGD"), evaluate.Entrant.fixed("Adam", 0.1)]
        >>> comparison = evaluate.compare(meta.tasks.Quadratic(dim=3), entrants, setting)
        >>> reach = comparison.rows[0].to_baseline  # the baseline's own: it is SGD
        >>> reach.reached, reach.steps <= setting.horizon
        (2, True)
    """

    steps: float  # by which more than half of the runs were there; infinity if no more are
    seconds: float  # elapsed then, for all runs together
    reached: int  # runs that got there
    each: list[float]  # steps of every run


@dataclass(frozen=True)
class Row:
    """Result of one optimizer on the reported seeds.

    Attributes:
        learning_rate: the tuned or given one; None for a learned rule.
        tuned: whether the rate was chosen out of the grid.
        edge: the tuned rate is the smallest or largest of the grid.
        values: by column ("step 100", "sum of 100", "last 10"), mean and spread over runs.
        ratios: learned rules only: mean divided by the smallest mean of a tuned optimizer.
        diverged: runs that went non-finite or ended above the loss they started from.
        to_baseline: how soon the runs got to the baseline's final loss; None without a baseline.
        seconds: elapsed for the whole horizon, all runs together; NaN if all went non-finite.
        curves: loss of each run at ``Comparison.points``.

    Example:
        >>> from fastl2o import evaluate, meta
        >>> setting = evaluate.Setting(horizon=5, runs=2, tuning_runs=2, learning_rates=(0.01, 0.1))
        >>> entrants = [evaluate.Entrant.tuned("SGD"), evaluate.Entrant.fixed("Adam", 0.1)]
        >>> comparison = evaluate.compare(meta.tasks.Quadratic(dim=3), entrants, setting)
        >>> [(row.name, row.tuned, row.diverged) for row in comparison.rows]
        [('SGD', True, 0), ('Adam, lr 0.1', False, 0)]
    """

    name: str
    learning_rate: float | None
    tuned: bool
    edge: bool
    values: dict[str, Spread]
    ratios: dict[str, float]
    diverged: int
    to_baseline: Reach | None
    seconds: float
    curves: list[list[float]]


@dataclass(frozen=True)
class Comparison:
    """Rows of all optimizers with the setting that they were measured in.

    Attributes:
        name: of the task, short.
        task: the task with its arguments.
        baseline: the tuned optimizer that the others are measured against; None if there is none.
        points: steps of the curves.

    Example:
        >>> from fastl2o import evaluate, meta
        >>> setting = evaluate.Setting(horizon=5, runs=2, tuning_runs=2, learning_rates=(0.01, 0.1))
        >>> entrants = [evaluate.Entrant.tuned("SGD"), evaluate.Entrant.fixed("Adam", 0.1)]
        >>> comparison = evaluate.compare(meta.tasks.Quadratic(dim=3), entrants, setting)
        >>> header, rows = comparison.cells()
        >>> header[:2], [row[0] for row in rows]
        (['optimizer', 'lr'], ['SGD', 'Adam, lr 0.1'])
    """

    name: str
    task: str
    horizon: int
    runs: int
    tuning_runs: int
    seed: int
    criterion: str
    learning_rates: list[float]
    baseline: str | None
    points: list[int]
    rows: list[Row]
    generalisation: Generalisation | None = field(default=None)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able copy: tuples with names are objects, non-finite numbers None."""
        return {key: plain(value) for key, value in vars(self).items()}

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the table, as text."""
        columns = list(self.rows[0].values)
        lines = []
        for row in self.rows:
            lr = "-" if row.learning_rate is None else f"{row.learning_rate:.2g}" + "*" * row.edge
            values = [str(row.values[column]) for column in columns]
            reach = [] if row.to_baseline is None else [self._reach_cell(row.to_baseline)]
            lines.append([row.name, lr, *values, *reach, f"{row.diverged}/{self.runs}"])
        reach = [] if self.baseline is None else [f"to {self.baseline}'s loss"]
        for row in self.rows:
            if row.ratios:
                ratios = [_times(row.ratios[column]) for column in columns]
                rest = [""] * len(reach)
                lines.append([f"{row.name} / best of the tuned", "", *ratios, *rest, ""])
        return ["optimizer", "lr", *columns, *reach, "diverged"], lines

    def _reach_cell(self, reach: Reach) -> str:
        if math.isfinite(reach.steps):
            text = f"{reach.steps:.0f} steps, {reach.seconds:.2g} s"
        else:
            text = "never"
        few = reach.reached < self.runs
        return text + (f" ({reach.reached}/{self.runs})" if few else "")

    def notes(self) -> list[str]:
        """What the columns of the table are, a sentence each."""
        total, last = list(self.rows[0].values)[-2:]
        notes = [
            f"{total}: the losses before each of the {self.horizon} steps",
            f"{last}: mean at the end, the loss after the last step included",
        ]
        if self.baseline is not None:
            notes.append(
                "to an optimizer's loss: steps after which more than half of the runs were where "
                f"that optimizer ends (mean of {last.split()[1]} losses, run by run), the seconds "
                f"of all {self.runs} runs until then, and how many got there if not all"
            )
        notes.append("diverged: runs that went non-finite or ended above their first loss")
        if any(row.edge for row in self.rows):
            notes.append("* the best rate is at the edge of the grid")
        return notes

    def table(self) -> str:
        """The comparison as text: mean ±std over runs, then ratios to the best tuned baseline."""
        text = render_table(*self.cells())
        if self.generalisation is not None:
            text += f"\n\n{render_table(*self.generalisation.cells())}"
        return text


def steps_of(entrants: Sequence[Entrant], setting: Setting, generalisation: bool = False) -> int:
    """Inner steps that ``compare`` takes, for a progress bar.

    Example:
        >>> from fastl2o import evaluate
        >>> setting = evaluate.Setting(horizon=100, learning_rates=(0.01, 0.1))
        >>> steps_of([evaluate.Entrant.tuned("SGD"), evaluate.Entrant.fixed("Adam", 0.1)], setting)
        400
    """
    tuned = sum(entrant.is_tuned for entrant in entrants)
    trainings = len(entrants) * (3 if generalisation else 1) + tuned * len(setting.learning_rates)
    return trainings * setting.horizon


def compare(
    task: Task,
    entrants: Sequence[Entrant],
    setting: Setting | None = None,
    *,
    name: str = "",
    baseline: str | None = None,
    generalisation: bool = False,
    bar: Bar | None = None,
) -> Comparison:
    """Compare rules with hand-designed optimizers.

    Args:
        task: a ``fastl2o.meta.tasks.Task``.
        entrants: the optimizers, in the order of the report.
        name: short name of the task; the task itself by default.
        baseline: the tuned entrant to measure the others against; by default the one that did best
            on the tuning runs.
        generalisation: also measure the gap to test data, and stability; the task must have test
            data (see ``check_generalisation``).
        bar: a progress bar of ``steps_of(...)`` steps.

    Raises:
        ValueError: without entrants, or for a baseline that is not a tuned one.

    Example:
        >>> from fastl2o import LSTMRule, meta
        >>> setting = Setting(horizon=5, runs=2, tuning_runs=2, learning_rates=(0.01, 0.1))
        >>> entrants = [Entrant.learned("untrained", LSTMRule()), *Entrant.baselines()]
        >>> comparison = compare(meta.tasks.Quadratic(dim=3), entrants, setting)
        >>> [row.name for row in comparison.rows]
        ['untrained', 'SGD', 'Nesterov', 'RMSprop', 'Adam']
    """
    setting = setting or Setting()
    check_entrants(entrants, setting, baseline)
    rates: dict[str, float | None] = {}
    best_scores: dict[str, float] = {}
    results: dict[str, Trained] = {}
    for entrant in entrants:
        warm_up(entrant.at(setting.learning_rates[0]))
        rate = entrant.learning_rate
        if entrant.is_tuned:
            scores = {
                lr: _tuning_score(task, entrant, lr, setting, bar) for lr in setting.learning_rates
            }
            rate = pick_learning_rate(scores)
            best_scores[entrant.name] = nan_last(scores[rate])
        rates[entrant.name] = rate
        results[entrant.name] = train(
            task,
            entrant.at(rate),
            horizon=setting.horizon,
            runs=setting.runs,
            seed=setting.seed,
            bar=bar,
        )
    if baseline is None and best_scores:
        baseline = min(best_scores, key=lambda name: best_scores[name])
    final = None if baseline is None else results[baseline].losses
    rows = [
        _row(entrant, rates[entrant.name], results[entrant.name], final, setting)
        for entrant in entrants
    ]
    tuned = [row for row in rows if row.tuned]
    if tuned:
        for entrant, row in zip(entrants, rows, strict=True):
            if entrant.rule is not None:
                for column, spread in row.values.items():
                    best = min((other.values[column].mean for other in tuned), key=nan_last)
                    row.ratios[column] = spread.mean / best
    measured = None
    if generalisation:
        makes = {entrant.name: entrant.at(rates[entrant.name]) for entrant in entrants}
        measured = generalise(task, makes, setting, baseline=baseline, bar=bar)
    return Comparison(
        name=name or repr(task),
        task=repr(task),
        horizon=setting.horizon,
        runs=setting.runs,
        tuning_runs=setting.tuning_runs,
        seed=setting.seed,
        criterion=setting.criterion,
        learning_rates=list(setting.learning_rates),
        baseline=baseline,
        points=list(setting.points),
        rows=rows,
        generalisation=measured,
    )


def check_entrants(entrants: Sequence[Entrant], setting: Setting, baseline: str | None) -> None:
    """Refuse what no comparison can be made of.

    Raises:
        ValueError: saying what is wrong and what to do.

    Example:
        >>> from fastl2o import evaluate
        >>> try:
        ...     check_entrants([], evaluate.Setting(), baseline=None)
        ... except ValueError as error:
        ...     print(error)
        nothing to compare: give rules, hand-designed optimizers, or both
    """
    if not entrants:
        raise ValueError("nothing to compare: give rules, hand-designed optimizers, or both")
    names = [entrant.name for entrant in entrants]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)} given more than once; give each optimizer once")
    tuned = [entrant.name for entrant in entrants if entrant.is_tuned]
    if baseline is not None and baseline not in tuned:
        raise ValueError(
            f"the baseline must be one of the optimizers that are tuned here "
            f"({', '.join(tuned) or 'there are none'}), got {baseline!r}"
        )
    if tuned and setting.criterion == "sum" and setting.horizon == 1:
        raise ValueError(
            "criterion 'sum' of horizon 1 is the loss before any step, the same for every learning "
            "rate: choose criterion 'final' or a longer horizon"
        )


def _times(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 1e4 else f"{ratio:.1e}x"


def _tuning_score(
    task: Task, entrant: Entrant, lr: float, setting: Setting, bar: Bar | None
) -> float:
    trained = train(
        task,
        entrant.at(lr),
        horizon=setting.horizon,
        runs=setting.tuning_runs,
        seed=setting.tuning_seed,
        bar=bar,
    )
    return setting.tuning_score(trained.losses)


def _row(
    entrant: Entrant,
    lr: float | None,
    trained: Trained,
    baseline: Tensor | None,
    setting: Setting,
) -> Row:
    rates, losses = setting.learning_rates, trained.losses
    return Row(
        name=entrant.name,
        learning_rate=lr,
        tuned=entrant.is_tuned,
        edge=entrant.is_tuned and len(rates) > 1 and lr in (min(rates), max(rates)),
        values={column: mean_std(values) for column, values in setting.columns(losses).items()},
        ratios={},
        diverged=setting.diverged(losses),
        to_baseline=None if baseline is None else _reach(trained, baseline, setting),
        seconds=trained.seconds[-1].item(),
        curves=losses[list(setting.points)].T.tolist(),
    )


def _reach(trained: Trained, baseline: Tensor, setting: Setting) -> Reach:
    each = setting.steps_to_final(trained.losses, baseline)
    steps = majority(each)
    seconds = trained.seconds[int(steps)].item() if math.isfinite(steps) else math.inf
    return Reach(steps, seconds, int(each.isfinite().sum()), each.tolist())
