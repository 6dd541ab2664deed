"""Checkpoints that survive a kill or a full disk while they are written."""

from __future__ import annotations

import io
import os
import pickle
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "CHECKPOINT",
    "PREVIOUS",
    "CheckpointError",
    "CheckpointWriter",
    "has_checkpoint",
    "load_checkpoint",
]

CHECKPOINT, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
DAMAGED = "checkpoint.damaged.pt"
_VERSION = 3


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says which one is still usable.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "checkpoint.pt").write_bytes(b"not a checkpoint")
        >>> try:
        ...     load_checkpoint(folder)
        ... except CheckpointError as error:
        ...     print("delete the directory to start over" in str(error))
        True
    """


class CheckpointWriter:
    """Writes checkpoints in a thread of its own, so that training does not wait for the disk.

    The bytes go to a temporary file that is flushed to the disk and then renamed; the checkpoint
    that was there becomes the previous one. At every moment one of the two names holds a whole
    file.

    Args:
        directory: where they go.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with CheckpointWriter(Path(folder)) as writer:
        ...         writer.save({"step": 3})
        ...     load_checkpoint(Path(folder))["step"]
        3
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, content: dict[str, Any]) -> None:
        """Begin to write ``content``, taken as it is now, as the newest checkpoint.

        ``content`` holds tensors, numbers, text, lists and dictionaries of them. Waits for the
        checkpoint before to be written.

        Raises:
            CheckpointError: if that one could not be written, say on a full disk; older ones are as
                they were.
        """
        buffer = io.BytesIO()
        torch.save({"version": _VERSION, **content}, buffer)
        self.wait()
        self._pending = self._thread.submit(_write, self.directory, buffer)

    def wait(self) -> None:
        """Return when the last checkpoint is on the disk; raises as ``save`` does."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.wait()
        finally:
            self._thread.shutdown()


def _write(directory: Path, buffer: io.BytesIO) -> None:
    current, previous = directory / CHECKPOINT, directory / PREVIOUS
    # One name for all: what a kill leaves behind is overwritten by the next save.
    temporary = directory / f"{CHECKPOINT}.tmp"
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
            "Free some space (or choose another checkpoint_dir) and run the training again"
        ) from error


def _sync_directory(directory: Path) -> None:
    # Renames are durable only once the directory itself is on the disk.
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def has_checkpoint(directory: Path) -> bool:
    """Whether there is a checkpoint in ``directory``, readable or not."""
    return any((directory / name).exists() for name in (CHECKPOINT, PREVIOUS))


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
        except pickle.UnpicklingError:
            # torch's message advises to load it without weights_only, which can run any code.
            problems.append(f"{str(path)!r}: it is damaged, or holds what no checkpoint does")
            continue
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            problems.append(f"{str(path)!r}: {reason}")
            continue
        if problems:
            # Out of the way, or the next save would put it in the place of the whole one.
            os.replace(directory / CHECKPOINT, directory / DAMAGED)
            warnings.warn(
                f"the newest checkpoint is damaged ({problems[0]}) and now called {DAMAGED!r}; "
                f"continuing from {str(path)!r}",
                RuntimeWarning,
                stacklevel=2,
            )
        if not isinstance(content, dict) or content.get("version") != _VERSION:
            found = content.get("version") if isinstance(content, dict) else None
            raise CheckpointError(
                f"{str(path)!r} is of version {found!r}, this fastl2o reads version {_VERSION}; "
                "finish it with the fastl2o that wrote it, or choose another checkpoint_dir"
            )
        return content
    if problems:
        raise CheckpointError(
            f"no checkpoint in {str(directory)!r} can be read ({'; '.join(problems)}); "
            "delete the directory to start over, or choose another checkpoint_dir"
        )
    return None
