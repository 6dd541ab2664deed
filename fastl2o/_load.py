"""Find and load the compiled extension, after the op schemas were defined.

`fastl2o/_C*.so` registers CPU kernels for the ops of `fastl2o.ops`. Everything works without it,
through the plain-torch implementations; with `FASTL2O_CPP=0` in the environment it is not looked
for.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from ._environment import choice

MINIMUM_TORCH = (2, 11)
_PACKAGE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Extension:
    """What became of the compiled extension: its path if it is loaded, else why it is not."""

    path: Path | None
    reason: str

    @property
    def loaded(self) -> bool:
        """Whether its kernels are registered."""
        return self.path is not None


def check_torch_version(version: str = torch.__version__) -> None:
    """Raise ImportError with what to do when torch is older than this package supports."""
    numbers = version.split("+")[0].split(".")
    if (int(numbers[0]), int(numbers[1])) < MINIMUM_TORCH:
        wanted = ".".join(map(str, MINIMUM_TORCH))
        raise ImportError(
            f"fastl2o needs torch >= {wanted}, found {version}; upgrade with: pip install "
            f"'torch>={wanted}'"
        )


def find_library(folder: Path = _PACKAGE) -> Path | None:
    """The CPU extension beside the package; the CUDA one, `_C_cuda*.so`, is a separate library."""
    found = sorted(path for path in folder.glob("_C*.so") if path.name.startswith("_C."))
    return found[0] if found else None


def load_extension(folder: Path = _PACKAGE) -> Extension:
    """Load the extension of `folder` and say what happened.

    A library that is there but does not load is a broken build: a RuntimeWarning tells, since going
    on silently would only look like slowness.
    """
    if choice("FASTL2O_CPP", ("1", "0")) == "0":
        return Extension(None, "FASTL2O_CPP=0 is set: unset it to use the CPU kernels")
    path = find_library(folder)
    if path is None:
        return Extension(
            None,
            "no fastl2o/_C*.so beside the package: install with a C++ compiler present and "
            "FASTL2O_CPP unset (in a checkout: make build)",
        )
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        reason = f"{path} does not load ({error}); rebuild it against torch {torch.__version__}"
        warnings.warn(
            f"fastl2o goes on without its CPU kernels: {reason}", RuntimeWarning, stacklevel=2
        )
        return Extension(None, reason)
    return Extension(path, "loaded")


def load_cuda_extension(folder: Path = _PACKAGE) -> Extension:
    """Load the library of CUDA kernels, which needs a torch that has CUDA, and say what happened.

    Under a torch without CUDA it is not touched: the symbols that it needs are not there.
    """
    if choice("FASTL2O_CUDA", ("auto", "0", "1")) == "0":
        return Extension(None, "FASTL2O_CUDA=0 is set: unset it to use the CUDA kernels")
    if torch.version.cuda is None:
        return Extension(
            None,
            f"torch {torch.__version__} is built without CUDA: install a CUDA build of torch, or "
            "use 'auto' or 'reference'",
        )
    found = sorted(folder.glob("_C_cuda.*so"))
    if not found:
        return Extension(
            None,
            "no fastl2o/_C_cuda*.so beside the package: install from source with nvcc on PATH and "
            "FASTL2O_CUDA=1 (in a checkout: FASTL2O_CUDA=1 make build), or use 'triton'",
        )
    try:
        torch.ops.load_library(found[0])
    except (OSError, RuntimeError) as error:
        reason = (
            f"{found[0]} does not load ({error}); it may be built for another torch: rebuild it "
            f"against torch {torch.__version__} with FASTL2O_CUDA=1"
        )
        warnings.warn(
            f"fastl2o goes on without its CUDA kernels: {reason}", RuntimeWarning, stacklevel=2
        )
        return Extension(None, reason)
    return Extension(found[0], "loaded")


def cpu_capability() -> str | None:
    """The instruction set that the loaded extension chose on this machine, None without one."""
    op = getattr(torch.ops.fastl2o, "cpu_capability", None)
    return None if op is None else str(op())
