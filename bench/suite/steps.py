"""The step of every rule and backend: time, share of the machine's limit, memory, calls."""

from __future__ import annotations

from typing import Any

import torch

from ..common import MATMUL, MATMUL_MACS, Contest, matmul
from . import contenders, jax_step
from .contenders import ADAMS, COMPILED, EAGER, MACS, RULES

SIZES = (10_000,) * 10
JAX = "JAX, jitted"
COPY, COPY_FLOATS = "copy of 64 MiB", 2**24


def _yardsticks() -> dict[str, Any]:
    source, target = torch.zeros(COPY_FLOATS), torch.empty(COPY_FLOATS)
    if contenders.DEVICE == "cpu":
        return {MATMUL: matmul(), COPY: lambda: target.copy_(source)}
    left, right = (torch.randn(2048, 2048, device=contenders.DEVICE) for _ in range(2))
    source, target = source.to(contenders.DEVICE), target.to(contenders.DEVICE)
    return {
        MATMUL: contenders.synchronised(lambda: left @ right),
        COPY: contenders.synchronised(lambda: target.copy_(source)),
    }


def measure(rounds: int | None, seconds: float) -> tuple[list[dict[str, Any]], list[str]]:
    """One row for each rule and backend, and for each of torch's Adams.

    Returns:
        The rows, and notes on what was left out.
    """
    notes: list[str] = []
    runs: dict[tuple[str, str], Any] = {}
    for family in RULES:
        contenders.gate(family)
        for backend in contenders.kernels():
            runs[family, backend] = contenders.learned(family, SIZES, backend)
        runs[family, EAGER] = contenders.learned(family, SIZES, "reference")
        compiled = contenders.compiled(family, SIZES)
        if isinstance(compiled, str):
            notes.append(f"{family}: no row for {COMPILED}: {compiled}")
        else:
            runs[family, COMPILED] = compiled
    jitted = jax_step.lstm_step(sum(SIZES))
    if isinstance(jitted, str):
        notes.append(jitted)
    else:
        runs["lstm", JAX] = jitted
    for name, options in ADAMS.items():
        runs[name, "torch"] = contenders.adam(SIZES, options)
    contest = Contest(
        {**_yardsticks(), **{"/".join(key): run for key, run in runs.items()}}, seconds
    )
    contest.run(rounds)
    return [_row(key, run, contest) for key, run in runs.items()], notes


def _row(key: tuple[str, str], run: Any, contest: Contest) -> dict[str, Any]:
    name, backend = key
    count = sum(SIZES)
    took = contest.seconds_of("/".join(key))
    row: dict[str, Any] = {
        "rule": name,
        "backend": backend,
        "ns a coordinate": 1e9 * took / count,
        "over fused Adam": contest.ratio("/".join(key), "Adam, fused/torch", "").value,
        "state bytes a parameter": 8.0,
        "allocations a step": None,
        "calls a step": None,
        "share of the limit": None,
        "limit": None,
    }
    if backend not in (COMPILED, JAX):  # what they call is not seen from outside
        row["allocations a step"] = contenders.allocations(run)
        row["calls a step"] = contenders.launches(run)
    if name in RULES:
        planes = contenders.make_rule(name).state_planes
        row["state bytes a parameter"] = contenders.state_bytes(name, SIZES)
        arithmetic = contest.seconds_of(MATMUL) * MACS[name] * count / MATMUL_MACS
        # state in and out, gradient in, parameter in and out
        moved = (2 * planes + 3) * count / (2 * COPY_FLOATS) * contest.seconds_of(COPY)
        row["share of the limit"] = max(arithmetic, moved) / took
        row["limit"] = "multiply-adds" if arithmetic > moved else "memory"
    return row
