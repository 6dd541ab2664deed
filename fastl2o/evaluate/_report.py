"""The report of comparisons on several tasks: Markdown, JSON and a picture."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .._figure import new_figure
from .._files import atomic_write
from .._version import __version__
from ._compare import Comparison
from ._figures import draw_curves, draw_generalisation
from ._tables import markdown_table, render_table

__all__ = ["check_report", "document", "render", "summary_cells", "write_report"]


def check_report() -> None:
    """Refuse a report that cannot be drawn, before anything is trained.

    Raises:
        RuntimeError: without matplotlib.

    Example:
        >>> check_report()  # matplotlib is there
    """
    new_figure(1, 1, "give --out a name that ends in .json, for the numbers alone")


def document(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Everything measured, JSON-able.

    Example:
        >>> from fastl2o import evaluate, meta
        >>> setting = evaluate.Setting(horizon=5, runs=2, tuning_runs=2, learning_rates=(0.01, 0.1))
        >>> entrants = [evaluate.Entrant.tuned("SGD"), evaluate.Entrant.fixed("Adam", 0.1)]
        >>> comparison = evaluate.compare(meta.tasks.Quadratic(dim=3), entrants, setting)
        >>> sorted(document([comparison]))
        ['comparisons', 'fastl2o', 'machine', 'torch']
    """
    return {
        "fastl2o": __version__,
        "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} thread(s)",
        "comparisons": [comparison.to_json() for comparison in comparisons],
    }


def summary_cells(comparisons: Sequence[Comparison]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table over tasks: how often each optimizer did what.

    Example:
        >>> from fastl2o import evaluate, meta
        >>> setting = evaluate.Setting(horizon=5, runs=2, tuning_runs=2, learning_rates=(0.01, 0.1))
        >>> entrants = [evaluate.Entrant.tuned("SGD"), evaluate.Entrant.fixed("Adam", 0.1)]
        >>> comparison = evaluate.compare(meta.tasks.Quadratic(dim=3), entrants, setting)
        >>> summary_cells([comparison])[0]
        ['optimizer', 'lowest last loss', "got to the baseline's loss", 'diverged runs']
    """
    rows = []
    for index, first in enumerate(comparisons[0].rows):
        lowest = reached = diverged = 0
        for comparison in comparisons:
            row = comparison.rows[index]
            column = list(row.values)[-1]
            finals = [other.values[column].mean for other in comparison.rows]
            finite = [value for value in finals if math.isfinite(value)]
            lowest += bool(finite) and row.values[column].mean == min(finite)
            reached += row.to_baseline is not None and math.isfinite(row.to_baseline.steps)
            diverged += row.diverged
        baseline = f"{reached}/{len(comparisons)}" if first.to_baseline is not None else "-"
        total = sum(comparison.runs for comparison in comparisons)
        counts = [f"{lowest}/{len(comparisons)}", baseline, f"{diverged}/{total}"]
        rows.append([first.name, *counts])
    return ["optimizer", "lowest last loss", "got to the baseline's loss", "diverged runs"], rows


def render(comparisons: Sequence[Comparison]) -> str:
    """All tables as text, for a terminal.

    Example:
        >>> from fastl2o import evaluate, meta
        >>> setting = evaluate.Setting(horizon=5, runs=2, tuning_runs=2, learning_rates=(0.01, 0.1))
        >>> entrants = [evaluate.Entrant.tuned("SGD"), evaluate.Entrant.fixed("Adam", 0.1)]
        >>> comparison = evaluate.compare(meta.tasks.Quadratic(dim=3), entrants, setting)
        >>> text = render([comparison])
        >>> "rates chosen by sum on 2 others" in text
        True
    """
    parts = [f"{_title(comparison)}\n{comparison.table()}" for comparison in comparisons]
    if len(comparisons) > 1:
        parts.append(f"all {len(comparisons)} tasks\n{render_table(*summary_cells(comparisons))}")
    return "\n\n".join(parts) + "\n" + ";\n".join(_notes(comparisons))


def _notes(comparisons: Sequence[Comparison]) -> list[str]:
    """What the columns of all tables are, each once."""
    notes = [note for comparison in comparisons for note in comparison.notes()]
    measured = [c.generalisation for c in comparisons if c.generalisation is not None]
    notes += [note for generalisation in measured for note in generalisation.notes()]
    return list(dict.fromkeys(notes))


def _title(comparison: Comparison) -> str:
    tuned = any(row.tuned for row in comparison.rows)
    rates = (
        f", rates chosen by {comparison.criterion} on {comparison.tuning_runs} others"
        if tuned
        else ""
    )
    return f"{comparison.task}, {comparison.runs} runs{rates}"


def write_report(comparisons: Sequence[Comparison], folder: Path) -> list[Path]:
    """Write ``report.md``, ``report.json``, ``curves.png`` and what generalisation looked like.

    ``generalisation.png`` is written if a comparison has it.

    Args:
        folder: where; made if it is not there.

    Returns:
        What was written.

    Raises:
        RuntimeError: without matplotlib.
        OSError: a file cannot be written; the message names it.

    Example:
        >>> import tempfile
        >>> from fastl2o import evaluate, meta
        >>> setting = evaluate.Setting(horizon=5, runs=2, tuning_runs=2, learning_rates=(0.01, 0.1))
        >>> entrants = [evaluate.Entrant.tuned("SGD"), evaluate.Entrant.fixed("Adam", 0.1)]
        >>> comparison = evaluate.compare(meta.tasks.Quadratic(dim=3), entrants, setting)
        >>> folder = Path(tempfile.mkdtemp())
        >>> [path.name for path in write_report([comparison], folder)]
        ['report.md', 'report.json', 'curves.png']
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "report.md", folder / "report.json", folder / "curves.png"]
    measured = any(comparison.generalisation is not None for comparison in comparisons)
    draw_curves(comparisons, paths[2])
    if measured:
        paths.append(draw_generalisation(comparisons, folder / "generalisation.png"))
    text = json.dumps(document(comparisons), indent=1, allow_nan=False)
    atomic_write(paths[1], f"{text}\n".encode())
    atomic_write(paths[0], _markdown(comparisons, measured).encode())
    return paths


def _markdown(comparisons: Sequence[Comparison], measured: bool) -> str:
    first = comparisons[0]
    parts = [
        "# Evaluation of optimizers",
        f"Each task: {first.runs} runs of {first.horizon} steps (seed {first.seed}). All "
        "optimizers start from the same parameters and see the same minibatches. Numbers are mean "
        "±standard deviation over runs; curves of all runs are in report.json.",
    ]
    if any(row.tuned for row in first.rows):
        rates = first.learning_rates
        criterion = "sum of losses" if first.criterion == "sum" else "final loss"
        parts.append(
            "Hand-designed optimizers that are not named with a rate have the best of "
            f"{len(rates)} learning rates from {min(rates):.2g} to {max(rates):.2g}, by the "
            f"{criterion} on {first.tuning_runs} other runs of the task."
        )
    parts.append("![losses](curves.png)")
    if len(comparisons) > 1:
        parts += ["## All tasks", markdown_table(*summary_cells(comparisons))]
    for comparison in comparisons:
        parts += [f"## {comparison.name}", f"`{comparison.task}`"]
        parts.append(markdown_table(*comparison.cells()))
        if comparison.generalisation is not None:
            table = markdown_table(*comparison.generalisation.cells())
            parts += [f"### Generalisation: {comparison.name}", table]
    if measured:
        parts.append("![generalisation](generalisation.png)")
    parts += ["## Columns", "\n".join(f"- {note}" for note in _notes(comparisons))]
    return "\n\n".join(parts) + "\n"
