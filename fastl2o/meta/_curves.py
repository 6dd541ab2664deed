"""A picture of a training under way, from its log."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from .._figure import new_figure, save

__all__ = ["draw_training"]

# Points of a line: what lies between two of them is drawn as its mean.
_POINTS = 200


def _thinned(steps: np.ndarray, values: np.ndarray) -> tuple[list[float], list[float]]:
    """Means over stretches of equal length, of the finite values."""
    finite = np.isfinite(values)
    parts = np.array_split(np.arange(finite.sum()), min(_POINTS, max(1, finite.sum())))
    parts = [part for part in parts if len(part)]
    kept_steps, kept = steps[finite], values[finite]
    return [kept_steps[part].mean() for part in parts], [kept[part].mean() for part in parts]


def draw_training(log: Path, picture: Path) -> Path:
    """Meta-loss, norm of the meta-gradient and validation score against outer steps.

    Args:
        log: a ``log.csv``.
        picture: where to write; a picture that is there is replaced whole.
    """
    with open(log, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    steps = np.array([float(row["outer_step"]) for row in rows])
    figure = new_figure(11, 3.2, "leave 'curves' out of logs")
    panels = figure.subplots(1, 3)
    columns = {"meta_loss": "linear", "gradient_norm": "log", "validation": "linear"}
    for axes, (name, scale) in zip(panels, columns.items(), strict=True):
        values = np.array([float(row[name]) if row[name] else np.nan for row in rows])
        marker = "o" if name == "validation" else None
        axes.plot(*_thinned(steps, values), marker=marker, markersize=3)
        axes.set(xlabel="outer step", title=name.replace("_", " "), yscale=scale)
        axes.grid(alpha=0.3)
    return save(figure, picture)
