"""Times steps and window backwards on a GPU: the backend in force beside plain torch.

Each backend first has to agree with the reference. Times are medians of CUDA events, the L2 cache
overwritten before each call. Run through `bench/device.sh`.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fastl2o
from fastl2o import backends, ops

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for python bench/device.py
from bench.hierarchical import Problem

DEVICE = "cuda"
REPEATS = 50
WINDOW = 20  # steps of a window
PROBLEM_TENSORS = 16  # of the hierarchical rule's timing
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
        param, grad = torch.randn(2, 4099, device=DEVICE)
        state, count = rule.init_state(param), torch.zeros((), device=DEVICE)
        with fastl2o.backend(name):
            ops.step_(rule, [param], [grad], [state], [count])
        results.append((param, state))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def check_problem(rule: Any) -> None:
    """Two steps of a hierarchical rule on more tensors than a launch's arguments hold."""
    problems = []
    for name in (backends.requested(), "reference"):
        problem = Problem(rule, 301, 60, DEVICE)
        with fastl2o.backend(name):
            problem.step()
            problem.step()
        state = problem.state
        problems.append([*problem.params, *state.planes, *state.tensors, problem.hidden])
    for found, expected in zip(*problems, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def random_window(rule: Any, numel: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients (T, 1, N), first state (S, 1, N) and loss weights (T, 1) of one run."""
    torch.manual_seed(0)
    grads = torch.randn(WINDOW, 1, numel, device=DEVICE)
    state = rule.init_state(grads[0])
    return grads, state, torch.ones(WINDOW, 1, device=DEVICE)


def check_window(rule: Any) -> None:
    """Compare a window backward of the backend in force with the reference's."""
    grads, state, weights = random_window(rule, 1023)
    results = []
    for name in (backends.requested(), "reference"):
        with fastl2o.backend(name):
            results.append(ops.unroll_backward(rule, grads, state, weights, steps=WINDOW))
    for found, expected in zip(*results, strict=True):
        error = torch.linalg.vector_norm(found - expected)
        assert error <= 1e-4 * torch.linalg.vector_norm(expected), float(error)


def autograd_window(rule: Any, grads: torch.Tensor, state: torch.Tensor) -> None:
    """What the window backward replaces: the reference's updates, differentiated by torch."""
    moved = grads.new_zeros(())
    later = grads.flip(0).cumsum(0).flip(0)
    for t in range(WINDOW - 1):
        update, state = rule.reference_step(grads[t], state, t + 1)
        moved = moved + (update * later[t + 1]).sum()
    torch.autograd.grad(moved, list(rule.parameters()))


def window_rows(numel: int) -> list[dict[str, Any]]:
    """One row a method: name, milliseconds, nanoseconds a coordinate and step."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=DEVICE)
    found = []
    for rule in (fastl2o.LSTMRule().to(DEVICE), fastl2o.RNNPropRule().to(DEVICE)):
        check_window(rule)
        grads, state, weights = random_window(rule, numel)
        methods: dict[str, Callable[[], object]] = {
            backends.requested(): functools.partial(
                ops.unroll_backward, rule, grads, state, weights, steps=WINDOW
            ),
            "autograd": functools.partial(autograd_window, rule, grads, state),
        }
        for name, run in methods.items():
            ms = median_ms(run, flush)
            each = ms * 1e6 / (numel * WINDOW)
            row = {"method": f"{rule.family} window {name}", "ms": ms, "ns a coordinate-step": each}
            found.append(row)
    return found


def reference_in_place(
    rule: Any, param: torch.Tensor, grad: torch.Tensor, state: torch.Tensor
) -> None:
    """The reference step with the writes that the in-place step does."""
    update, new_state = rule.reference_step(grad, state, 1)
    param.add_(update)
    state.copy_(new_state)


def rows(numel: int) -> list[dict[str, Any]]:
    """One row a method: name, milliseconds, gigabytes per second at the least possible traffic."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=DEVICE)
    param, grad = torch.randn(2, numel, device=DEVICE)
    found = []

    def add(name: str, run: Callable[[], object], least_bytes: int) -> None:
        ms = median_ms(run, flush)
        found.append({"method": name, "ms": ms, "GB/s of least": numel * least_bytes / ms / 1e6})

    for rule in (fastl2o.LSTMRule().to(DEVICE), fastl2o.RNNPropRule().to(DEVICE)):
        check(rule)
        state, count = rule.init_state(param), torch.zeros((), device=DEVICE)
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
    hierarchical = fastl2o.HierarchicalRule().to(DEVICE)
    check_problem(hierarchical)
    problem = Problem(hierarchical, numel // PROBLEM_TENSORS, PROBLEM_TENSORS, DEVICE)
    add(f"hierarchical {backends.requested()}", lambda: problem.step("pass"), 172)
    add("hierarchical eager", problem.eager, 172)
    model = torch.nn.Parameter(param.clone())
    model.grad = grad
    adam = torch.optim.Adam([model], fused=True)
    add("fused Adam", adam.step, 28)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--coordinates", type=int, default=1 << 20)
    parser.add_argument("--window-coordinates", type=int, default=1 << 16)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    table = rows(options.coordinates) + window_rows(options.window_coordinates)
    for row in table:
        method, ms, (unit, rate) = row["method"], row["ms"], list(row.items())[-1]
        print(f"{method:<24}{ms:>10.4f} ms {rate:>10.2f} {unit}")
    if options.json:
        device = torch.cuda.get_device_name()
        options.json.write_text(json.dumps({"device": device, "measured": table}, indent=2))


if __name__ == "__main__":
    main()
