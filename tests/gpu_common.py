"""Helpers of the GPU tests: what is installed, ahead-of-time compilation, Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PTXEMU = ROOT.parent / "shared/ptxemu"
ARCHITECTURES = (80, 90, 100)


def load_ptxemu() -> ModuleType | None:
    """The PTX interpreter, or None where it is absent."""
    if not PTXEMU.is_dir():
        return None
    if str(PTXEMU) not in sys.path:
        sys.path.insert(0, str(PTXEMU))
    import ptxemu

    return ptxemu


HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
needs_ptxemu = pytest.mark.skipif(
    not PTXEMU.is_dir(), reason="ptxemu is not at ../shared/ptxemu of the repository's root"
)
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


def compile_triton(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    architecture: int,
    warps: int = 4,
) -> Any:
    """Compile a Triton kernel without a GPU to a ptxemu module.

    Args:
        kernel: a @triton.jit function.
        types: Triton type of each run-time argument, as "*fp32"; "fp32" for those left out.
        constants: the compile-time arguments.
        architecture: compute capability times ten.
        warps: warps of a program.
    """
    ptxemu = load_ptxemu()
    assert ptxemu is not None
    names = (name for name in kernel.arg_names if name not in constants)
    signature = {name: types.get(name, "fp32") for name in names}
    return ptxemu.from_triton(
        kernel, signature, constants, arch=architecture, num_warps=warps, enable_fp_fusion=True
    )


def resources(module: Any, architecture: int) -> Any:
    """Registers, spills and stack of a module's one kernel, as ptxas reports them."""
    ptxemu = load_ptxemu()
    assert ptxemu is not None
    (found,) = ptxemu.toolchain.resources(module, f"sm_{architecture}").values()
    return found


def device_address(tensor: Any) -> int:
    """The address of a tensor or array as kernels under ptxemu see it."""
    ptxemu = load_ptxemu()
    assert ptxemu is not None
    return int(ptxemu.DevicePtr(tensor))


def run_interpreted(test_file: str) -> None:
    """Run a test file in a process of its own, with Triton's interpreter.

    The interpreter is chosen when triton is imported, so it cannot be switched on here.
    """
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", test_file],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    report = result.stdout + result.stderr
    assert result.returncode == 0, report
    assert "skipped" not in report.splitlines()[-1], report


def poison_new_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what `Tensor.new_empty` makes with NaN, so that reading unwritten memory shows."""
    empty = torch.Tensor.new_empty

    def filled(*arguments: Any, **options: Any) -> torch.Tensor:
        made = empty(*arguments, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)
