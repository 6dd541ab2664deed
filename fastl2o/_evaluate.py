"""Learned rules against hand-designed optimizers: what ``fastl2o eval`` and the demo report.

Every optimizer starts from the same parameters and sees the same minibatches; each hand-designed
one gets its best learning rate out of a grid, found on other seeds than those reported.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ._inner_training import (
    HAND_DESIGNED,
    BuildOptimizer,
    MakeOptimizer,
    Task,
    hand_designed_stepper,
    learned_stepper,
    train_losses,
)
from .rules import Rule

__all__ = [
    "HAND_DESIGNED",
    "LEARNING_RATES",
    "Comparison",
    "Row",
    "Setting",
    "compare",
    "mean_std",
    "pick_learning_rate",
    "render_table",
    "threads",
    "train_losses",
]

LEARNING_RATES = tuple(10.0 ** (k / 2) for k in range(-10, 3))
"""1e-5 to 10 in half decades: 13 values."""


class Spread(NamedTuple):
    """Mean and standard deviation over runs."""

    mean: float
    std: float

    def __str__(self) -> str:
        return f"{self.mean:.4g} ±{self.std:.2g}"


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Use ``count`` torch threads in the block.

    One is right for small networks: their operations are too short to share, and two threads that
    wait for each other on a busy machine are many times slower than one.

    Raises:
        ValueError: fewer than one, or more than the machine has processors.
    """
    most = os.cpu_count() or 1
    if not 1 <= count <= most:
        raise ValueError(
            f"threads must be from 1 to {most}, this machine's processors; got {count}"
        )
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def mean_std(values: Tensor) -> Spread:
    """Mean and standard deviation (unbiased; 0 for a single value) of ``values (R,)``."""
    exact = values.double()
    std = exact.std().item() if len(exact) > 1 else 0.0
    return Spread(exact.mean().item(), std)


def pick_learning_rate(scores: Mapping[float, float]) -> float:
    """The rate with the smallest score; scores that are not finite count as infinitely bad.

    Example:
        >>> pick_learning_rate({0.1: 2.0, 1.0: 1.0, 10.0: float("nan")})
        1.0
    """
    return min(scores, key=lambda lr: _nan_last(scores[lr]))


@dataclass(frozen=True)
class Row:
    """Result of one optimizer on the reported seeds.

    Attributes:
        learning_rate: the tuned one; None for a learned rule, which has nothing to tune.
        edge: the tuned rate is the smallest or largest of the grid.
        values: by column ("step 100", "sum of 100", "last 10"), mean and spread over runs.
        ratios: learned rules only: mean divided by the smallest mean of a hand-designed optimizer.
        diverged: runs that went non-finite or ended above the loss they started from.
    """

    name: str
    learning_rate: float | None
    edge: bool
    values: dict[str, Spread]
    ratios: dict[str, float]
    diverged: int


@dataclass(frozen=True)
class Comparison:
    """Rows of all optimizers with the setting that they were measured in."""

    task: str
    horizon: int
    runs: int
    seed: int
    criterion: str
    learning_rates: list[float]
    rows: list[Row]

    def to_json(self) -> dict[str, Any]:
        """A JSON-able copy: spreads are ``{"mean": ..., "std": ...}``, non-finite numbers None."""

        def plain(value: Any) -> Any:
            if isinstance(value, Row):
                return plain(vars(value))
            if isinstance(value, Spread):
                return plain(value._asdict())
            if isinstance(value, dict):
                return {key: plain(item) for key, item in value.items()}
            if isinstance(value, list):
                return [plain(item) for item in value]
            return None if isinstance(value, float) and not math.isfinite(value) else value

        return {key: plain(value) for key, value in vars(self).items()}

    def table(self) -> str:
        """The comparison as text: mean ±std over runs, then ratios to the best tuned baseline."""
        columns = list(self.rows[0].values)
        lines = []
        for row in self.rows:
            lr = "-" if row.learning_rate is None else f"{row.learning_rate:.2g}" + "*" * row.edge
            values = [str(row.values[column]) for column in columns]
            lines.append([row.name, lr, *values, f"{row.diverged}/{self.runs}"])
        for row in self.rows:
            if row.ratios:
                ratios = [f"{row.ratios[column]:.2f}x" for column in columns]
                lines.append([f"{row.name} / best of the others", "", *ratios, ""])
        text = render_table(["optimizer", "lr", *columns, "diverged"], lines)
        if any(row.edge for row in self.rows):
            text += "\n* the best rate is at the edge of the grid"
        total, last = columns[-2:]
        return (
            f"{text}\n{total}: the losses before each of the {self.horizon} steps; {last}: mean at "
            "the end, the loss after the last step included;\ndiverged: runs that went non-finite "
            "or ended above their first loss"
        )


def render_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain-text table with aligned columns, the first to the left and the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        return "  ".join([cells[0].ljust(widths[0]), *padded[1:]]).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


@dataclass(frozen=True)
class Setting:
    """How a comparison is made.

    Attributes:
        horizon: inner steps.
        runs: runs reported, each with its own initial parameters and minibatches.
        tuning_runs: other runs, on which the learning rates are chosen.
        criterion: what a learning rate is chosen by: ``"sum"`` of the losses at the ``horizon``
            visited points, or ``"final"``, the mean loss of the last ``window`` points.
        steps: where to report the loss; by default a few up to the horizon.
    """

    horizon: int = 100
    runs: int = 16
    tuning_runs: int = 8
    seed: int = 0
    criterion: str = "sum"
    steps: tuple[int, ...] = ()
    learning_rates: tuple[float, ...] = LEARNING_RATES

    def __post_init__(self) -> None:
        for name in ("horizon", "runs", "tuning_runs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.criterion not in ("sum", "final"):
            raise ValueError(f"criterion must be 'sum' or 'final', got {self.criterion!r}")
        if not self.learning_rates:
            raise ValueError("learning_rates is empty: give at least one to tune over")
        outside = [step for step in self.steps if not 0 <= step <= self.horizon]
        if outside:
            raise ValueError(f"steps must lie in 0..{self.horizon} (the horizon), got {outside}")

    @property
    def window(self) -> int:
        """Points that the final loss is averaged over: minibatch losses are noisy."""
        return max(1, min(100, self.horizon // 10))

    @property
    def reported_steps(self) -> tuple[int, ...]:
        quarters = {max(1, round(self.horizon * share)) for share in (0.1, 0.25, 0.5, 1.0)}
        return self.steps or tuple(sorted(quarters))

    def columns(self, losses: Tensor) -> dict[str, Tensor]:
        """Reported quantities of ``losses (horizon + 1, R)``, each per run ``(R,)``."""
        columns = {f"step {step}": losses[step] for step in self.reported_steps}
        columns[f"sum of {self.horizon}"] = losses[:-1].sum(0)
        columns[f"last {self.window}"] = losses[-self.window :].mean(0)
        return columns

    def tuning_score(self, losses: Tensor) -> float:
        """What a learning rate is chosen by, smaller is better; NaN if a run went non-finite."""
        columns = self.columns(losses)
        name = f"sum of {self.horizon}" if self.criterion == "sum" else f"last {self.window}"
        return columns[name].mean().item()

    def diverged(self, losses: Tensor) -> int:
        """Number of runs that went non-finite or ended above the loss they started from."""
        worse = losses[-self.window :].mean(0) > losses[0]
        return int((worse | ~losses.isfinite().all(0)).sum())


def compare(
    task: Task,
    rules: Mapping[str, Rule],
    setting: Setting | None = None,
    *,
    hand_designed: Mapping[str, BuildOptimizer] = HAND_DESIGNED,
    progress: bool = False,
) -> Comparison:
    """Compare rules with hand-designed optimizers, each of these at its best learning rate.

    Args:
        task: a ``fastl2o.meta.tasks.Task``.
        rules: learned rules by the name to report them under; applied with ``lr=1``, untuned.
        hand_designed: the optimizers to compare with; ``{}`` for none.
        progress: show a progress bar, if stderr is a terminal.

    Example:
        >>> from fastl2o import LSTMRule, meta
        >>> setting = Setting(horizon=5, runs=2, tuning_runs=2, learning_rates=(0.01, 0.1))
        >>> comparison = compare(meta.tasks.Quadratic(dim=3), {"untrained": LSTMRule()}, setting)
        >>> [row.name for row in comparison.rows]
        ['untrained', 'SGD', 'Nesterov', 'RMSprop', 'Adam']
    """
    setting = setting or Setting()
    if not rules and not hand_designed:
        raise ValueError("nothing to compare: give rules, hand_designed optimizers, or both")
    if hand_designed and setting.criterion == "sum" and setting.horizon == 1:
        raise ValueError(
            "criterion 'sum' of horizon 1 is the loss before any step, the same for every learning "
            "rate: choose criterion 'final' or a longer horizon"
        )
    trainings = len(rules) + len(hand_designed) * (len(setting.learning_rates) + 1)
    # A seed far from the reported one; both are stated by the result, so it can be repeated.
    tuning_seed = setting.seed + 1_000_003
    with tqdm(
        total=trainings, disable=None if progress else True, desc="training runs", leave=False
    ) as bar:

        def losses(make: MakeOptimizer, runs: int, seed: int) -> Tensor:
            bar.update()
            return train_losses(task, make, horizon=setting.horizon, runs=runs, seed=seed)

        rows = []
        for name, build in hand_designed.items():
            scores = {
                lr: setting.tuning_score(
                    losses(
                        partial(hand_designed_stepper, build=build, lr=lr),
                        setting.tuning_runs,
                        tuning_seed,
                    )
                )
                for lr in setting.learning_rates
            }
            lr = pick_learning_rate(scores)
            tuned = partial(hand_designed_stepper, build=build, lr=lr)
            rows.append(_row(name, lr, losses(tuned, setting.runs, setting.seed), setting))
        columns = rows[0].values if rows else {}
        best = {c: min((row.values[c].mean for row in rows), key=_nan_last) for c in columns}
        learned = []
        for name, rule in rules.items():
            make = partial(learned_stepper, rule=rule)
            row = _row(name, None, losses(make, setting.runs, setting.seed), setting)
            row.ratios.update({c: row.values[c].mean / best[c] for c in best})
            learned.append(row)
    return Comparison(
        task=repr(task),
        horizon=setting.horizon,
        runs=setting.runs,
        seed=setting.seed,
        criterion=setting.criterion,
        learning_rates=list(setting.learning_rates),
        rows=learned + rows,
    )


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _row(name: str, lr: float | None, losses: Tensor, setting: Setting) -> Row:
    rates = setting.learning_rates
    return Row(
        name=name,
        learning_rate=lr,
        edge=len(rates) > 1 and lr in (min(rates), max(rates)),
        values={column: mean_std(values) for column, values in setting.columns(losses).items()},
        ratios={},
        diverged=setting.diverged(losses),
    )
