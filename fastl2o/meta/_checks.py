"""Checks of arguments: each error names the argument, what was given and what is accepted."""

from __future__ import annotations

from typing import Any

__all__ = ["check_choice", "check_num_runs", "check_number", "check_seed", "check_type"]


def check_type(name: str, value: object, accepted: Any, example: str) -> None:
    """Refuse ``value`` unless it is an ``accepted``, with an example of one."""
    if not isinstance(value, accepted):
        raise TypeError(
            f"{name} must be of type {accepted.__name__}, such as {example}; got {value!r}"
        )


def check_num_runs(num_runs: int) -> None:
    """Refuse a batch without runs, naming the argument."""
    if isinstance(num_runs, bool) or not isinstance(num_runs, int) or num_runs < 1:
        raise ValueError(f"num_runs must be an int of at least 1, got {num_runs!r}")


def check_seed(seed: object, name: str = "seed") -> None:
    """Refuse a seed that a generator would not take, or take for another one."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        kind = ValueError if type(seed) is int else TypeError
        raise kind(f"{name} must be an int of at least 0 and below 2**63, got {seed!r}")


def check_choice(name: str, value: object, accepted: tuple[str, ...]) -> None:
    """Refuse ``value`` unless it is one of ``accepted``, listing them."""
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}; got {value!r}")


def check_number(
    name: str,
    value: object,
    *,
    minimum: float,
    exclusive: bool = False,
    integer: bool = False,
    below: float = float("inf"),
) -> None:
    """Refuse ``value`` unless it is a finite number (or int) from ``minimum`` to before ``below``.

    ``exclusive`` refuses ``minimum`` itself too.
    """
    kinds: tuple[type, ...] = (int,) if integer else (int, float)
    kind = "an int" if integer else "a finite number"
    bound = f"above {minimum}" if exclusive else f"of at least {minimum}"
    if below != float("inf"):
        bound += f" and below {below}"
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise TypeError(f"{name} must be {kind} {bound}, got {value!r}")
    number = float(value)  # type: ignore[arg-type]
    inside = minimum < number if exclusive else minimum <= number
    if not inside or not number < below:
        raise ValueError(f"{name} must be {kind} {bound}, got {value!r}")
