"""Which Adam teaches best: ``python -m bench.teachers [--task FILE.toml] [RULE ...]``.

What a rule that imitates could at best become: the losses of the teachers of ``meta.Imitation``
taking the steps themselves, and of rules (shipped names or paths) beside them, on what the tasks
hold out of meta-training. Prints a table, and writes ``bench/reports/teachers.md`` where the
settings are the default ones.
"""

from __future__ import annotations

import argparse
from functools import partial

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

BETAS, DECAY, TAIL = (0.95, 0.95), 2000.0, 100
# A cautious Adam leaves out steps, so its rate is half as large again.
RATE, CAUTIOUS_RATE = 0.015, 0.0225


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

    def teacher(lr: float, decay: float = DECAY, **changes: bool) -> MakeOptimizer:
        taught = meta.Imitation(lr=lr, betas=BETAS, decay=decay, schedule="inverse", **changes)
        return partial(TeacherStepper, teacher=taught)

    both = {"nesterov": True, "cautious": True}
    return {
        "Adam": teacher(RATE),
        "Nesterov": teacher(RATE, nesterov=True),
        "cautious": teacher(CAUTIOUS_RATE, cautious=True),
        "cautious and Nesterov": teacher(CAUTIOUS_RATE, **both),
        "the same, falling twice as fast": teacher(CAUTIOUS_RATE, DECAY / 2, **both),
        "the same, falling half as fast": teacher(CAUTIOUS_RATE, DECAY * 2, **both),
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m bench.teachers")
    parser.add_argument("rules", nargs="*", help="names or paths of rules to show beside them")
    parser.add_argument("--task", default=str(ROOT / "bench" / "general_tasks.toml"), help="TOML")
    parser.add_argument("--data", help="MNIST .npz; default $FASTL2O_DATA")
    parser.add_argument("--horizon", type=int, default=2000, help="inner steps")
    parser.add_argument("--runs", type=int, default=2, help="of each task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-write", action="store_true", help="only print")
    chosen = parser.parse_args()
    set_threads(chosen.threads)
    entrants = teachers()
    for name in chosen.rules:
        entrants[name] = partial(learned_stepper, rule=fastl2o.load(name))
    tasks = [task.held_out() for task in load_tasks(chosen.task, chosen.data)]
    rows = []
    bar = tqdm(total=len(tasks) * len(entrants) * chosen.horizon, unit="step", unit_scale=True)
    for task in tasks:
        row = [repr(task)]
        for make in entrants.values():
            trained = train(
                task,
                make,
                horizon=chosen.horizon,
                runs=chosen.runs,
                seed=chosen.seed,
                bar=bar,
            )
            mean, std = mean_std(trained.losses[-TAIL:].double().mean(0))
            row.append(f"{mean:.4g} ±{std:.2g}")
        rows.append(row)
        bar.write(" | ".join(row))
    bar.close()
    line = ", ".join(f"{key} {value}" for key, value in machine().items())
    text = (
        f"# Teachers\n\nMade by `python -m bench.teachers`. {line}\n\nMean loss of the last {TAIL} "
        f"of {chosen.horizon:,} steps (± standard deviation over {chosen.runs} runs); rates "
        f"{RATE} / (1 + t / {DECAY:.0f}), where cautious {CAUTIOUS_RATE}; betas {BETAS}.\n\n"
        + markdown_table(["task", *entrants], rows)
        + "\n"
    )
    print(text)
    usual = not chosen.rules and all(
        getattr(chosen, name) == parser.get_default(name) for name in ("task", "horizon", "runs")
    )
    if usual and not chosen.no_write:
        (REPORTS / "teachers.md").write_text(text)


if __name__ == "__main__":
    main()
