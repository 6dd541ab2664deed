"""Backends: which implementation an op runs on, and how to force one.

`auto` (the default) takes the fastest that is present for the tensors' device and dtype; naming one
that is absent is an error that says how to get it. Force one for a block with
`fastl2o.backend(name)`, or for the whole process with the environment variable `FASTL2O_BACKEND`;
the block wins.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from contextvars import ContextVar, Token
from types import TracebackType

import torch

from ._environment import choice
from ._load import Extension, load_cuda_extension, load_extension

NAMES = ("auto", "reference", "cpu", "triton", "cuda")

# Once in a process: at every step, looking for a variable that is not set would cost microseconds.
from_environment = functools.cache(choice)
_forced: ContextVar[str | None] = ContextVar("fastl2o_backend", default=None)
_extension = Extension(None, "fastl2o.ops is not imported yet")
_cuda_extension = _extension


def load() -> None:
    """Load the compiled extensions; `fastl2o.ops` calls this once, when the schemas are there."""
    global _extension, _cuda_extension
    _extension = load_extension()
    _cuda_extension = load_cuda_extension()


def extension() -> Extension:
    """What became of the compiled extension."""
    return _extension


def _why_no_cpu() -> str:
    return "" if _extension.loaded else _extension.reason


def cuda_extension() -> Extension:
    """What became of the library of CUDA kernels."""
    return _cuda_extension


def _why_no_cuda() -> str:
    return "" if _cuda_extension.loaded else _cuda_extension.reason


def interpreting() -> bool:
    """Whether Triton runs in its interpreter, the only way that it takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _why_no_triton() -> str:
    # Found, not imported: importing Triton takes longer than all of fastl2o.
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; get it with: pip install 'triton>=3.6'"
    if not interpreting() and torch.version.cuda is None and torch.version.hip is None:
        return (
            f"torch {torch.__version__} is built without CUDA and ROCm: install a torch that has "
            "one, or set TRITON_INTERPRET=1 before starting Python to run Triton's (slow) "
            "interpreter on CPU tensors"
        )
    return ""


# One entry a backend: an empty string when it is present, else what is missing and what to do.
_WHY_ABSENT: dict[str, Callable[[], str]] = {
    "auto": lambda: "",
    "reference": lambda: "",
    "cpu": _why_no_cpu,
    "triton": _why_no_triton,
    "cuda": _why_no_cuda,
}


def available() -> dict[str, str]:
    """Every backend with "" if it is present, else the reason why not.

    Example:
        >>> available()["reference"]
        ''
    """
    return {name: _WHY_ABSENT[name]() for name in NAMES if name != "auto"}


def _require(name: str, origin: str) -> None:
    if name not in NAMES:
        raise ValueError(f"Invalid {origin}: {name!r}; pass one of {', '.join(NAMES)}")
    reason = _WHY_ABSENT[name]()
    if reason:
        raise RuntimeError(f"{origin} {name!r} is not available: {reason}")


class backend:
    """Force a backend inside a `with` block, in this thread or task only.

    Args:
        name: "auto", "reference", "cpu", "triton" or "cuda".

    Raises:
        ValueError: an unknown name.
        RuntimeError: the backend is not there; the message says how to get it.

    Example:
        >>> with backend("reference"):
        ...     requested()
        'reference'
    """

    def __init__(self, name: str) -> None:
        _require(name, "backend")
        self.name = name
        self._tokens: list[Token[str | None]] = []

    def __enter__(self) -> backend:
        self._tokens.append(_forced.set(self.name))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _forced.reset(self._tokens.pop())


def requested() -> str:
    """The backend asked for: by the innermost block, else by FASTL2O_BACKEND, else "auto"."""
    forced = _forced.get()
    if forced is not None:
        return forced
    name = from_environment("FASTL2O_BACKEND", NAMES)
    if name != "auto":
        _require(name, "FASTL2O_BACKEND")
    return name


def precision() -> str:
    """What FASTL2O_PRECISION asks for, "exact" or "fast"; only the CUDA kernels know the second."""
    return from_environment("FASTL2O_PRECISION", ("exact", "fast"))


def _takes_all(name: str) -> str:
    """No objection, from any backend."""
    return ""


def choose(
    device: torch.device, unsupported: str, refuses: Callable[[str], str] = _takes_all
) -> str:
    """The backend to run on for tensors of `device`: "reference", "cpu", "triton" or "cuda".

    "auto" takes the first of cuda, triton and reference on a CUDA device and of cpu and reference
    on the CPU that is present and takes the tensors; on other devices it takes the reference.

    Args:
        device: where the tensors are.
        unsupported: "" if the kernels take these tensors, else what they do not take and what to
            do.
        refuses: from a backend's name, what that backend alone does not take, "" if it takes it.

    Raises:
        RuntimeError: a backend was forced that cannot take these tensors.
    """
    precision()  # a wrong one is refused by every backend, not by the one that reads it alone
    name = requested()
    if name == "reference":
        return name
    if name == "auto":
        if unsupported:
            return "reference"
        if device.type == "cpu":
            return "cpu" if _extension.loaded else "reference"
        candidates = ("cuda", "triton") if device.type == "cuda" else ()
        for candidate in candidates:
            if not _WHY_ABSENT[candidate]() and not refuses(candidate):
                return candidate
        return "reference"
    if device.type != ("cpu" if name == "cpu" else "cuda") and not (
        name == "triton" and device.type == "cpu" and interpreting()
    ):
        interpreter = (
            ", or set TRITON_INTERPRET=1 before starting Python for the interpreter"
            if name == "triton" and device.type == "cpu"
            else ""
        )
        raise RuntimeError(
            f"backend {name!r} was forced for tensors on {device}; move them or use "
            f"'auto'{interpreter}"
        )
    unsupported = unsupported or refuses(name)
    if unsupported:
        raise RuntimeError(
            f"backend {name!r} was forced, but {unsupported}; or use 'auto' or 'reference'"
        )
    return name
