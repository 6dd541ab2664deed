"""Curves: over coordinates, tensors, threads and the length of an unroll, every point gated."""

from __future__ import annotations

import gc
import operator
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from tests.common import autograd_unroll, random_window

from .. import hierarchical, unroll
from ..common import Contest, relative_errors, require
from ..eager import EagerRule
from . import contenders, gates
from .contenders import RULES, Timed

Curve = dict[str, Any]
SIZES = tuple(10**k for k in range(3, 9))
COUNTS = (1, 10, 100, 1_000, 10_000)
TOTAL = 100_000
LENGTHS = (1, 5, 20, 50, 100)
RUNS, DIM = 4, 250  # coordinates of a window
TENSORS = (2_000, 100) * 2  # of the hierarchical rule's window
# A step may take this share of the memory that is there; the rest is for what else runs.
MEMORY_SHARE = 0.8
WORTH_A_NOTE = 2**30  # bytes
WINDOW_GATE = "the window's gradient against autograd in float64"
FUSED, EAGER = "fused", "eager autograd"
HIERARCHICAL_LIMIT = 1e-5  # relative, of the hierarchical rule's meta-gradients


def fitting(family: str, sizes: Sequence[int]) -> tuple[list[int], list[str]]:
    """The sizes that memory suffices for, by what they need and what is there.

    Returns:
        They, and notes on all that need much.
    """
    fits, notes = [], []
    for size in sizes:
        needed, there = contenders.needed_bytes(family, size), contenders.available_bytes()
        enough = needed <= MEMORY_SHARE * there
        fits += [size] if enough else []
        if needed >= WORTH_A_NOTE or not enough:
            notes.append(
                f"{family}: {size:,} coordinates need {needed / 2**30:.1f} GiB; "
                f"{there / 2**30:.1f} GiB are available, of which {MEMORY_SHARE:.0%} may be taken: "
                + ("timed" if enough else "**not timed**")
            )
    return fits, notes


def _curve(family: str, over: str, contest: Contest, per: Callable[[int], float]) -> Curve:
    points = [int(name) for name in contest.contenders]
    nanoseconds = [1e9 * contest.seconds_of(str(x)) / per(x) for x in points]
    return {"rule": family, "over": over, "x": points, "ns": nanoseconds}


def _contest(timed: dict[str, Timed], rounds: int | None, seconds: float, *most: int) -> Contest:
    contest = Contest({name: each.run for name, each in timed.items()}, seconds, *most)
    contest.run(rounds)
    return contest


def coordinates(rounds: int | None, seconds: float, largest: int) -> tuple[list[Curve], list[str]]:
    """Time a coordinate of one tensor of 1,000 to ``largest`` coordinates."""
    curves, notes = [], []
    for family in RULES:
        sizes, left_out = fitting(family, [size for size in SIZES if size <= largest])
        notes += left_out
        # The largest are timed alone, so that no two of them are in memory at once.
        small = [size for size in sizes if size <= 10**6]
        timed = {str(size): contenders.learned(family, [size]) for size in small}
        curve = _curve(family, "coordinates", _contest(timed, rounds, seconds), float)
        curve["gate"] = timed[str(small[0])].gate
        del timed
        for size in sizes[len(small) :]:
            gc.collect()  # what is left of the size before would need its memory beside this one's
            alone = {str(size): contenders.learned(family, [size])}
            more = _curve(family, "coordinates", _contest(alone, rounds, seconds, 2, 10), float)
            del alone
            curve["x"] += more["x"]
            curve["ns"] += more["ns"]
        curves.append(curve)
    return curves, notes


def tensors(rounds: int | None, seconds: float) -> list[Curve]:
    """Time a coordinate of 100,000 coordinates in 1 to 10,000 tensors."""
    curves = []
    for family in RULES:
        timed = {str(n): contenders.learned(family, [TOTAL // n] * n) for n in COUNTS}
        contest = _contest(timed, rounds, seconds)
        curve = _curve(family, "tensors", contest, lambda _: TOTAL)
        curves.append({**curve, "gate": timed[str(COUNTS[0])].gate})
    return curves


def threads(rounds: int | None, seconds: float) -> list[Curve]:
    """Time a coordinate of 100,000 with 1 to all cores."""
    before = torch.get_num_threads()
    most = os.cpu_count() or 1
    counts = [n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n <= most]

    def with_threads(count: int, family: str) -> Timed:
        torch.set_num_threads(count)
        timed = contenders.learned(family, [TOTAL])

        def run() -> None:
            torch.set_num_threads(count)
            timed.run()

        return timed._replace(run=run)

    curves = []
    try:
        for family in RULES:
            timed = {str(n): with_threads(n, family) for n in counts}
            contest = _contest(timed, rounds, seconds)
            curve = _curve(family, "threads", contest, lambda _: TOTAL)
            curves.append({**curve, "gate": timed[str(counts[0])].gate})
    finally:
        torch.set_num_threads(before)
    return curves


def lengths(rounds: int | None, seconds: float) -> list[Curve]:
    """Time a coordinate and step of a window's gradient, fused and by eager autograd."""
    curves = []
    for family in RULES:
        of_problem = family == "hierarchical"
        make = _hierarchical_window if of_problem else partial(_window, family)
        windows = {length: make(length) for length in LENGTHS}
        count = sum(TENSORS) if of_problem else RUNS * DIM
        for name in windows[LENGTHS[0]]:
            calls = {str(length): windows[length][name] for length in LENGTHS}
            contest = Contest(calls, seconds, 2 if of_problem else 5)
            contest.run(rounds)
            per = partial(operator.mul, count)
            curve = _curve(f"{family}, {name}", "unroll length", contest, per)
            curves.append({**curve, "gate": WINDOW_GATE})
    return curves


def _window(family: str, length: int) -> dict[str, Callable[[], object]]:
    """Both ways to the gradient of a coordinate-wise rule's window, gated."""
    rule, what = contenders.make_rule(family).cpu(), f"{family}, a window of {length}"
    net, window = EagerRule(rule), random_window(rule, steps=length, runs=RUNS, dim=DIM, step=0)
    calls: dict[str, Callable[[], Any]] = {
        FUSED: partial(unroll.fused, rule, window),
        EAGER: partial(unroll.eager, net, rule, window),
    }
    plain = autograd_unroll(rule, window)
    exact = autograd_unroll(contenders.make_rule(family).cpu().double(), window.to(torch.float64))
    names = ("d_meta", "d_state")
    for name, *three in zip(names, calls[FUSED](), plain, exact, strict=True):
        gates.gradient(f"{what}, {name}", *three)
    error, _ = relative_errors(calls[EAGER](), exact[0])
    require(error < gates.GRADIENT_LIMIT, f"{what}: eager autograd is off by {error:.1e}")
    return calls


def _hierarchical_window(length: int) -> dict[str, Callable[[], object]]:
    """Both ways to the gradient of the hierarchical rule's window, gated."""
    window = hierarchical.Window(hierarchical.fresh_rule(), length, TENSORS)
    exact, what = window.eager(torch.float64), f"hierarchical, a window of {length}"
    # What the rule's kernels promise. One step's gradient is the roundoff of few sums, of which
    # twice plain torch's is a matter of luck.
    for name, call in ((FUSED, window.kernel), (EAGER, window.eager)):
        error, _ = relative_errors(call(), exact)
        require(error < HIERARCHICAL_LIMIT, f"{what}: {name} is off by {error:.1e}")
    return {FUSED: window.kernel, EAGER: window.eager}
