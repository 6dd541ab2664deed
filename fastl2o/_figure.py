"""An empty picture, and its file; matplotlib is loaded here only."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from ._files import atomic_write

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
    """Write a figure, in folders made for it; the ending gives the format (.png, .svg, .pdf).

    A picture that is there is replaced whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format=path.suffix[1:] or None)
    atomic_write(path, buffer.getvalue())
    return path
