"""Counts of the compiled GPU kernels, and what a roofline makes of them; needs no GPU.

``python -m bench.gpu_counts [--json FILE]`` executes the kernels' PTX in the interpreter at
``../shared/ptxemu`` and assembles it with ptxas. Two launches of different size are subtracted, so
that the figures are of one more coordinate (and step), free of what a block does once. *Counted*
figures are exact for the PTX (registers: for the machine code); *predicted* ones divide counts by a
chip's peak rates: a lower bound on time, never a measurement.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for python bench/gpu_counts.py
from bench import gpu_counts_hierarchical
from bench.gpu_kernel import Kernel, assembled, find, number
from tests import common, cuda_step, gpu_common, test_cuda_step, test_cuda_unroll

CHIPS = {"A100-SXM-80GB": "sm_80", "H100-SXM": "sm_90", "B200": "sm_100"}
CUDA_TILES, WINDOW_TILE = 512, test_cuda_unroll.TILE
# Bytes of shared memory that a block may have there.
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}


def step_kernel(family: str, precision: str, state: torch.dtype) -> Kernel:
    """The CUDA step of 2x20."""
    kernel = cuda_step.Kernel(family, precision, state)
    planes = 80 if family == "lstm" else 82
    return Kernel(
        f"cuda step {family} {precision} {str(state).removeprefix('torch.')} state",
        2 * planes * state.itemsize + 12,
        CUDA_TILES,
        lambda: test_cuda_step.counted(kernel),
        lambda arch: find(assembled(cuda_step.module(number(arch)), arch), kernel.name),
        "ceil(tensors / 64)" + (" + 1" if family == "rnnprop" else ""),
        lambda arch: kernel.threads_on(number(arch)),
    )


def window_kernel(family: str, precision: str) -> Kernel:
    """The CUDA window backward of 2x20, one more step of it."""
    case = next(case for case in test_cuda_unroll.FAMILIES if case.family == family)
    planes = 80 if family == "lstm" else 82

    def launches() -> tuple[Any, Any]:
        rule, found = case.make(), []
        for steps in (2, 3):
            recorded = common.random_window(rule, steps=steps, runs=1, dim=WINDOW_TILE)
            result = test_cuda_unroll.unroll_backward(rule, recorded, precision=precision)
            found.append(result.counts)
        return found[0], found[1]

    def resources(arch: str) -> Any:
        device = test_cuda_unroll.Device(shared_bytes=SHARED_MEMORY[arch])
        name = test_cuda_unroll.planned(case.make(), device, precision).name
        return find(assembled(test_cuda_unroll.module(number(arch)), arch), name)

    return Kernel(
        f"cuda window backward {family} {precision}, a step",
        2 * planes * 4 + 4,
        WINDOW_TILE,
        launches,
        resources,
        "2",
    )


def triton_kernel() -> Kernel:
    """The Triton step of the 2x20 LSTM rule."""
    from tests import test_triton_step

    name, block = "lstm-20x2", 512

    def launches() -> tuple[Any, Any]:
        module = test_triton_step.compiled(name, 90, block)
        small, large = (
            test_triton_step.execute(name, module, (block * n,), block, torch.float32)
            for n in (1, 2)
        )
        return small, large

    def resources(arch: str) -> Any:
        number = int(arch.removeprefix("sm_"))
        return gpu_common.resources(test_triton_step.compiled(name, number, block), number)

    return Kernel("triton step lstm float32 state", 652, block, launches, resources, "1")


def triton_window(family: str) -> Kernel:
    """The Triton window backward of 2x20, one more step of it."""
    from tests import test_triton_unroll

    name, block = f"{family}-20x2", 128 if family == "lstm" else 64
    planes = 80 if family == "lstm" else 82

    def launches() -> tuple[Any, Any]:
        rule, found = test_triton_unroll.CASES[name].make(), []
        for steps in (2, 3):
            recorded = common.random_window(rule, steps=steps, runs=1, dim=block)
            found.append(test_triton_unroll.run_window(name, 90, block, recorded)[2])
        return found[0], found[1]

    def resources(arch: str) -> Any:
        module = test_triton_unroll.window_module(name, number(arch), block)
        return next(iter(assembled(module, arch).values()))

    return Kernel(
        f"triton window backward {family}, a step",
        2 * planes * 4 + 4,
        block,
        launches,
        resources,
        "2",
    )


def figures(kernel: Kernel) -> dict[str, Any]:
    """All figures of one kernel; every key says whether it was counted or predicted."""
    small, large = kernel.launches()
    n = kernel.coordinates

    def more(get: Callable[[Any], float]) -> float:
        return (get(large) - get(small)) / n

    def of_space(what: str) -> Callable[[Any], float]:
        return lambda counts: sum(
            counts.space.get(kind, {}).get(what, 0) for kind in ("ld_global", "st_global")
        )

    counted = {
        "launches a call": kernel.per_call,
        "DRAM bytes": more(lambda c: c.dram_bytes),
        "least DRAM bytes": kernel.least_bytes,
        "global sectors": more(of_space("sectors")),
        "global bytes requested": more(of_space("bytes")),
        "fp32 multiply-adds": more(lambda c: c.thread_inst.get("fp32_fma", 0)),
        "special functions": more(lambda c: c.thread_inst.get("mufu", 0)),
        "tensor multiply-adds": more(lambda c: c.mma_flops) / 2,
        "thread instructions": more(lambda c: c.total_thread_inst),
        "shared wavefronts": more(lambda c: c.shared_wavefronts),
        "shared bank conflicts": more(lambda c: c.bank_conflicts),
    }
    chips: dict[str, Any] = {}
    predict = cuda_step.emulator().roofline.predict
    for chip, arch in CHIPS.items():
        found = kernel.resources(arch)
        predictions = [predict(counts, chip, found) for counts in (small, large)]
        times = {
            unit: (predictions[1]["times"][unit] - predictions[0]["times"][unit]) / n
            for unit in predictions[0]["times"]
        }
        occupancy = predictions[1]["occupancy"]
        if kernel.threads is not None:
            occupancy = found.occupancy(kernel.threads(arch), large.smem_dynamic, arch)
        floor = kernel.least_bytes / cuda_step.emulator().roofline.CHIPS[chip].dram
        binding = max(times, key=lambda unit: times[unit])
        chips[chip] = {
            "counted: registers": found.registers,
            "counted: spill bytes": found.spill_stores + found.spill_loads,
            "predicted: warps a multiprocessor": occupancy["warps"],
            "predicted: bound, ns": times[binding] * 1e9,
            "predicted: binding unit": binding,
            "predicted: DRAM floor, ns": floor * 1e9,
            "predicted: bound over floor": times[binding] / floor,
        }
    return {"kernel": kernel.name, "counted, per coordinate": counted, "chips": chips}


def table(rows: list[dict[str, Any]]) -> str:
    """The figures as two Markdown tables."""
    names = list(rows[0]["counted, per coordinate"])
    lines = ["Counted, per coordinate (windows: per coordinate and step):", ""]
    lines += ["| kernel | " + " | ".join(names) + " |", "| --- " * (len(names) + 1) + "|"]
    for row in rows:
        values = row["counted, per coordinate"].values()
        lines.append(f"| {row['kernel']} | " + " | ".join(map(_text, values)) + " |")
    names = list(next(iter(rows[0]["chips"].values())))
    lines += ["", "Registers and spills counted, the rest predicted:", ""]
    lines += ["| kernel | chip | " + " | ".join(names) + " |", "| --- " * (len(names) + 2) + "|"]
    for row in rows:
        for chip, values in row["chips"].items():
            lines.append(
                f"| {row['kernel']} | {chip} | " + " | ".join(map(_text, values.values())) + " |"
            )
    return "\n".join(lines)


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--no-triton", action="store_true", help="CUDA kernels only")
    options = parser.parse_args()
    if cuda_step.missing() is not None:
        sys.exit(f"gpu_counts: {cuda_step.missing()}")
    kernels = [
        step_kernel(family, precision, state)
        for state in (torch.float32, torch.bfloat16)
        for family in ("lstm", "rnnprop")
        for precision in ("exact", "fast")
    ]
    kernels += [
        window_kernel(family, precision)
        for family in ("lstm", "rnnprop")
        for precision in ("exact", "fast")
    ]
    kernels += gpu_counts_hierarchical.cuda_kernels()
    if not options.no_triton and gpu_common.HAS_TRITON:
        kernels += [triton_kernel(), *(triton_window(family) for family in ("lstm", "rnnprop"))]
        kernels += gpu_counts_hierarchical.triton_kernels()
    rows = [figures(kernel) for kernel in kernels]
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
