"""What an optimizer adds to the training of small real models: its share of a step's time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fastl2o

from ..common import Contest, relative_errors, require
from . import contenders, gates
from .contenders import ADAMS, DEVICE, RULES

BATCH_SIZES = (16, 64, 256, 1024)
NONE = "none"
# Of a model's gradients in float32, relative, in the 2-norm.
GRADIENT_LIMIT = 1e-4


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


class _Training:
    """Steps on one batch; without an optimizer, gradients only."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None, data: tuple[Tensor, Tensor]
    ) -> None:
        self.model, self.optimizer, self.data = model, optimizer, data

    def run(self) -> Tensor:
        """A step, and the loss before it."""
        images, labels = self.data
        self.model.zero_grad()
        loss = nn.functional.cross_entropy(self.model(images), labels)
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
        contenders.synchronise()
        return loss.detach()

    def finite(self, what: str) -> None:
        """One step more, whose loss is neither NaN nor infinite."""
        gates.finite(what, self.run())


def _trainings(start: nn.Module, data: tuple[Tensor, Tensor]) -> dict[str, _Training]:
    """The contenders by name, all of them with the parameters of ``start``."""
    made = {NONE: _Training(copy.deepcopy(start), None, data)}
    for name in (*RULES, *ADAMS):
        model = copy.deepcopy(start)
        made[name] = _Training(model, _optimizer(name, model), data)
    return made


def _optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name in RULES:
        return fastl2o.LearnedOptimizer(model.parameters(), shipped_rule(name))
    return torch.optim.Adam(model.parameters(), **ADAMS[name])


def shipped_rule(family: str) -> str:
    """The shipped rule of a family, so that the models do train."""
    return {"hierarchical": fastl2o.Hierarchical.shipped}.get(family, family)


def gate(what: str, name: str, training: _Training) -> str:
    """Steps of the training that is timed, against the optimizer in plain torch in float64.

    Raises:
        AssertionError: parameters are off, or a loss is not finite; nothing is to be timed then.
    """
    if name == NONE:
        return _gate_gradients(what, training)
    optimizer, params = training.optimizer, list(training.model.parameters())
    steps = [partial(training.finite, what)] * gates.STEPS
    if isinstance(optimizer, torch.optim.Adam):
        state = partial(gates.adam_state, optimizer)
        return gates.following(what, params, steps, gates.adam_follower, state)
    return gates.following(what, params, steps, partial(_follow_learned, name))


def _gate_gradients(what: str, training: _Training) -> str:
    """What all trainings share: gradients of this model and batch, and nothing left of the last."""
    exact = copy.deepcopy(training.model).double()
    images, labels = training.data
    _Training(exact, None, (images.double(), labels)).run()
    for _ in range(gates.STEPS):
        training.finite(what)
    found, true = (
        torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
        for model in (training.model, exact)
    )
    error, _ = relative_errors(found, true)
    require(error < GRADIENT_LIMIT, f"{what}: gradients are off by {error:.1e} from float64")
    return gates.FLOAT64


def _follow_learned(family: str, params: list[nn.Parameter]) -> gates.Follower:
    dtype = params[0].dtype
    rule = fastl2o.load(shipped_rule(family)).to(DEVICE, dtype)
    optimizer = fastl2o.LearnedOptimizer(params, rule, state_dtype=dtype)

    def step() -> None:
        with fastl2o.backend("reference"):
            optimizer.step()

    return gates.Follower(params, step, list)


def measure(rounds: int | None, seconds: float) -> list[dict[str, Any]]:
    """One row for each model, batch size and optimizer, gated before it is timed."""
    images, labels = _data()
    rows = []
    for model_name, model in MODELS.items():
        torch.manual_seed(0)
        start = model().to(DEVICE)
        for batch in BATCH_SIZES:
            chosen = torch.arange(batch, device=DEVICE) % len(labels)
            trainings = _trainings(start, (images[chosen], labels[chosen]))
            called = {name: f"{model_name}, batch {batch}, optimizer {name}" for name in trainings}
            passed = {name: gate(called[name], name, each) for name, each in trainings.items()}
            contest = Contest({name: each.run for name, each in trainings.items()}, seconds)
            contest.run(rounds)
            for name, each in trainings.items():
                each.finite(f"{called[name]}, after its last step")
                if name != NONE:
                    share = contest.ratio(NONE, name, "").value
                    rows.append(
                        {
                            "model": model_name,
                            "parameters": sum(p.numel() for p in start.parameters()),
                            "batch": batch,
                            "optimizer": name,
                            "ms a step": 1e3 * contest.seconds_of(name),
                            "share of the optimizer": max(0.0, 1.0 - share),
                            "gate": passed[name],
                        }
                    )
    return rows
