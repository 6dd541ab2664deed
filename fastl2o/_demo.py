"""``fastl2o demo``: a digits classifier trained with shipped rules and with tuned optimizers.

An ordinary PyTorch training loop with the drop-in optimizer, as a user would write it; see
``fastl2o.evaluate`` for comparisons on the tasks of the literature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from ._figure import new_figure, save
from .evaluate import (
    HAND_DESIGNED,
    LEARNING_RATES,
    draw_band,
    mean_std,
    pick_learning_rate,
    render_table,
)
from .meta.tasks._data import Images, load_images
from .optim import LearnedOptimizer
from .rules import Rule

__all__ = ["Curves", "DemoSetting", "plot", "run", "table"]

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "elu": nn.ELU,
}


@dataclass(frozen=True)
class DemoSetting:
    """What is trained, and how often: a 64-``hidden``-10 network on 8x8 images."""

    steps: int = 200
    seeds: int = 5
    tuning_seeds: int = 3
    batch_size: int = 128
    hidden: int = 32
    activation: str = "sigmoid"
    every: int = 5  # steps between evaluations of the training loss
    learning_rates: tuple[float, ...] = LEARNING_RATES

    def __post_init__(self) -> None:
        for name in ("steps", "seeds", "tuning_seeds", "batch_size", "hidden", "every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.activation not in ACTIVATIONS:
            accepted = ", ".join(ACTIVATIONS)
            raise ValueError(f"activation must be one of {accepted}; got {self.activation!r}")

    @property
    def points(self) -> list[int]:
        """Steps at which the training loss is evaluated; the last step always."""
        return sorted({*range(0, self.steps + 1, self.every), self.steps})


class Curves(NamedTuple):
    """What one optimizer did on S seeds."""

    name: str
    learning_rate: float | None  # None: a learned rule, nothing tuned
    train_loss: Tensor  # (points, S), over the whole training set
    accuracy: Tensor  # (S,), on the test images after the last step


def _train(
    make: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
    data: Images,
    setting: DemoSetting,
    seed: int,
    points: Collection[int],
) -> tuple[list[float], list[float], float]:
    """One training run: minibatch losses, training losses at the steps ``points``, accuracy."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(data.train_images.shape[1], setting.hidden),
            ACTIVATIONS[setting.activation](),
            nn.Linear(setting.hidden, data.num_classes),
        )
        batches = torch.randint(len(data.train_labels), (setting.steps, setting.batch_size))
    optimizer = make(model.parameters())
    minibatch_losses, train_losses = [], []
    for step in range(setting.steps + 1):
        if step in points:
            with torch.no_grad():
                loss = cross_entropy(model(data.train_images), data.train_labels)
            train_losses.append(loss.item())
        if step == setting.steps:
            break
        batch = batches[step]
        optimizer.zero_grad()
        loss = cross_entropy(model(data.train_images[batch]), data.train_labels[batch])
        loss.backward()
        optimizer.step()
        minibatch_losses.append(loss.item())
    with torch.no_grad():
        right = model(data.test_images).argmax(1) == data.test_labels
    return minibatch_losses, train_losses, right.float().mean().item()


def run(
    rules: Mapping[str, Rule], setting: DemoSetting | None = None, *, progress: bool = False
) -> list[Curves]:
    """Train the classifier with every rule and with every hand-designed optimizer, tuned.

    A learning rate is chosen by the mean minibatch loss over all steps, on seeds of its own. The
    rules run as they are, with ``lr=1``.

    Args:
        rules: learned rules by the name to report them under.
        progress: show a progress bar, if stderr is a terminal.
    """
    setting = setting or DemoSetting()
    stored = load_images("digits")
    data = stored._replace(
        train_images=stored.train_images * stored.scale,
        test_images=stored.test_images * stored.scale,
    )
    trainings = len(rules) * setting.seeds + len(HAND_DESIGNED) * (
        len(setting.learning_rates) * setting.tuning_seeds + setting.seeds
    )
    with tqdm(
        total=trainings, disable=None if progress else True, desc="training runs", leave=False
    ) as bar:

        def train(
            make: Any, seed: int, points: Collection[int] = ()
        ) -> tuple[list[float], list[float], float]:
            bar.update()
            return _train(make, data, setting, seed, points)

        def curves(name: str, lr: float | None, make: Any) -> Curves:
            results = [train(make, seed, setting.points) for seed in range(setting.seeds)]
            train_loss = torch.tensor([losses for _, losses, _ in results]).T
            return Curves(name, lr, train_loss, torch.tensor([result[2] for result in results]))

        def tuning_loss(make: Any) -> float:
            seeds = range(1_000_003, 1_000_003 + setting.tuning_seeds)
            totals = [math.fsum(train(make, seed)[0]) for seed in seeds]
            return math.fsum(totals) / (setting.tuning_seeds * setting.steps)

        learned = [
            curves(name, None, partial(LearnedOptimizer, rule=rule)) for name, rule in rules.items()
        ]
        designed = []
        for name, build in HAND_DESIGNED.items():
            scores = {lr: tuning_loss(partial(build, lr=lr)) for lr in setting.learning_rates}
            lr = pick_learning_rate(scores)
            designed.append(curves(name, lr, partial(build, lr=lr)))
    return learned + designed


def table(results: list[Curves], setting: DemoSetting) -> str:
    """Training loss at a few steps and test accuracy, mean ±std over seeds, as text."""
    points = setting.points
    shown = [p for p in points if p in {25, 50, 100, setting.steps}] or points
    lines = []
    for curves in results:
        lr = "none" if curves.learning_rate is None else f"{curves.learning_rate:.2g}"
        losses = [str(mean_std(curves.train_loss[points.index(step)])) for step in shown]
        accuracy = mean_std(100 * curves.accuracy)
        lines.append([curves.name, lr, *losses, f"{accuracy.mean:.1f} ±{accuracy.std:.1f}"])
    header = ["optimizer", "tuned lr", *(f"loss, step {step}" for step in shown), "test accuracy %"]
    return render_table(header, lines)


def plot(results: list[Curves], setting: DemoSetting, path: Path) -> Path:
    """Draw mean and spread of the training losses; the learned rules in thick lines.

    Args:
        path: where to write; the ending gives the format (.png, .svg, .pdf).
    """
    figure = new_figure(7.5, 4.5, "use --no-picture")
    axes = figure.add_subplot()
    for curves in results:
        learned = curves.learning_rate is None
        label = curves.name if learned else f"{curves.name}, lr {curves.learning_rate:.2g}"
        draw_band(axes, setting.points, curves.train_loss, label, bold=learned)
    axes.set(yscale="log", xlabel="step", ylabel="training loss")
    axes.set_title(
        f"Digits, 64-{setting.hidden}-10 {setting.activation}, batch {setting.batch_size}, "
        f"{setting.seeds} seeds: mean ± std"
    )
    axes.grid(alpha=0.3)
    axes.legend()
    return save(figure, path)
