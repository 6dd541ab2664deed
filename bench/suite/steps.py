"""The step of every rule and backend: time, share of the machine's limit, memory, calls."""

from __future__ import annotations

from typing import Any

import torch

from ..common import MATMUL, MATMUL_MACS, Contest, matmul
from . import contenders, jax_step
from .contenders import ADAMS, COMPILED, EAGER, MACS, RULES, Timed

SIZES = (10_000,) * 10
JAX, TORCH = "JAX, jitted", "torch"
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
    """One row for each rule and backend, and for each of torch's Adams, gated before it is timed.

    Returns:
        The rows, and notes on what was left out.
    """
    notes: list[str] = []
    found: dict[tuple[str, str], Timed] = {}
    for family in RULES:
        for backend in contenders.kernels():
            found[family, backend] = contenders.learned(family, SIZES, backend)
        found[family, EAGER] = contenders.learned(family, SIZES, "reference")
        compiled = contenders.compiled(family, SIZES)
        if isinstance(compiled, str):
            notes.append(f"{family}: no row for {COMPILED}: {compiled}")
        else:
            found[family, COMPILED] = compiled
    if jax_step.installed():
        for family in jax_step.FAMILIES:
            found[family, JAX] = contenders.jitted(family, SIZES)
        notes.append("JAX has a step of the coordinate-wise rules only")
    else:
        notes.append(jax_step.MISSING)
    for name in ADAMS:
        found[name, TORCH] = contenders.adam(name, SIZES)
    runs = {"/".join(key): timed.run for key, timed in found.items()}
    contest = Contest({**_yardsticks(), **runs}, seconds)
    contest.run(rounds)
    return [_row(key, timed, contest) for key, timed in found.items()], notes


def _row(key: tuple[str, str], timed: Timed, contest: Contest) -> dict[str, Any]:
    name, backend = key
    count = sum(SIZES)
    took = contest.seconds_of("/".join(key))
    held = timed.state_bytes()
    # a step moves its state in and out, the gradient in, the parameter in and out
    floats = 2 * held / 4 / count + 3
    memory = floats * count / (2 * COPY_FLOATS) * contest.seconds_of(COPY)
    arithmetic = contest.seconds_of(MATMUL) * MACS.get(name, 0) * count / MATMUL_MACS
    return {
        "rule": name,
        "backend": backend,
        "ns a coordinate": 1e9 * took / count,
        "over fused Adam": contest.ratio("/".join(key), f"Adam, fused/{TORCH}", "").value,
        "state bytes a parameter": held / count,
        # what JAX does is not seen from outside, nor which kernels a compiled step calls
        "allocations a step": None if backend == JAX else contenders.allocations(timed.run),
        "calls a step": None if backend in (COMPILED, JAX) else contenders.launches(timed.run),
        "share of the limit": max(arithmetic, memory) / took,
        "limit": "multiply-adds" if arithmetic > memory else "memory",
        "gate": timed.gate,
    }
