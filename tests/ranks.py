"""Starts a module of the tests once for each rank of a process group, and waits for it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo"
)


def join(folder: str | Path, rank: str, size: str) -> None:
    """Meet the other ranks, in one that was started by `run_ranks`."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting-of-{size}",
        rank=int(rank),
        world_size=int(size),
    )


def leave() -> None:
    """Wait for the other ranks and end."""
    dist.barrier()
    dist.destroy_process_group()


def run_ranks(module: str, folder: Path, size: int, *, warnings: Sequence[str] = ()) -> Any:
    """Run `python -m module folder rank size` for every rank; what rank 0 saved as results.pt.

    Warnings are errors but for those that the filters in `warnings` let pass.
    """
    filters = [option for each in ("error", *warnings) for option in ("-W", each)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, *filters, "-m", module, str(folder), str(rank), str(size)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in reversed(range(size))
    ]
    try:
        reports = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(process.returncode for process in processes), "\n".join(reports)
    return torch.load(folder / "results.pt", weights_only=False)
