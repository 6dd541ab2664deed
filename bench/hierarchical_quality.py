"""How well a hierarchical rule trains: ``python -m bench.hierarchical_quality [RULE]``.

On freshly drawn problems of the ensemble, of sizes held out of meta-training, beside RMSProp and
Adam, each with the best of 13 learning rates for the problem's family, chosen on other seeds; and
on a small network and a small convolutional one, which the rule has never seen, through
``LearnedOptimizer``. Prints tables and writes them to ``bench/reports/hierarchical_quality.md``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

import fastl2o
from fastl2o import HierarchicalRule, meta
from fastl2o.evaluate import (
    HAND_DESIGNED,
    LEARNING_RATES,
    MakeOptimizer,
    Task,
    hand_designed_stepper,
    learned_stepper,
    pick_learning_rate,
    train,
)

from .common import REPORTS, machine, set_threads

BASELINES = ("RMSprop", "Adam")
SEED, TUNING_SEED = 20_000, 30_000
# Added to losses under the logarithm, as in meta-training.
LOG_EPS = 1e-8
NETWORK_STEPS, NETWORK_BATCH, NETWORK_SEEDS = 2_000, 64, 3
REPORTED = (100, 300, 1_000, NETWORK_STEPS)


def log_ratio(losses: Tensor) -> Tensor:
    """log(f_T / f_0) of each run, infinity where it is not finite."""
    ratio = torch.log((losses[-1] + LOG_EPS) / (losses[0] + LOG_EPS))
    return ratio.double().nan_to_num(math.inf, math.inf, -math.inf)


def diverged(losses: Tensor) -> int:
    """Runs that went non-finite, or whose last tenth lies above their start."""
    last = losses[-max(1, (len(losses) - 1) // 10) :].mean(0)
    return int((~losses.isfinite().all(0) | (last > losses[0])).sum())


class Ensemble:
    """The held-out problems, and optimizers on them."""

    def __init__(self, horizon: int, runs: int, progress: bool, families: list[str]) -> None:
        all_of: dict[str, list[Task]] = dict(meta.tasks.ensemble(held_out=True))
        unknown = [name for name in families if name not in all_of]
        if unknown:
            raise SystemExit(f"no family is named {unknown[0]!r}; there are {', '.join(all_of)}")
        self.families = {name: all_of[name] for name in families or all_of}
        self.horizon, self.runs, self.progress = horizon, runs, progress

    def losses(self, family: str, make: MakeOptimizer, seed: int, times: int = 1) -> list[Tensor]:
        """Of each task of a family, ``(horizon + 1, runs)``."""
        return [
            train(
                task, make, horizon=self.horizon * times, runs=self.runs, seed=seed + index
            ).losses
            for index, task in enumerate(self.families[family])
        ]

    def tuned(self, family: str, name: str) -> tuple[float, MakeOptimizer]:
        """The hand-designed optimizer at its best rate for the family."""
        makes = {
            lr: partial(hand_designed_stepper, build=HAND_DESIGNED[name], lr=lr)
            for lr in LEARNING_RATES
        }
        scores = {
            lr: float(torch.cat([*map(log_ratio, self.losses(family, make, TUNING_SEED))]).mean())
            for lr, make in makes.items()
        }
        lr = pick_learning_rate(scores)
        return lr, makes[lr]

    def compare(self, rule: HierarchicalRule) -> list[dict[str, Any]]:
        """A row for each family: scores of all optimizers and the rule's divergences."""
        learned = partial(learned_stepper, rule=rule)
        rows = []
        for family in tqdm(self.families, disable=not self.progress):
            row: dict[str, Any] = {"family": family, "problems": len(self.families[family])}
            ours = self.losses(family, learned, SEED)
            scores = torch.cat([log_ratio(losses) for losses in ours])
            row |= {"rule": float(scores.mean()), "spread": float(scores.std())}
            for name in BASELINES:
                row[f"{name} lr"], make = self.tuned(family, name)
                found = [log_ratio(losses) for losses in self.losses(family, make, SEED)]
                row[name] = float(torch.cat(found).mean())
            row["runs"] = scores.numel()
            row["diverged"] = sum(map(diverged, ours))
            longer = self.losses(family, learned, SEED, 10)
            row["rule at 10x"] = float(torch.cat([*map(log_ratio, longer)]).mean())
            row["diverged at 10x"] = sum(map(diverged, longer))
            rows.append(row)
            if self.progress:
                tqdm.write(", ".join(f"{key} {value}" for key, value in row.items()), sys.stderr)
        return rows


def network(kind: str) -> nn.Module:
    """A small network for 8 x 8 digits."""
    if kind == "MLP 64-32-10":
        return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Flatten()),
        nn.Linear(256, 10),
    )


def train_network(
    kind: str, build: Callable[[list[nn.Parameter]], torch.optim.Optimizer], seed: int
) -> Tensor:
    """Mean losses of 20 minibatches up to each step reported, and whether all were finite."""
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    torch.manual_seed(seed)
    model = network(kind)
    optimizer = build(list(model.parameters()))
    losses = []
    for _ in range(NETWORK_STEPS):
        chosen = torch.randint(len(labels), (NETWORK_BATCH,))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    curve = torch.tensor(losses)
    return torch.stack([curve[step - 20 : step].mean() for step in REPORTED])


def networks(rule: HierarchicalRule, progress: bool) -> list[dict[str, Any]]:
    """Loss curves of the rule and of tuned Adam, means over seeds."""
    rows = []
    for kind in ("MLP 64-32-10", "conv 8-16"):
        seeds = range(NETWORK_SEEDS)

        def adam(params: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
            return torch.optim.Adam(params, lr=lr)

        scores = {
            lr: float(train_network(kind, partial(adam, lr=lr), 100)[-1])
            for lr in tqdm(LEARNING_RATES, disable=not progress)
        }
        best = pick_learning_rate(scores)
        builds: Mapping[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
            "rule": lambda params: fastl2o.LearnedOptimizer(params, rule, nonfinite="pass"),
            f"Adam, lr {best:.2g}": partial(adam, lr=best),
        }
        for name, build in builds.items():
            curves = torch.stack([train_network(kind, build, seed) for seed in seeds])
            rows.append({"network": kind, "optimizer": name, "losses": curves.mean(0).tolist()})
    return rows


def render(rows: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]], T: int) -> str:
    """The tables in Markdown."""
    lines = [
        f"Held-out problems, T = {T}: mean of log(f_T / f_0), lower is better; standard deviation "
        "of the rule's runs; diverged: non-finite, or the mean of the last tenth above the start.",
        "",
        "| family | problems | rule | RMSProp (lr) | Adam (lr) | diverged | at 10 T | diverged |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["family"], str(row["problems"]), f"{row['rule']:.2f} ±{row['spread']:.2f}"]
        cells += [f"{row[name]:.2f} ({row[f'{name} lr']:.2g})" for name in BASELINES]
        cells += [f"{row['diverged']}/{row['runs']}"]
        cells += [f"{row['rule at 10x']:.2f}", f"{row['diverged at 10x']}/{row['runs']}"]
        lines.append(f"| {' | '.join(cells)} |")
    weights = [row["problems"] for row in rows]
    means = [
        sum(row[name] * weight for row, weight in zip(rows, weights, strict=True)) / sum(weights)
        for name in ("rule", *BASELINES, "rule at 10x")
    ]
    runs = sum(row["runs"] for row in rows)
    counts = [
        f"{sum(row[name] for row in rows)}/{runs}" for name in ("diverged", "diverged at 10x")
    ]
    cells = ["**all problems**", str(sum(weights)), *(f"{mean:.2f}" for mean in means[:-1])]
    cells += [counts[0], f"{means[-1]:.2f}", counts[1]]
    lines += [f"| {' | '.join(cells)} |", ""]
    steps = [f"step {step:,}" for step in REPORTED]
    lines += [
        f"Networks on scikit-learn's digits, batch {NETWORK_BATCH}: loss, mean of 20 minibatches "
        f"and {NETWORK_SEEDS} seeds; Adam with the best of 13 rates at the last step.",
        "",
        f"| network | optimizer | {' | '.join(steps)} |",
        f"|---|---|{'---|' * len(steps)}",
    ]
    for row in found:
        losses = " | ".join(f"{loss:.4f}" for loss in row["losses"])
        lines.append(f"| {row['network']} | {row['optimizer']} | {losses} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m bench.hierarchical_quality")
    parser.add_argument("rule", nargs="?", default="hierarchical-small", help="name or path")
    parser.add_argument("--horizon", type=int, default=200, help="T")
    parser.add_argument("--runs", type=int, default=4, help="of each problem")
    parser.add_argument("--families", nargs="*", default=[], help="only these, and do not write")
    parser.add_argument("--no-write", action="store_true", help="only print")
    arguments = parser.parse_args()
    rule = fastl2o.load(arguments.rule)
    if not isinstance(rule, HierarchicalRule):
        parser.error(f"{arguments.rule} is of family {rule.family!r}, not 'hierarchical'")
    set_threads(1)
    rows = Ensemble(arguments.horizon, arguments.runs, True, arguments.families).compare(rule)
    found = networks(rule, True)
    described = ", ".join(f"{key} {value}" for key, value in machine().items())
    title = f"# The quality of {arguments.rule}"
    text = f"{title}\n\n{described}\n\n{render(rows, found, arguments.horizon)}"
    print(text)
    if not (arguments.no_write or arguments.families):
        (REPORTS / "hierarchical_quality.md").write_text(text)
        data = {"horizon": arguments.horizon, "ensemble": rows, "networks": found}
        (REPORTS / "hierarchical_quality.json").write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
