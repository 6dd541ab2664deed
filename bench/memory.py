"""The memory of one call, measured in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from .common import ROOT, proc_kib

_Result = TypeVar("_Result")


def peak_growth(call: Callable[[], _Result]) -> tuple[int, _Result]:
    """By how many KiB the resident memory grows at its peak during a call, and what that returns.

    A first call's scratch and pages of code count; torch's threads are started before. Outputs
    count, inputs do not.
    """
    torch.randn(1_000_000).sigmoid_()
    try:
        with open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
            file.write("5")  # sets the peak back to what is resident now
    except OSError:
        pass  # the peak so far is then counted too: an upper bound
    before = proc_kib("VmRSS")
    result = call()
    return proc_kib("VmHWM") - before, result


def in_own_process(module: str, *arguments: object) -> dict[str, Any]:
    """The JSON that ``python -m module arguments`` prints.

    Raises:
        RuntimeError: if that process fails.
    """
    # Blocks of 64 KiB and more come from the system and go back there, so that the peak is exact.
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        command = " ".join(map(str, (module, *arguments)))
        raise RuntimeError(f"measuring memory by {command} failed: {done.stderr.strip()}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found
