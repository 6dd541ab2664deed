"""A GPU kernel as ``bench/gpu_counts.py`` counts it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests import cuda_step


@dataclass(frozen=True)
class Kernel:
    """A kernel and how to count it.

    Attributes:
        name: shown in the table.
        least_bytes: DRAM bytes that one more coordinate (and step) cannot avoid.
        coordinates: by how many coordinate-steps the two launches differ.
        launches: the smaller and the larger launch's counts.
        resources: registers and spills for an architecture.
        per_call: launches of one call.
        threads: of a block for an architecture, where they are not those of the launches.
    """

    name: str
    least_bytes: int
    coordinates: int
    launches: Callable[[], tuple[Any, Any]]
    resources: Callable[[str], Any]
    per_call: str
    threads: Callable[[str], int] | None = None


def number(arch: str) -> int:
    """90 for "sm_90": each chip gets its own compilation, as in the library."""
    return int(arch.removeprefix("sm_"))


def find(resources: dict[str, Any], part: str) -> Any:
    """The entry whose mangled name holds ``part``."""
    return next(found for name, found in resources.items() if part in name)


_ASSEMBLED: dict[tuple[int, str], Any] = {}


def assembled(module: Any, arch: str) -> Any:
    """What ptxas makes of a module for an architecture, by kernel."""
    key = (id(module), arch)
    if key not in _ASSEMBLED:
        toolchain = cuda_step.emulator().toolchain
        _ASSEMBLED[key] = toolchain.resources(module, arch, sass=False)
    return _ASSEMBLED[key]
