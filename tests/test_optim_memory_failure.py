"""Running out of memory in the middle of a step: an error, and nothing has been changed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.common import needs_cpu_kernels
from tests.out_of_memory_child import RULES

HERE = Path(__file__).resolve().parent
COMPILER = shutil.which("g++")


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that makes a chosen allocation of the CPU kernels fail."""
    if COMPILER is None or sys.platform != "linux":
        pytest.skip("needs g++ on Linux, for a library that makes allocations fail")
    if "asan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("AddressSanitizer has allocations of its own")
    library = tmp_path_factory.mktemp("shim") / "failing_allocations.so"
    source = HERE / "failing_allocations.cpp"
    subprocess.run(
        [COMPILER, "-std=c++20", "-shared", "-fPIC", str(source), "-o", str(library), "-ldl"],
        check=True,
    )
    return library


@needs_cpu_kernels
@pytest.mark.parametrize("name", RULES)
def test_every_allocation_of_a_step_may_fail(name: str, shim: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "tests.out_of_memory_child", name],
        cwd=HERE.parent,
        env={**os.environ, "LD_PRELOAD": str(shim)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout.split()[-1]) > 20
