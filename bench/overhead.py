"""What a step costs besides its arithmetic: few to many tiny tensors, beside torch's fused Adam.

``python -m bench.overhead`` prints one Markdown table and writes it to
``bench/reports/overhead.md``; it takes about a minute. All optimizers take turns in one process. A
rule without layers has next to no arithmetic, so its time is the overhead itself; those of the
published sizes show what a user of them sees.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

import fastl2o
from fastl2o.rules import HierarchicalRule, LSTMRule, RNNPropRule, Rule

from . import common, step

ADAM = "torch's fused Adam"
COUNTS = (1, 100, 1_000)
COORDINATES = 4  # of each tensor
AT_MOST = common.Target(2.0, at_least=False)
RULES: dict[str, Callable[[], Rule]] = {
    "no layers": lambda: LSTMRule(num_layers=0),
    "LSTM 2x20": LSTMRule,
    "RNNprop 2x20": RNNPropRule,
    "hierarchical 10/20/20": HierarchicalRule,
}


def _params(count: int) -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter(torch.zeros(COORDINATES)) for _ in range(count)]
    for p in params:
        p.grad = torch.full_like(p, 1e-2)
    return params


def _optimizer(rule: Rule, count: int) -> torch.optim.Optimizer:
    rule.reset_parameters(torch.Generator().manual_seed(0))
    return fastl2o.LearnedOptimizer(_params(count), rule)


def gate() -> None:
    """What is timed is correct: kernels against the reference, no layers against SGD."""
    step.gate("lstm")
    step.gate("rnnprop")
    ours, theirs = _params(100), _params(100)
    fastl2o.LearnedOptimizer(ours, LSTMRule.as_sgd(0.1, num_layers=0)).step()
    torch.optim.SGD(theirs, 0.1).step()
    same = all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    common.require(same, "a rule without layers is not SGD")


def of(count: int, seconds: float) -> common.Suite:
    """All optimizers on ``count`` tensors."""
    contenders: dict[str, Callable[[], object]] = {
        ADAM: torch.optim.Adam(_params(count), fused=True).step
    }
    for name, make in RULES.items():
        contenders[name] = _optimizer(make(), count).step
    title = f"{count:,} tensor{'s' if count > 1 else ''} of {COORDINATES}"

    def figures(contest: common.Contest) -> list[common.Figure]:
        times = [contest.time(name, f"{title}: {name}", "us") for name in contest.contenders]
        over_adam = [
            contest.ratio(name, ADAM, f"{title}: {name} over {ADAM}", AT_MOST) for name in RULES
        ]
        return [*times, *over_adam]

    return common.Suite(title, "no layers", common.Contest(contenders, seconds), figures)


def measure(quick: bool = False) -> common.Report:
    """All figures; ``quick`` takes two rounds, to see that it works."""
    gate()
    report = common.Report(common.machine())
    for count in COUNTS:
        suite = of(count, 20.0)
        suite.contest.run(2 if quick else None)
        report.figures += suite.figures(suite.contest)
    return report


def main() -> None:
    """Parse arguments, measure, print and write."""
    parser = common.report_parser("bench.overhead", __doc__)
    arguments = parser.parse_args()
    common.set_threads(arguments.threads)
    text = measure(arguments.quick).markdown()
    print(text)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "overhead.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
