"""What every benchmark shares: interleaved timing, figures with targets, the machine, tables.

All contenders of a contest take turns within one process, round after round, so that a change of
clock rate or a busy neighbour meets all of them. A ratio is taken within each round; its median and
its quartiles over the rounds are reported.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastl2o

ROOT = Path(__file__).resolve().parent.parent
REPORTS = Path(__file__).resolve().parent / "reports"
MATMUL = "2048-cubed float32 matrix product"
MATMUL_MACS = 2048**3
# Within a round, a short contender is repeated until about this long: one call of a millisecond
# right after another contender's would mostly time cold caches.
_TURN_SECONDS = 0.03
_MAX_REPEATS = 20
# A first call this long is not dominated by what only first calls do.
_LONG_SECONDS = 3.0


class Target(NamedTuple):
    """What a figure must reach."""

    limit: float
    at_least: bool = True

    def met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit


@dataclass(frozen=True)
class Figure:
    """One reported number: median and quartiles, the quartiles None where it was taken once."""

    name: str
    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    target: Target | None = None

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None without one."""
        return None if self.target is None else self.target.met(self.value)

    def cells(self) -> tuple[str, str, str, str]:
        """The row 'figure | target | measured | spread'."""
        target, verdict = "–", ""
        if self.target is not None:
            sign = "≥" if self.target.at_least else "≤"
            target = f"{sign} {_number(self.target.limit)}{self._unit()}"
            verdict = ", met" if self.met else ", **not met**"
        spread = "–"
        if self.low is not None and self.high is not None:
            spread = f"{_number(self.low)} to {_number(self.high)}"
        return self.name, target, f"{_number(self.value)}{self._unit()}{verdict}", spread

    def _unit(self) -> str:
        return self.unit if self.unit in ("", "x") else f" {self.unit}"

    def to_json(self) -> dict[str, Any]:
        target = None if self.target is None else self.target._asdict()
        return {**asdict(self), "target": target, "met": self.met}


def _number(value: float) -> str:
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}"
    digits = 0 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}"


class Contest:
    """Contenders that take turns.

    Args:
        contenders: what to time, by name.
        seconds: about how long all rounds together should take.
        min_rounds, max_rounds: bounds on their number, whatever ``seconds`` says.
    """

    def __init__(
        self,
        contenders: dict[str, Callable[[], object]],
        seconds: float = 30.0,
        min_rounds: int = 5,
        max_rounds: int = 60,
    ) -> None:
        self.contenders = contenders
        self.seconds, self.min_rounds, self.max_rounds = seconds, min_rounds, max_rounds
        self.times: dict[str, list[float]] = {name: [] for name in contenders}
        self._repeats: dict[str, int] = {}

    def warm_up(self) -> int:
        """Run each contender once or twice, choose its repeats, return the number of rounds."""
        total = 0.0
        for name, run in self.contenders.items():
            seconds = _timed(run)
            if seconds < _LONG_SECONDS:
                seconds = _timed(run)
            self._repeats[name] = min(_MAX_REPEATS, max(1, round(_TURN_SECONDS / seconds)))
            total += seconds * (self._repeats[name] + (self._repeats[name] > 1))
        return min(self.max_rounds, max(self.min_rounds, round(self.seconds / total)))

    def round(self) -> None:
        """Give every contender one turn."""
        gc.collect()
        gc.disable()
        try:
            for name, run in self.contenders.items():
                if self._repeats[name] > 1:
                    run()  # untimed: brings back caches and threads after the contender before
                turn = [_timed(run) for _ in range(self._repeats[name])]
                self.times[name].append(statistics.median(turn))
        finally:
            gc.enable()

    def run(self, rounds: int | None = None) -> None:
        """Warm up and take all rounds, or ``rounds``."""
        planned = self.warm_up()
        for _ in range(planned if rounds is None else rounds):
            self.round()

    def seconds_of(self, name: str) -> float:
        """Median seconds of one call."""
        return statistics.median(self.times[name])

    def time(self, name: str, label: str, unit: str = "ms", per: float = 1.0) -> Figure:
        """The time of one call, divided by ``per``."""
        scale = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}[unit.split("/")[0]]
        return summary(label, unit, [t * scale / per for t in self.times[name]])

    def ratio(
        self,
        above: str,
        below: str,
        label: str,
        target: Target | None = None,
        *,
        factor: float = 1.0,
        unit: str = "x",
    ) -> Figure:
        """time(above) / time(below) * factor, taken within each round."""
        pairs = zip(self.times[above], self.times[below], strict=True)
        return summary(label, unit, [factor * a / b for a, b in pairs], target)


class Suite(NamedTuple):
    """A contest, the contender it is about, and how its times become figures."""

    title: str
    main: str
    contest: Contest
    figures: Callable[[Contest], list[Figure]]


@dataclass
class Report:
    """Everything that one run measured."""

    machine: dict[str, Any]
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """The machine line and one table."""
        lines = [", ".join(f"{key} {value}" for key, value in self.machine.items()), ""]
        lines += table(self.figures)
        lines += ["", *(f"- {note}" for note in self.notes)] if self.notes else []
        return "\n".join(lines) + "\n"

    def to_json(self) -> dict[str, Any]:
        figures = [figure.to_json() for figure in self.figures]
        return {"machine": self.machine, "figures": figures, "notes": self.notes}


def table(figures: Iterable[Figure]) -> list[str]:
    """Lines of the Markdown table 'figure | target | measured | spread'."""
    rows = [("figure", "target", "measured", "spread"), ("---",) * 4]
    rows += [figure.cells() for figure in figures]
    return ["| " + " | ".join(row) + " |" for row in rows]


def summary(name: str, unit: str, values: Sequence[float], target: Target | None = None) -> Figure:
    """Median and quartiles of one value a round."""
    if len(values) < 2:
        return Figure(name, values[0], unit, target=target)
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Figure(name, median, unit, low, high, target)


def _timed(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def matmul() -> Callable[[], object]:
    """The yardstick of the machine's own float32 rate, as a contender."""
    left, right, out = (torch.randn(2048, 2048) for _ in range(3))
    return lambda: torch.mm(left, right, out=out)


def report_parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """The options of every ``python -m module`` that measures and writes a report."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("--threads", type=int, default=2, help="threads of every contender")
    parser.add_argument("--out", type=Path, default=REPORTS, help="folder of the report")
    parser.add_argument("--quick", action="store_true", help="two rounds: does it work")
    return parser


def set_threads(number: int = 2) -> None:
    """The same number of threads for every contender."""
    torch.set_num_threads(number)


def machine() -> dict[str, Any]:
    """What the figures were taken on; one line of each report."""
    return {
        "processor": _proc("/proc/cpuinfo", "model name") or platform.processor() or "unknown",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load before": f"{os.getloadavg()[0]:.2f}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastl2o": fastl2o.__version__,
        "instruction set": fastl2o.info()["cpu_capability"],
    }


def available_gib() -> float:
    """Memory that can be used without swapping, infinite where the system does not say."""
    text = _proc("/proc/meminfo", "MemAvailable")
    return float(text.split()[0]) / 2**20 if text else math.inf


def _proc(path: str, key: str) -> str:
    """The value of a line 'key: value' of a /proc file, "" if there is none."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def proc_kib(key: str) -> int:
    """A line of /proc/self/status in KiB, such as VmHWM, the peak of the resident memory.

    Raises:
        RuntimeError: where there is no such file (Linux has it).
    """
    text = _proc("/proc/self/status", key)
    if not text:
        raise RuntimeError(f"/proc/self/status has no {key}; memory is measured on Linux only")
    return int(text.split()[0])


def relative_errors(result: Tensor, exact: Tensor) -> tuple[float, float]:
    """|result - exact| / |exact| in the 2-norm and in the largest element, in float64."""
    difference, exact = result.detach().double() - exact.double(), exact.double()
    norm = float(torch.linalg.vector_norm(difference) / torch.linalg.vector_norm(exact))
    return norm, float(difference.abs().max() / exact.abs().max())


def require(condition: bool, message: str) -> None:
    """The gate: no time is taken of what is not correct."""
    if not condition:
        raise AssertionError(f"{message}; nothing was timed")
