"""The training log: a CSV file with one row an outer step."""

from __future__ import annotations

import csv
import os
from pathlib import Path

from .checkpoint import CheckpointError

__all__ = ["LOG", "TrainingLog"]

LOG = "log.csv"
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


class TrainingLog:
    """``log.csv`` in a directory; resuming drops the rows that come after the checkpoint.

    Args:
        directory: where the file is, or None to keep no log.
    """

    def __init__(self, directory: Path | None) -> None:
        self.path = None if directory is None else directory / LOG

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
        except OSError as error:
            raise CheckpointError(
                f"could not write the training log {str(self.path)!r}: {error}; checkpoints are "
                "as they were. Free some space and run the training again"
            ) from error
