"""Whole runs differentiated in segments: ``python -m bench.segments``, about three minutes.

The shipped LSTM rule trains eight multi-layer perceptrons on the digits for 1,000 and 4,000 steps;
the meta-gradient with all gradients recorded, and in the number of segments that takes the least
memory. Each is measured in a process of its own (which ``--memory-of STEPS SEGMENTS`` is). Prints
a table and writes it to ``bench/reports/segments.md``.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from typing import Any

import torch

import fastl2o
from fastl2o import meta

from .common import REPORTS, Figure, Target, machine, relative_errors, require, set_threads, table
from .memory import in_own_process, peak_growth

RUNS, STEPS = 8, (1_000, 4_000)
MAX_ERROR = 1e-5


def measure_memory(steps: int, segments: int | str) -> dict[str, Any]:
    """Peak growth of the resident memory in one window, for this process alone."""
    rule, estimator = fastl2o.load("lstm"), meta.TruncatedBPTT(None, "log", segments=segments)
    task = meta.tasks.MLPClassification("digits")
    progress = meta.start(rule, task.sample(RUNS, torch.Generator().manual_seed(0)))
    coordinates, planes = progress.params.numel(), rule.state_planes
    begun = time.process_time()
    extra, result = peak_growth(lambda: estimator.window(rule, progress, steps))
    return {
        "extra_kib": extra,
        "seconds": time.process_time() - begun,
        "coordinates": coordinates,
        "planes": planes,
        "gradient": result.gradient.tolist(),
    }


def figures(steps: int) -> list[Figure]:
    """Memory and CPU time of a run of ``steps``, whole and in segments, which must agree.

    The limit is 2 sqrt(T (P + 2)) + 4 P floats a coordinate, P being the state's planes, and 16 MB.
    """
    arguments = ("--threads", torch.get_num_threads(), "--memory-of", steps)
    whole, parts = (in_own_process("bench.segments", *arguments, kind) for kind in ("1", "auto"))
    gradients = [torch.tensor(found["gradient"]).double() for found in (parts, whole)]
    error = max(relative_errors(*gradients))
    require(error <= MAX_ERROR, f"the gradient of {steps} steps in segments is off by {error:.2g}")
    planes, coordinates = whole["planes"], whole["coordinates"]
    limit = (2 * math.sqrt(steps * (planes + 2)) + 4 * planes) * 4 * coordinates + 16e6
    megabytes = [found["extra_kib"] * 1024 / 1e6 for found in (whole, parts)]
    title = f"run of {steps:,} steps, {coordinates:,} coordinates"
    at_most = Target(limit / 1e6, at_least=False)
    return [
        Figure(f"{title}: extra memory, all recorded", megabytes[0], "MB"),
        Figure(f"{title}: extra memory in segments", megabytes[1], "MB", target=at_most),
        Figure(f"{title}: CPU time, all recorded", whole["seconds"], "s"),
        Figure(f"{title}: CPU time in segments", parts["seconds"], "s"),
        Figure(f"{title}: difference of the gradients", error, "", target=Target(MAX_ERROR, False)),
    ]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m bench.segments", description=__doc__)
    parser.add_argument("--threads", type=int, default=2, help="threads of every process")
    parser.add_argument(
        "--memory-of", nargs=2, metavar=("STEPS", "SEGMENTS"), help="print one memory as JSON"
    )
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    if arguments.memory_of is not None:
        steps, segments = arguments.memory_of
        segments = int(segments) if segments.isdigit() else segments
        print(json.dumps(measure_memory(int(steps), segments)))
        return
    described = ", ".join(f"{key} {value}" for key, value in machine().items())
    text = "\n".join(["# Whole runs differentiated in segments", "", described, ""])
    rows = [figure for steps in STEPS for figure in figures(steps)]
    text += "\n" + "\n".join(table(rows)) + "\n"
    (REPORTS / "segments.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
