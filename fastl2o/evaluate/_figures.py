"""Pictures of comparisons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._figure import new_figure, save
from ._compare import Comparison

__all__ = ["draw_band", "draw_curves", "draw_generalisation"]

_COLUMNS = 3


def draw_band(axes: Any, steps: Sequence[int], values: Tensor, label: str, bold: bool) -> None:
    """Mean of ``values (P, R)`` over runs as a line, in a band of one standard deviation.

    Example:
        >>> import matplotlib.figure
        >>> axes = matplotlib.figure.Figure().add_subplot()
        >>> draw_band(axes, [0, 1, 2], torch.rand(3, 4), label="Adam", bold=False)
        >>> len(axes.lines), len(axes.collections)
        (1, 1)
    """
    mean = values.mean(1)
    mean[~mean.isfinite()] = math.nan  # a gap in the line
    std = values.std(1) if values.shape[1] > 1 else torch.zeros_like(mean)
    (line,) = axes.plot(steps, mean.tolist(), label=label, lw=2.5 if bold else 1.2)
    # Below a tenth of the mean the band would leave a logarithmic axis.
    low = torch.where(mean > 0, torch.maximum(mean - std, mean / 10), mean - std)
    axes.fill_between(
        steps, low.tolist(), (mean + std).tolist(), color=line.get_color(), alpha=0.15
    )


def draw_curves(comparisons: Sequence[Comparison], path: Path) -> Path:
    """Loss against steps, a panel for each task; the rules in thick lines."""
    panels = _panels(len(comparisons))
    for comparison, axes in zip(comparisons, panels, strict=True):
        means = []
        for row in comparison.rows:
            values = torch.tensor(row.curves).T
            means += values.mean(1).tolist()
            label = row.name if row.tuned is False else f"{row.name}, lr {row.learning_rate:.2g}"
            draw_band(axes, comparison.points, values, label, bold=row.learning_rate is None)
        _label(axes, comparison.name, "loss", means)
        # Losses that diverge would press all others flat.
        top = 10 * abs(sum(run[0] for run in comparison.rows[0].curves)) / comparison.runs
        if 0 < top < axes.get_ylim()[1]:
            axes.set_ylim(top=top)
    return save(panels[0].figure, path)


def draw_generalisation(comparisons: Sequence[Comparison], path: Path) -> Path:
    """Draw test minus training loss and how far twin runs are apart, a row of panels for each task.

    Apart in their parameters, and in the test examples' losses.
    """
    measured = [comparison for comparison in comparisons if comparison.generalisation is not None]
    panels = iter(_panels(3 * len(measured)))
    for comparison in measured:
        assert comparison.generalisation is not None
        rules = {row.name for row in comparison.rows if row.learning_rate is None}
        gap_axes, distance_axes, difference_axes = next(panels), next(panels), next(panels)
        for row in comparison.generalisation.rows:
            gap = torch.tensor(row.test_loss) - torch.tensor(row.train_loss)
            distance = torch.tensor(row.normalised_distance)
            difference = torch.tensor(row.loss_difference)
            for axes, values in (
                (gap_axes, gap),
                (distance_axes, distance),
                (difference_axes, difference),
            ):
                draw_band(axes, comparison.points, values.T, row.name, bold=row.name in rules)
        # A gap may have either sign, and what comes apart begins at 0: linear axes.
        _label(gap_axes, comparison.name, "test - training loss", [])
        _label(distance_axes, comparison.name, "distance, one example changed", [])
        _label(difference_axes, comparison.name, "loss difference, one example changed", [])
    return save(gap_axes.figure, path)


def _panels(count: int) -> list[Any]:
    columns = min(count, _COLUMNS)
    rows = math.ceil(count / columns)
    figure = new_figure(5.0 * columns, 3.6 * rows, "leave the report out")
    return [figure.add_subplot(rows, columns, index + 1) for index in range(count)]


def _label(axes: Any, title: str, quantity: str, means: Sequence[float]) -> None:
    finite = [value for value in means if math.isfinite(value)]
    logarithmic = bool(finite) and min(finite) > 0
    axes.set(
        xscale="symlog", yscale="log" if logarithmic else "linear", xlabel="step", ylabel=quantity
    )
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
