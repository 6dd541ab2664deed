"""Curves: over coordinates, tensors, threads and the length of an unroll."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from tests.common import random_window

from .. import hierarchical, unroll
from ..common import Contest, available_gib, require
from ..eager import EagerRule
from . import contenders
from .contenders import RULES

Curve = dict[str, Any]
SIZES = tuple(10**k for k in range(3, 9))
COUNTS = (1, 10, 100, 1_000, 10_000)
TOTAL = 100_000
LENGTHS = (1, 5, 20, 50, 100)
RUNS, DIM = 4, 250  # coordinates of a window


def _fits(family: str, size: int) -> bool:
    planes = contenders.make_rule(family).state_planes
    # state, parameter, gradient and what one step keeps of a coordinate, with room to spare
    return (planes + 5) * 4.0 * size / 2**30 < 0.6 * available_gib()


def _curve(family: str, over: str, contest: Contest, per: Callable[[int], float]) -> Curve:
    points = [int(name) for name in contest.contenders]
    nanoseconds = [1e9 * contest.seconds_of(str(x)) / per(x) for x in points]
    return {"rule": family, "over": over, "x": points, "ns": nanoseconds}


def coordinates(rounds: int | None, seconds: float, largest: int) -> tuple[list[Curve], list[str]]:
    """Time a coordinate of one tensor of 1,000 to ``largest`` coordinates."""
    curves, notes = [], []
    for family in RULES:
        sizes = [size for size in SIZES if size <= largest and _fits(family, size)]
        if len(sizes) < len([size for size in SIZES if size <= largest]):
            notes.append(f"{family}: beyond {sizes[-1]:,} coordinates memory does not suffice")
        # The largest are timed alone, so that no two of them are in memory at once.
        small = [size for size in sizes if size <= 10**6]
        contest = Contest({str(s): contenders.learned(family, [s]) for s in small}, seconds)
        contest.run(rounds)
        curve = _curve(family, "coordinates", contest, float)
        for size in sizes[len(small) :]:
            alone = Contest({str(size): contenders.learned(family, [size])}, seconds, 2, 10)
            alone.run(rounds)
            more = _curve(family, "coordinates", alone, float)
            curve["x"] += more["x"]
            curve["ns"] += more["ns"]
        curves.append(curve)
    return curves, notes


def tensors(rounds: int | None, seconds: float) -> list[Curve]:
    """Time a coordinate of 100,000 coordinates in 1 to 10,000 tensors."""
    curves = []
    for family in RULES:
        steps = {str(n): contenders.learned(family, [TOTAL // n] * n) for n in COUNTS}
        contest = Contest(steps, seconds)
        contest.run(rounds)
        curves.append(_curve(family, "tensors", contest, lambda _: TOTAL))
    return curves


def threads(rounds: int | None, seconds: float) -> list[Curve]:
    """Time a coordinate of 100,000 with 1 to all cores."""
    before = torch.get_num_threads()
    most = os.cpu_count() or 1
    counts = [n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n <= most]

    def with_threads(count: int, step: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            torch.set_num_threads(count)
            step()

        return run

    curves = []
    for family in RULES:
        step = contenders.learned(family, [TOTAL])
        contest = Contest({str(n): with_threads(n, step) for n in counts}, seconds)
        contest.run(rounds)
        curves.append(_curve(family, "threads", contest, lambda _: TOTAL))
    torch.set_num_threads(before)
    return curves


def lengths(rounds: int | None, seconds: float) -> list[Curve]:
    """Time a coordinate and step of a window's gradient, fused and by eager autograd."""
    curves = []
    for family in ("lstm", "rnnprop"):
        rule = contenders.make_rule(family).cpu()
        net = EagerRule(rule)
        windows = {t: random_window(rule, steps=t, runs=RUNS, dim=DIM, step=0) for t in LENGTHS}
        for window in windows.values():
            ours, theirs = unroll.fused(rule, window)[0], unroll.eager(net, rule, window)
            error = float((ours - theirs).norm() / theirs.norm())
            require(error < 1e-3, f"{family}: the two window gradients differ by {error:.1e}")
        for name, call in (
            ("fused", lambda window, rule=rule: unroll.fused(rule, window)),
            ("eager autograd", lambda window, rule=rule, net=net: unroll.eager(net, rule, window)),
        ):
            contest = Contest({str(t): _bound(call, windows[t]) for t in LENGTHS}, seconds)
            contest.run(rounds)
            curve = _curve(f"{family}, {name}", "unroll length", contest, lambda t: t * RUNS * DIM)
            curves.append(curve)
    window = hierarchical.Window(hierarchical.fresh_rule())
    window.gate()
    steps = {"fused": window.kernel, "eager autograd": window.eager}
    contest = Contest(dict(steps), seconds, 2, 10)
    contest.run(rounds)
    per = hierarchical.WINDOW * sum(hierarchical.WINDOW_SIZES)
    for name in steps:
        nanoseconds = [1e9 * contest.seconds_of(name) / per]
        curves.append(
            {
                "rule": f"hierarchical, {name}",
                "over": "unroll length",
                "x": [hierarchical.WINDOW],
                "ns": nanoseconds,
            }
        )
    return curves


def _bound(call: Callable[[Any], object], window: Any) -> Callable[[], object]:
    return lambda: call(window)
