"""Shipped rules: `<name>.safetensors` with its card, and `<name>.md`, the card in prose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).resolve().parent


def names() -> list[str]:
    """Names that `fastl2o.load` takes, sorted.

    Example:
        >>> isinstance(names(), list)
        True
    """
    return sorted(file.stem for file in _FOLDER.glob("*.safetensors"))


def path(name: str) -> Path:
    """The file of a shipped rule.

    Raises:
        ValueError: there is none of that name; the message lists those there are.

    Example:
        >>> path("lstm-mnist").name
        'lstm-mnist.safetensors'
    """
    if name not in names():
        raise ValueError(
            f"no shipped rule is named {name!r}; there are: {', '.join(names()) or 'none'} (for a "
            "file of your own pass a path that ends in .safetensors)"
        )
    return _FOLDER / f"{name}.safetensors"


def card(name: str) -> dict[str, Any]:
    """How a shipped rule was trained, on what, for which horizon, and its results.

    Raises:
        ValueError: there is no shipped rule of that name.

    Example:
        >>> isinstance(card("lstm-mnist"), dict)
        True
    """
    from .._files import read_card  # here, because _files looks names up in this module

    return read_card(path(name))


__all__ = ["card", "names", "path"]
