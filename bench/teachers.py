"""Which Adam teaches best: ``python -m bench.teachers [--task FILE.toml --horizon T] [RULE ...]``.

What a rule that imitates could at best become: the losses of the teachers of ``meta.Imitation``
taking the steps themselves, and of rules (shipped names or paths) beside them, on what the tasks
hold out of meta-training. Prints tables, and without ``--task`` and rules writes
``bench/reports/teachers.md``.
"""

from __future__ import annotations

import argparse
from argparse import Namespace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import fastl2o
from fastl2o import meta
from fastl2o.evaluate import (
    MakeOptimizer,
    TaskRun,
    learned_stepper,
    markdown_table,
    mean_std,
    train,
)
from fastl2o.meta.recipe import load_tasks

from .common import REPORTS, ROOT, machine, set_threads

BETAS, DECAY, TAIL = (0.95, 0.99), 2000.0, 100
# A cautious Adam leaves out steps, so its rate is half as large again.
RATE, CAUTIOUS_RATE = 0.015, 0.0225
# Files of tasks and the steps that the report's runs take on them.
REPORTED = {
    str(ROOT / "bench" / "general_tasks.toml"): 2000,
    str(ROOT / "bench" / "mnist_networks.toml"): 10_000,
}


class TeacherStepper:
    """Takes a teacher's steps in ``params (R, D)``, whose ``.grad`` is set."""

    def __init__(self, params: Tensor, run: TaskRun, teacher: meta.Imitation) -> None:
        self.params, self.teacher, self.taken = params, teacher, 0
        self.moments = torch.zeros((2, *params.shape))

    def step(self) -> None:
        grads = self.params.grad
        assert grads is not None
        self.taken += 1
        self.params.detach().add_(self.teacher.adam_step(grads, self.moments, self.taken))


def teachers() -> dict[str, MakeOptimizer]:
    """What is compared, by name."""

    def teacher(lr: float, **changes: Any) -> MakeOptimizer:
        usual = {"betas": BETAS, "decay": DECAY, "schedule": "inverse"}
        return partial(TeacherStepper, teacher=meta.Imitation(lr=lr, **{**usual, **changes}))

    both = {"nesterov": True, "cautious": True}
    return {
        "Adam": teacher(RATE),
        "Nesterov": teacher(RATE, nesterov=True),
        "cautious": teacher(CAUTIOUS_RATE, cautious=True),
        "cautious and Nesterov": teacher(CAUTIOUS_RATE, **both),
        "the same, falling twice as fast": teacher(CAUTIOUS_RATE, decay=DECAY / 2, **both),
        "the same, falling half as fast": teacher(CAUTIOUS_RATE, decay=DECAY * 2, **both),
        "the same, betas 0.95": teacher(CAUTIOUS_RATE, betas=(0.95, 0.95), **both),
        "the same, betas 0.9 and 0.99": teacher(CAUTIOUS_RATE, betas=(0.9, 0.99), **both),
        "the same, betas 0.9 and 0.999": teacher(CAUTIOUS_RATE, betas=(0.9, 0.999), **both),
    }


def table(entrants: dict[str, MakeOptimizer], file: str, horizon: int, options: Namespace) -> str:
    """Mean last losses of all entrants on a file of tasks, in Markdown."""
    runs, tasks = options.runs, [task.held_out() for task in load_tasks(file, options.data)]
    rows = []
    with tqdm(total=len(tasks) * len(entrants) * horizon, unit="step", unit_scale=True) as bar:
        for task in tasks:
            row = [repr(task)]
            for make in entrants.values():
                trained = train(task, make, horizon=horizon, runs=runs, seed=options.seed, bar=bar)
                mean, std = mean_std(trained.losses[-TAIL:].double().mean(0))
                row.append(f"{mean:.4g} ±{std:.2g}")
            rows.append(row)
            bar.write(" | ".join(row))
    return (
        f"Mean loss of the last {TAIL} of {horizon:,} steps (± standard deviation over {runs} "
        f"runs):\n\n{markdown_table(['task', *entrants], rows)}\n"
    )


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m bench.teachers")
    parser.add_argument("rules", nargs="*", help="names or paths of rules to show beside them")
    parser.add_argument("--task", help="TOML; without it the files of the report")
    parser.add_argument("--data", help="MNIST .npz; default $FASTL2O_DATA")
    parser.add_argument("--horizon", type=int, help="inner steps with --task, default 2000")
    parser.add_argument("--runs", type=int, default=2, help="of each task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-write", action="store_true", help="only print")
    options = parser.parse_args()
    if options.horizon is not None and options.task is None:
        parser.error("--horizon goes with --task; the report's horizons are its own")
    set_threads(options.threads)
    entrants = teachers()
    for name in options.rules:
        entrants[name] = partial(learned_stepper, rule=fastl2o.load(name))
    chosen = REPORTED
    if options.task is not None:
        chosen = {options.task: options.horizon or 2000}
    line = ", ".join(f"{key} {value}" for key, value in machine().items())
    text = (
        f"# Teachers\n\nMade by `python -m bench.teachers`. {line}\n\nRates {RATE} / (1 + t / "
        f"{DECAY:.0f}), where cautious {CAUTIOUS_RATE}; betas {BETAS} unless named.\n\n"
        + "\n".join(table(entrants, file, horizon, options) for file, horizon in chosen.items())
    )
    print(text)
    usual = options.task is None and not options.rules
    usual &= all(getattr(options, key) == parser.get_default(key) for key in ("runs", "seed"))
    if usual and not options.no_write:
        (REPORTS / "teachers.md").write_text(text)


if __name__ == "__main__":
    main()
