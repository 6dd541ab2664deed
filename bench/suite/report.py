"""The suite's tables and plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

CURVES = {
    "coordinates": "ns a coordinate of one tensor, by its coordinates",
    "tensors": "ns a coordinate of 100,000, by the tensors that they lie in",
    "threads": "ns a coordinate of 100,000 in one tensor, by threads",
    "unroll length": "ns a coordinate and step of a window's meta-gradient, by its length",
}


def cell(value: Any) -> str:
    """A value as it stands in a table."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of a Markdown table; all rows have the keys of the first; gates stand above it."""
    if not rows:
        return ["(nothing)"]
    names = [name for name in rows[0] if name != "gate"]
    lines = ["| " + " | ".join(names) + " |", "| " + " | ".join(["---"] * len(names)) + " |"]
    return lines + ["| " + " | ".join(cell(row[name]) for name in names) + " |" for row in rows]


def _curve_rows(curves: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    points = sorted({x for curve in curves for x in curve["x"]})
    return [
        {
            "rule": curve["rule"],
            **{f"{x:,}": dict(zip(curve["x"], curve["ns"], strict=True)).get(x) for x in points},
        }
        for curve in curves
    ]


def markdown(result: dict[str, Any]) -> str:
    """The whole report.

    Raises:
        ValueError: a row says of no gate that it has passed it.
    """
    parts = {part: result[part] for part in ("steps", "curves", "training")}
    ungated = [part for part, rows in parts.items() if not all(row.get("gate") for row in rows)]
    if ungated:
        raise ValueError(f"rows of {', '.join(ungated)} have no gate; gate them before timing them")
    machine = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    lines = ["# Benchmark suite", "", machine, ""]
    lines += [
        "Made by `python -m bench.suite`. Medians of interleaved rounds in one process. Every row",
        "passed a gate before it was timed, at each point of a curve; a run stops where one fails.",
        "Steps, torch's Adams too, and trainings, on the model and batch that are timed, equal",
        "plain torch in float64 for three steps with changing gradients, and losses are finite;",
        "gradients of windows equal autograd in float64. Equal: at most twice as far from float64",
        "as plain torch in float32, and two roundoffs. The limit is the greater of two times: the",
        "multiply-adds of a rule at the rate of a large matrix product, and the bytes of a step at",
        "the rate of a large copy, both measured between the rows.",
        "",
        "## A step of 100,000 coordinates in ten tensors",
        "",
        *table(result["steps"]),
    ]
    for over, title in CURVES.items():
        rows = _curve_rows([curve for curve in result["curves"] if curve["over"] == over])
        lines += ["", f"## {title}", "", *table(rows)]
    lines += ["", "![curves](suite_scaling.png)", "", "## Training small models on the digits", ""]
    lines += [*table(_training_rows(result["training"])), "", "![shares](suite_training.png)", ""]
    lines += [f"- {note}" for note in result["notes"]]
    return "\n".join(lines).rstrip() + "\n"


def _training_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The optimizers' shares of a step in percent, a column each."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        line = found.setdefault(
            (row["model"], row["batch"]),
            {key: row[key] for key in ("model", "parameters", "batch")},
        )
        line[row["optimizer"]] = f"{100 * row['share of the optimizer']:.0f} %"
    return list(found.values())


def plots(result: dict[str, Any], folder: Path) -> None:
    """``suite_scaling.png`` and ``suite_training.png``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    for axes, (over, title) in zip(figure.subplots(2, 2).flat, CURVES.items(), strict=True):
        for curve in result["curves"]:
            if curve["over"] == over:
                axes.plot(curve["x"], curve["ns"], "o-", label=curve["rule"])
        axes.set(xscale="log", yscale="log", xlabel=over, ylabel="ns", title=title)
        axes.title.set_fontsize(9)
        axes.legend(fontsize=7)
    FigureCanvasAgg(figure).print_png(folder / "suite_scaling.png")
    models = list(dict.fromkeys(row["model"] for row in result["training"]))
    figure = Figure(figsize=(11, 4), layout="constrained")
    drawn = figure.subplots(1, len(models), sharey=True, squeeze=False)
    for axes, model in zip(drawn.flat, models, strict=True):
        own = [row for row in result["training"] if row["model"] == model]
        for name in dict.fromkeys(row["optimizer"] for row in own):
            rows = [row for row in own if row["optimizer"] == name]
            shares = [100 * row["share of the optimizer"] for row in rows]
            axes.plot([row["batch"] for row in rows], shares, "o-", label=name)
        axes.set(xscale="log", xlabel="batch size", ylabel="optimizer's share of a step, %")
        axes.set_title(f"{model}, {own[0]['parameters']:,} parameters", fontsize=9)
        axes.legend(fontsize=7)
    FigureCanvasAgg(figure).print_png(folder / "suite_training.png")
