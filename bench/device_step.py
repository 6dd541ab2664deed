"""Times one in-place step on a GPU: the backend in force, compiled torch, fused Adam.

Each backend first has to agree with the reference. Times are medians of CUDA events, the L2 cache
overwritten before each step. Run through `bench/device.sh`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fastl2o
from fastl2o import backends, ops

REPEATS = 50
FLUSH_BYTES = 512 << 20


def median_ms(run: Callable[[], object], flush: torch.Tensor) -> float:
    """Median time of `run` in milliseconds."""
    for _ in range(5):
        run()
    times = []
    for _ in range(REPEATS):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def check(rule: Any) -> None:
    """Compare a step of the backend in force with the reference's."""
    results = []
    for name in (backends.requested(), "reference"):
        torch.manual_seed(0)
        param, grad = torch.randn(2, 4099, device="cuda")
        state, count = rule.init_state(param), torch.zeros((), device="cuda")
        with fastl2o.backend(name):
            ops.step_(rule, [param], [grad], [state], [count])
        results.append((param, state))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def reference_in_place(
    rule: Any, param: torch.Tensor, grad: torch.Tensor, state: torch.Tensor
) -> None:
    """The reference step with the writes that the in-place step does."""
    update, new_state = rule.reference_step(grad, state, 1)
    param.add_(update)
    state.copy_(new_state)


def rows(numel: int) -> list[dict[str, Any]]:
    """One row a method: name, milliseconds, gigabytes per second at the least possible traffic."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    param, grad = torch.randn(2, numel, device="cuda")
    found = []

    def add(name: str, run: Callable[[], object], least_bytes: int) -> None:
        ms = median_ms(run, flush)
        found.append({"method": name, "ms": ms, "GB/s of least": numel * least_bytes / ms / 1e6})

    for rule in (fastl2o.LSTMRule().cuda(), fastl2o.RNNPropRule().cuda()):
        check(rule)
        state, count = rule.init_state(param), torch.zeros((), device="cuda")
        lists = ([param], [grad], [state], [count])
        name = f"{rule.family} {backends.requested()}"
        # State both ways, gradient, parameter both ways, float32.
        least = 8 * rule.state_planes + 12
        add(name, lambda r=rule, a=lists: ops.step_(r, *a, nonfinite="pass"), least)
        whole = torch.compile(reference_in_place)
        with torch.no_grad():
            add(
                f"{rule.family} compiled",
                lambda f=whole, r=rule, s=state: f(r, param, grad, s),
                least,
            )
    model = torch.nn.Parameter(param.clone())
    model.grad = grad
    adam = torch.optim.Adam([model], fused=True)
    add("fused Adam", adam.step, 28)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--coordinates", type=int, default=1 << 20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    table = rows(options.coordinates)
    for row in table:
        print(f"{row['method']:<24}{row['ms']:>10.4f} ms {row['GB/s of least']:>10.1f} GB/s")
    if options.json:
        device = torch.cuda.get_device_name()
        options.json.write_text(json.dumps({"device": device, "measured": table}, indent=2))


if __name__ == "__main__":
    main()
