"""Checkpoints that survive a kill or a full disk while they are written, and the training log beside them."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any

import torch

__all__ = ["CHECKPOINT", "LOG", "PREVIOUS", "CheckpointError", "load_checkpoint", "save_checkpoint"]

CHECKPOINT, PREVIOUS, LOG = "checkpoint.pt", "checkpoint.previous.pt", "log.csv"
_VERSION = 1


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says which one is still usable."""


def save_checkpoint(directory: Path, content: dict[str, Any]) -> Path:
    """Write ``content`` (tensors, numbers, text, lists and dictionaries of them) as the newest checkpoint.

    The bytes go to a temporary file that is flushed to the disk and then renamed; the checkpoint that was there
    becomes the previous one. At every moment one of the two names holds a whole file.

    Raises:
        CheckpointError: if the file cannot be written, say on a full disk; older checkpoints are as they were.
    """
    buffer = io.BytesIO()
    torch.save({"version": _VERSION, **content}, buffer)
    current, previous = directory / CHECKPOINT, directory / PREVIOUS
    temporary = directory / f"{CHECKPOINT}.{os.getpid()}.tmp"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        if current.exists():
            os.replace(current, previous)
        os.replace(temporary, current)
        _sync_directory(directory)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        kept = next((path for path in (current, previous) if path.exists()), None)
        usable = (
            f"the earlier checkpoint {str(kept)!r} is whole"
            if kept
            else "there is no earlier checkpoint"
        )
        raise CheckpointError(
            f"could not write the checkpoint {str(current)!r}: {error}; {usable}. "
            "Free some space (or choose another checkpoint_dir) and run the same training again to continue"
        ) from error
    return current


def _sync_directory(directory: Path) -> None:
    # Renames are durable only once the directory itself is on the disk.
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_checkpoint(directory: Path) -> dict[str, Any] | None:
    """The newest checkpoint in ``directory`` that can be read, or None where there is none at all.

    Raises:
        CheckpointError: if files are there but none can be read, or they are of another version.
    """
    problems = []
    for path in (directory / CHECKPOINT, directory / PREVIOUS):
        if not path.exists():
            continue
        try:
            content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # noqa: BLE001 - torch.load raises many kinds for a damaged file
            problems.append(
                f"{str(path)!r}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            )
            continue
        if not isinstance(content, dict) or content.get("version") != _VERSION:
            found = content.get("version") if isinstance(content, dict) else None
            raise CheckpointError(
                f"{str(path)!r} is a checkpoint of version {found!r} and this fastl2o reads version {_VERSION}; "
                "finish it with the fastl2o that wrote it, or choose another checkpoint_dir"
            )
        return content
    if problems:
        raise CheckpointError(
            f"no checkpoint in {str(directory)!r} can be read ({'; '.join(problems)}); "
            "delete the directory to start over, or choose another checkpoint_dir"
        )
    return None


class TrainingLog:
    """A CSV file with one row an outer step. Resuming drops the rows after the checkpoint.

    Args:
        path: the file, or None to keep no log.
        columns: names of the columns; the first is the outer step.
    """

    def __init__(self, path: Path | None, columns: tuple[str, ...]) -> None:
        self.path, self.columns = path, columns

    def open_at(self, outer_step: int) -> None:
        """Keep the rows of outer steps up to ``outer_step`` and drop the rest."""
        if self.path is None:
            return
        rows: list[list[str]] = []
        if self.path.exists() and outer_step > 0:
            with open(self.path, newline="") as file:
                reader = csv.reader(file)
                next(reader, None)
                rows = [
                    row
                    for row in reader
                    if len(row) == len(self.columns) and int(row[0]) <= outer_step
                ]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        with open(temporary, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(self.columns)
            writer.writerows(rows)
        os.replace(temporary, self.path)

    def append(self, row: dict[str, Any]) -> None:
        """Add one row; columns that are missing stay empty."""
        if self.path is None:
            return
        with open(self.path, "a", newline="") as file:
            csv.writer(file).writerow([row.get(column, "") for column in self.columns])
