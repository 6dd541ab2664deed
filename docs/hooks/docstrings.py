"""Griffe extension: reads the docstrings of this project as Griffe's Google style wants them."""

from __future__ import annotations

import re
from typing import Any

import griffe

_SHARED = re.compile(r"^    ((?:\w+, )+\w+): (.*(?:\n {8}.*)*)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Small differences of style.

    The section "Example:" is called "Examples:", "a, b: text" becomes an entry for each, and the
    comment behind a named tuple's field is its docstring.
    """

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = _SHARED.sub(_entries, text)
        elif obj.is_attribute and obj.parent is not None and obj.parent.is_class:
            line = obj.lines[0] if obj.lines else ""
            comment = line.partition("  # ")[2]
            if comment:
                obj.docstring = griffe.Docstring(comment, parent=obj)


def _entries(match: re.Match[str]) -> str:
    return "\n".join(f"    {name}: {match[2]}" for name in match[1].split(", "))
