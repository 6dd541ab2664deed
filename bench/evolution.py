"""PES with 16 antithetic pairs: fastl2o's window against the same in eager torch.

``python -m bench.evolution`` prints a table and writes ``bench/reports/evolution.md``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

import fastl2o
from fastl2o import meta
from fastl2o.meta.tasks import MLPClassification, Quadratic, Task
from fastl2o.rules import CoordinateRule

from .common import (
    REPORTS,
    Contest,
    Figure,
    Target,
    machine,
    relative_errors,
    require,
    set_threads,
    table,
)
from .meta import find_data

PAIRS, SIGMA = 16, 0.01
# Steps of a window; fewer of the network on MNIST, of which 20 would keep the eager side busy for
# minutes.
UNROLL, MNIST_UNROLL = 20, 2
OURS, EAGER = "fastl2o.meta", "eager torch"


class EagerPES:
    """Persistent evolution strategies over runs batched by ``torch.vmap``, written by hand.

    Args:
        rule: gives the centre of the disturbances and, in plain torch, the step.
        progress: where the paired runs start.
        unroll: steps of a window.
    """

    def __init__(self, rule: CoordinateRule, progress: meta.Progress, unroll: int) -> None:
        self.rule, self.progress, self.unroll = rule, progress, unroll
        self.params, self.grads = progress.params.clone(), progress.grads.clone()
        self.losses = progress.losses.clone()
        self.state = progress.state.transpose(0, 1).contiguous()
        self.taken, self.window_count = 0, 0
        self.total = torch.zeros(PAIRS, rule.num_meta_parameters)

    @torch.no_grad()
    def window(self) -> Tensor:
        """Advance by a window; its meta-gradient."""
        center, noise = self.rule.flat_parameters().detach(), self.progress.perturbations
        assert noise is not None
        drawn = noise.noise(self.window_count, PAIRS, len(center))
        self.total += drawn
        phi = torch.cat((center + SIGMA * drawn, center - SIGMA * drawn))
        run, mean = self.progress.run, torch.zeros_like(self.losses)

        def step(grad: Tensor, state: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
            return self.rule.reference_step(grad, state, self.taken, row)

        for _ in range(self.unroll):
            update, self.state = torch.vmap(step)(self.grads, self.state, phi)
            self.params += update
            self.losses, self.grads = run.loss_and_grad(self.params, run.next_batch())
            change = (self.losses + 1e-8) / (self.progress.first_losses + 1e-8)
            mean += torch.log(change) / self.unroll
            self.taken += 1
        self.window_count += 1
        plus, minus = mean.chunk(2)
        return (plus - minus) @ self.total / (2 * SIGMA * PAIRS)


def begin(estimator: meta.PES, rule: CoordinateRule, task: Task) -> meta.Progress:
    """The same paired runs at every call."""
    generator = torch.Generator().manual_seed(0)
    return estimator.begin(rule, estimator.sample(task, 2 * PAIRS, generator, torch.float32))


def compare(
    name: str, rule: CoordinateRule, task: Task, unroll: int, seconds: float
) -> list[Figure]:
    """Gate, then inner steps a second of both and their ratio."""
    estimator = meta.PES(unroll, SIGMA)
    ours = begin(estimator, rule, task)
    theirs = EagerPES(rule, begin(estimator, rule, task), unroll)
    for _ in range(2):
        error, _ = relative_errors(estimator.window(rule, ours).gradient, theirs.window())
        require(error <= 1e-2, f"{name}: the meta-gradients differ by {error:.2g}, relative")
    contest = Contest(
        {OURS: lambda: estimator.window(rule, ours), EAGER: theirs.window}, seconds, max_rounds=15
    )
    contest.run()
    steps = 2 * PAIRS * unroll
    figures = [
        contest.time(contender, f"{name}: {contender}, an inner step of a run", "us", per=steps)
        for contender in contest.contenders
    ]
    label = f"{name}: times faster than {EAGER}"
    return [*figures, contest.ratio(EAGER, OURS, label, Target(5))]


def network(data: str | Path) -> Task:
    """A perceptron of 20 hidden units."""
    return MLPClassification(data, hidden=(20,), init_scale=0.1)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m bench.evolution")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each comparison")
    parser.add_argument("--no-write", action="store_true", help="only print")
    chosen = parser.parse_args()
    set_threads(chosen.threads)
    contests = [
        ("quadratic, 10 coordinates", Quadratic(), UNROLL),
        ("digits 64-20-10", network("digits"), UNROLL),
    ]
    data = find_data()
    if data != "digits":
        contests.append(("mnist 784-20-10", network(data), MNIST_UNROLL))
    figures = []
    for family in ("lstm", "rnnprop"):
        rule = fastl2o.LSTMRule() if family == "lstm" else fastl2o.RNNPropRule()
        rule.reset_parameters(torch.Generator().manual_seed(0))
        for title, task, unroll in contests:
            figures += compare(f"{family}, {title}", rule, task, unroll, chosen.seconds)
    line = ", ".join(f"{key} {value}" for key, value in machine().items())
    text = (
        f"# Persistent evolution strategies\n\nMade by `python -m bench.evolution`. {line}\n\n"
        f"{PAIRS} antithetic pairs, windows of {UNROLL} steps, {MNIST_UNROLL} of MNIST's network; "
        "both sides evaluate the optimizee alike, and their meta-gradients were compared before "
        "they were timed.\n\n" + "\n".join(table(figures)) + "\n"
    )
    print(text)
    if not chosen.no_write:
        (REPORTS / "evolution.md").write_text(text)


if __name__ == "__main__":
    main()
