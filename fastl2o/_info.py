"""What this installation is: versions, extension, instruction set, backends, shipped rules."""

from __future__ import annotations

import platform
from typing import Any

import torch

from . import _load, backends, zoo
from ._version import __version__


class Info(dict[str, Any]):
    """A dictionary that prints as a table."""

    def __str__(self) -> str:
        width = max(map(len, self)) + 2
        return "\n".join(f"{key:<{width}}{_text(value)}" for key, value in self.items())


def info() -> Info:
    """Describe this installation.

    Returns:
        A dictionary, printed as a table: "fastl2o", "torch" and "python" versions, "threads" of
        torch, "extension" (path of the compiled extension or None) and "extension_status",
        "cuda_extension" and "cuda_extension_status" (the library of CUDA kernels),
        "cpu_capability" (instruction set in use, or None), "backends" (name to "" if present, else
        why not), "default_backend", "precision" of the CUDA kernels, "zoo" (names).

    Example:
        >>> info()["backends"]["reference"]
        ''
    """
    extension, cuda = backends.extension(), backends.cuda_extension()
    return Info(
        {
            "fastl2o": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "extension": None if extension.path is None else str(extension.path),
            "extension_status": extension.reason,
            "cuda_extension": None if cuda.path is None else str(cuda.path),
            "cuda_extension_status": cuda.reason,
            "cpu_capability": _load.cpu_capability() if extension.loaded else None,
            "backends": backends.available(),
            "default_backend": backends.requested(),
            "precision": backends.precision(),
            "zoo": zoo.names(),
        }
    )


def _text(value: object) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name}: {reason or 'yes'}" for name, reason in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
