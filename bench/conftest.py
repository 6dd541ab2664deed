"""Options and fixtures of the benchmarks, and the table after them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest

from . import common

_REPORT = pytest.StashKey[common.Report]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--assert-targets", action="store_true", help="fail where a figure misses its target"
    )
    parser.addoption(
        "--quick", action="store_true", help="two rounds: does it work, not how fast is it"
    )
    parser.addoption("--bench-threads", type=int, default=2, help="threads of every contender")


def pytest_configure(config: pytest.Config) -> None:
    common.set_threads(config.getoption("--bench-threads"))
    config.stash[_REPORT] = common.Report(common.machine())


@pytest.fixture
def publish(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Add figures and notes to the table; with ``--assert-targets`` also fail on missed targets."""

    def add(figures: list[common.Figure], notes: list[str] | None = None) -> None:
        report = request.config.stash[_REPORT]
        report.figures += figures
        report.notes += notes or []
        if request.config.getoption("--assert-targets"):
            missed = [" | ".join(figure.cells()) for figure in figures if figure.met is False]
            assert not missed, "\n".join(missed)

    return add


@pytest.fixture
def take(
    request: pytest.FixtureRequest, benchmark: Any, publish: Callable[..., None]
) -> Callable[..., None]:
    """Run a suite under pytest-benchmark: before each call that it times, all take their turns."""

    def run(suite: common.Suite, notes: list[str] | None = None) -> None:
        contest = suite.contest
        rounds = contest.warm_up()
        if request.config.getoption("--quick"):
            rounds = 2
        benchmark.group = suite.title
        benchmark.pedantic(contest.contenders[suite.main], setup=contest.round, rounds=rounds)
        figures = suite.figures(contest)
        benchmark.extra_info.update({figure.name: figure.value for figure in figures})
        publish(figures, notes)

    return run


@pytest.fixture(autouse=True)
def _warnings_of_others() -> Any:
    # torch.compile imports half of torch; its deprecation warnings are not about this package.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    report = config.stash[_REPORT]
    if report.figures:
        terminalreporter.section("figures")
        terminalreporter.write(report.markdown())
