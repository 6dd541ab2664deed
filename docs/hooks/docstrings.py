"""Griffe extension: reads the docstrings of this project as Griffe's Google style wants them."""

from __future__ import annotations

import re
from typing import Any

import griffe

_SHARED = re.compile(r"^    ((?:\w+, )+\w+): (.*(?:\n {8}.*)*)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """The section "Example:" is called "Examples:", and "a, b: text" becomes an entry for each."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = _SHARED.sub(_entries, text)


def _entries(match: re.Match[str]) -> str:
    return "\n".join(f"    {name}: {match[2]}" for name in match[1].split(", "))
