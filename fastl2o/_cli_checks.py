"""What several commands check and load."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .rules import Rule

__all__ = ["MAX_SEED", "check_file", "load_rules", "make_folder", "nearest"]

MAX_SEED = 2**63 - 1


def nearest(given: str, known: Sequence[str]) -> str:
    """A question after the known name that looks most like the one given; empty if none does."""
    near = difflib.get_close_matches(given, known, n=1)
    return f"did you mean {near[0]!r}? " if near else ""


def load_rules(names: list[str]) -> dict[str, Rule]:
    """Rules by the label shown in tables: shipped name, or file name if only one has it."""
    from . import load

    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)} given more than once; give each rule once")
    stems = [Path(name).stem for name in names]
    return {
        stem if stems.count(stem) == 1 else name: load(name)
        for stem, name in zip(stems, names, strict=True)
    }


def check_file(path: Path, option: str) -> None:
    """Refuse a file that cannot be written, before the work that fills it."""
    if path.is_dir():
        raise ValueError(f"{option} {path} is a folder; give the name of a file in it")
    make_folder(path.parent, option)
    new = not path.exists()
    try:
        with open(path, "ab"):  # permissions alone do not tell
            pass
    except OSError as error:
        raise ValueError(
            f"{option} {path} cannot be written ({error.strerror}); choose another place"
        ) from error
    if new:
        path.unlink()


def make_folder(folder: Path, option: str) -> None:
    """Make a folder that an option names, or say why it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{option}: there is no folder {folder} and none can be made ({error.strerror}); "
            "choose another place"
        ) from error
