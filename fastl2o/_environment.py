"""Environment variables that take one of a few values; docs/environment.md lists all variables."""

from __future__ import annotations

import os


def choice(name: str, accepted: tuple[str, ...]) -> str:
    """The value of an environment variable, the first of ``accepted`` where it is unset or empty.

    Raises:
        ValueError: it is set to something else.

    Example:
        >>> choice("FASTL2O_PRECISION", ("exact", "fast"))
        'exact'
    """
    value = os.environ.get(name) or accepted[0]
    if value not in accepted:
        raise ValueError(f"Invalid {name}: {value!r}; pass one of {', '.join(accepted)}")
    return value
