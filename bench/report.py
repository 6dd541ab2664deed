"""Take every figure in one run: ``python -m bench.report``, about five minutes on two idle cores.

Prints one Markdown table, writes it to ``bench/reports/cpu.md`` and the numbers to ``cpu.json``.
Each part is checked for correctness before it is timed; a part that is not correct stops the run.
"""

from __future__ import annotations

import json
import sys
import time

from . import common, meta, step, unroll

FAMILIES = ("lstm", "rnnprop")


def measure(quick: bool = False) -> common.Report:
    """All figures; ``quick`` takes two rounds of each contest, to see that it works."""
    report, begun = common.Report(common.machine()), time.perf_counter()
    rounds = 2 if quick else None

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - begun:4.0f} s] {text}", file=sys.stderr, flush=True)

    def take(suite: common.Suite, notes: list[str]) -> None:
        say(suite.title)
        suite.contest.run(rounds)
        report.figures += suite.figures(suite.contest)
        report.notes += notes
        for note in notes:
            say(note)

    for family, seconds in zip(FAMILIES, (40.0, 20.0), strict=True):
        take(*step.against_baselines(family, seconds))
    take(*step.linearity(30.0))
    for family, seconds in zip(FAMILIES, (30.0, 15.0), strict=True):
        say(f"{family}: unroll gradient against float64 autograd")
        report.figures += unroll.accuracy_figures(unroll.accuracy(family), family)
        take(*unroll.against_eager(family, seconds))
    for steps in (20, 1000):
        say(f"memory of the unroll gradient, {steps} steps")
        report.figures += unroll.memory(steps)
    suite, gated, notes = meta.training(60.0)
    report.figures += gated
    take(suite, notes)
    return report


def main() -> None:
    """Parse arguments, measure, print and write."""
    parser = common.report_parser("bench.report", __doc__)
    parser.add_argument("--assert-targets", action="store_true", help="exit 1 on missed targets")
    arguments = parser.parse_args()
    common.set_threads(arguments.threads)
    report = measure(arguments.quick)
    text = report.markdown()
    print(text)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "cpu.md").write_text(text, encoding="utf-8")
    document = json.dumps(report.to_json(), indent=2, allow_nan=False)
    (arguments.out / "cpu.json").write_text(document + "\n", encoding="utf-8")
    if arguments.assert_targets and any(figure.met is False for figure in report.figures):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
