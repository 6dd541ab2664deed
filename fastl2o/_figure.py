"""An empty picture, and its file; matplotlib is loaded here only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["new_figure", "save"]


def new_figure(width: float, height: float, instead: str) -> Any:
    """An empty matplotlib figure that needs no display, inches wide and high.

    Raises:
        RuntimeError: without matplotlib; names the extra that has it, or what to do ``instead``.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError(
            f"the picture needs matplotlib: pip install 'fastl2o[plot]', or {instead}"
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, path: Path) -> Path:
    """Write a figure, in folders made for it; the ending gives the format (.png, .svg, .pdf)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
