"""What the host code of the CUDA kernels does where no device answers."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests import cuda_step, gpu_common

ROOT = Path(__file__).resolve().parent.parent


@gpu_common.needs_nvcc
def test_a_launcher_without_a_device_holds_the_error(tmp_path: Path) -> None:
    program = tmp_path / "launcher"
    includes = [f"-I{folder}" for folder in cuda_step.INCLUDES]
    # The library's assertions tell calls of which the standard says nothing.
    flags = ["-std=c++17", "-Xcompiler", "-D_GLIBCXX_ASSERTIONS,-Wall,-Wextra,-Werror"]
    source = str(ROOT / "tests/cuda_launcher.cu")
    subprocess.run(["nvcc", *flags, *includes, source, "-o", str(program)], check=True)
    result = subprocess.run(
        [str(program)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout) == (0, "error 1\n"), result.stderr
