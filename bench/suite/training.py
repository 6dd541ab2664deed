"""What an optimizer adds to the training of small real models: its share of a step's time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fastl2o

from ..common import Contest
from . import contenders
from .contenders import ADAMS, DEVICE, RULES

BATCH_SIZES = (16, 64, 256, 1024)


class _Transformer(nn.Module):
    """One encoder layer over the eight rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(images.squeeze(1))).mean(dim=1))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "MLP 64-32-10": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)
    ),
    "convolutions 16-32": lambda: nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    ),
    "transformer 32": _Transformer,
}


def _data() -> tuple[Tensor, Tensor]:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    return images.to(DEVICE), torch.tensor(digits.target).to(DEVICE)


def _loop(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, images: Tensor, labels: Tensor
) -> Callable[[], object]:
    def run() -> None:
        model.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        if optimizer is not None:
            optimizer.step()

    return contenders.synchronised(run)


def _optimizers(model: Callable[[], nn.Module]) -> dict[str, tuple[nn.Module, Any]]:
    made: dict[str, tuple[nn.Module, Any]] = {}
    for family in RULES:
        own = model().to(DEVICE)
        made[family] = own, fastl2o.LearnedOptimizer(own.parameters(), family_rule(family))
    for name in ("Adam, foreach", "Adam, fused"):
        own = model().to(DEVICE)
        made[name] = own, torch.optim.Adam(own.parameters(), **ADAMS[name])
    return made


def family_rule(family: str) -> str:
    """The shipped rule of a family, so that the models do train."""
    return {"hierarchical": fastl2o.Hierarchical.shipped}.get(family, family)


def measure(rounds: int | None, seconds: float) -> list[dict[str, Any]]:
    """One row for each model, batch size and optimizer."""
    images, labels = _data()
    rows = []
    for name, model in MODELS.items():
        torch.manual_seed(0)
        count = sum(p.numel() for p in model().parameters())
        for batch in BATCH_SIZES:
            chosen = torch.arange(batch, device=DEVICE) % len(labels)
            x, y = images[chosen], labels[chosen]
            runs = {"none": _loop(model().to(DEVICE), None, x, y)}
            for optimizer_name, (own, optimizer) in _optimizers(model).items():
                runs[optimizer_name] = _loop(own, optimizer, x, y)
            contest = Contest(dict(runs), seconds)
            contest.run(rounds)
            for optimizer_name in list(runs)[1:]:
                share = contest.ratio("none", optimizer_name, "").value
                rows.append(
                    {
                        "model": name,
                        "parameters": count,
                        "batch": batch,
                        "optimizer": optimizer_name,
                        "ms a step": 1e3 * contest.seconds_of(optimizer_name),
                        "share of the optimizer": max(0.0, 1.0 - share),
                    }
                )
    return rows
