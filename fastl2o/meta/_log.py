"""The training log: a CSV file with one row an outer step, and what is made of its rows."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .._figure import new_figure
from ._checks import check_choice
from ._curves import draw_training
from .checkpoint import CheckpointError

__all__ = ["LOG", "LOGS", "FitResult", "TrainingLog"]

LOG, CURVES = "log.csv", "curves.png"
LOGS = ("tensorboard", "curves")
_COLUMNS = (
    "outer_step",
    "task",
    "inner_step",
    "horizon",
    "imitation",
    "meta_loss",
    "first_loss",
    "last_loss",
    "gradient_norm",
    "snr",
    "lr",
    "skipped",
    "validation",
    "inner_steps",
    "seconds",
)


class FitResult(NamedTuple):
    """What ``MetaTrainer.fit`` did.

    Example:
        >>> import fastl2o
        >>> from fastl2o import meta
        >>> rule = fastl2o.LSTMRule(hidden_size=4, num_layers=1)
        >>> trainer = meta.MetaTrainer(rule, [meta.tasks.Quadratic(dim=3)], runs=2, progress=False)
        >>> result = trainer.fit(outer_steps=1)
        >>> result.inner_steps, result.skipped, result.best_step
        (40, 0, None)
    """

    outer_steps: int  # meta-updates done since the start of training, skipped ones included
    best_step: int | None  # outer step of the best validation so far; None if there was none
    best_score: float  # its score; infinity if there was none
    last_score: float  # score of the last validation
    meta_loss: float  # meta-loss of the last window
    skipped: int  # updates skipped for non-finite losses or gradients
    inner_steps: int  # of all runs since the start of training
    seconds: float  # wall time of this call


class TrainingLog:
    """``log.csv`` in a directory; resuming drops the rows that come after the checkpoint.

    Args:
        directory: where the file is, or None to keep no log.
        kinds: what is written besides: ``"tensorboard"``, event files of the same numbers, and
            ``"curves"``, the picture ``curves.png``, drawn anew with every checkpoint.

    Raises:
        ValueError: for another kind.
        RuntimeError: if the package that writes one is not there.
    """

    def __init__(self, directory: Path | None, kinds: Sequence[str] = ()) -> None:
        if isinstance(kinds, str) or not isinstance(kinds, Sequence):
            raise TypeError(f"logs must be a sequence of some of {', '.join(LOGS)}; got {kinds!r}")
        for kind in kinds:
            check_choice("logs", kind, LOGS)
        self.path = None if directory is None else directory / LOG
        self._draws = "curves" in kinds and directory is not None
        if self._draws:
            new_figure(1, 1, "leave 'curves' out of logs")  # refuse before the training, not in it
        self._writer_type = _summary_writer() if "tensorboard" in kinds else None
        self._writer: Any = None

    def open_at(self, outer_step: int) -> None:
        """Keep the rows of outer steps up to ``outer_step`` and drop the rest."""
        if self.path is None:
            return
        rows: list[list[str]] = []
        if self.path.exists() and outer_step > 0:
            with open(self.path, newline="", encoding="utf-8") as file:
                reader = csv.reader(file)
                next(reader, None)
                # A kill can leave a row that is cut off.
                whole = (row for row in reader if len(row) == len(_COLUMNS) and row[0].isdigit())
                rows = [row for row in whole if int(row[0]) <= outer_step]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"checkpoint_dir {str(self.path.parent)!r} is no folder and cannot be made one "
                f"({error.strerror}); choose another"
            ) from error
        temporary = self.path.with_suffix(".tmp")
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(_COLUMNS)
            writer.writerows(rows)
        os.replace(temporary, self.path)
        if self._writer_type is not None:
            # Events of steps that are taken again are hidden.
            self._writer = self._writer_type(self.path.parent, purge_step=outer_step + 1)

    def append(self, **row: float | None) -> None:
        """Add one row by column name; None leaves a cell empty.

        Raises:
            CheckpointError: if it cannot be written, say on a full disk.
        """
        if self.path is None:
            return
        cells = ["" if row[name] is None else row[name] for name in _COLUMNS]
        try:
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                csv.writer(file).writerow(cells)
            if self._writer is not None:
                for name in _COLUMNS[1:]:
                    if row[name] is not None:
                        self._writer.add_scalar(name, row[name], row["outer_step"])
        except OSError as error:
            raise CheckpointError(
                f"could not write the training log {str(self.path)!r}: {error}; checkpoints are "
                "as they were. Free some space and run the training again"
            ) from error

    def refresh(self) -> None:
        """Bring what is not written row by row up to date."""
        if self._writer is not None:
            self._writer.flush()
        if self.path is not None and self._draws:
            draw_training(self.path, self.path.parent / CURVES)


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RuntimeError(
            "logs: 'tensorboard' needs a package: pip install 'fastl2o[tensorboard]', or leave it "
            "out"
        ) from error
    return SummaryWriter
