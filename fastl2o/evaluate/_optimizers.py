"""Hand-designed optimizers by name, and what takes part in a comparison."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ..rules import Rule
from ._training import MakeOptimizer, hand_designed_stepper, learned_stepper

__all__ = ["HAND_DESIGNED", "OPTIMIZERS", "BuildOptimizer", "Entrant"]


class BuildOptimizer(Protocol):
    """Builds a hand-designed optimizer for parameters and a learning rate.

    Example:
        >>> from fastl2o import evaluate
        >>> optimizer = evaluate.OPTIMIZERS["Momentum"]([torch.zeros(2)], lr=0.1)
        >>> optimizer.defaults["momentum"]
        0.9
    """

    def __call__(self, params: Iterable[Tensor], lr: float) -> torch.optim.Optimizer: ...


OPTIMIZERS: dict[str, BuildOptimizer] = {
    "SGD": partial(torch.optim.SGD),
    "Momentum": partial(torch.optim.SGD, momentum=0.9),
    "Nesterov": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "RMSprop": partial(torch.optim.RMSprop),
    "Adam": partial(torch.optim.Adam),
}
"""Optimizers by name: torch's defaults but for the learning rate and a momentum of 0.9."""

HAND_DESIGNED = {name: OPTIMIZERS[name] for name in ("SGD", "Nesterov", "RMSprop", "Adam")}
"""The baselines that every comparison has unless it asks for others."""


@dataclass(frozen=True)
class Entrant:
    """A rule, or a hand-designed optimizer at the best rate of a grid or at a given one.

    Make one with ``learned``, ``tuned`` or ``fixed``.

    Attributes:
        name: to report it under.
        rule: the rule; None for a hand-designed optimizer.
        build: the optimizer; None for a rule.
        learning_rate: the given rate; None for a rule, and for an optimizer that is to be tuned.

    Example:
        >>> import fastl2o
        >>> entrants = [Entrant.learned("mine", fastl2o.LSTMRule()), *Entrant.baselines()]
        >>> [(entrant.name, entrant.is_tuned) for entrant in entrants[:2]]
        [('mine', False), ('SGD', True)]
    """

    name: str
    rule: Rule | None = None
    build: BuildOptimizer | None = None
    learning_rate: float | None = None

    @classmethod
    def learned(cls, name: str, rule: Rule) -> Entrant:
        """A rule, applied with ``lr=1``."""
        return cls(name, rule=rule)

    @classmethod
    def tuned(cls, name: str, build: BuildOptimizer | None = None) -> Entrant:
        """A hand-designed optimizer at its best rate; ``build`` is ``OPTIMIZERS[name]`` if None."""
        return cls(name, build=build or OPTIMIZERS[name])

    @classmethod
    def fixed(cls, name: str, learning_rate: float) -> Entrant:
        """An optimizer of ``OPTIMIZERS`` at a rate that nobody tuned.

        Raises:
            ValueError: for a rate that is not above 0.

        Example:
            >>> Entrant.fixed("Adam", 1e-3).name
            'Adam, lr 0.001'
        """
        if not 0 < learning_rate < float("inf"):
            raise ValueError(
                f"the learning rate of {name} must be finite and above 0, got {learning_rate!r}"
            )
        return cls(f"{name}, lr {learning_rate:g}", None, OPTIMIZERS[name], learning_rate)

    @property
    def is_tuned(self) -> bool:
        """Whether a learning rate is to be chosen out of the grid."""
        return self.build is not None and self.learning_rate is None

    def at(self, learning_rate: float | None) -> MakeOptimizer:
        """What steps runs: the rule, or the optimizer at ``learning_rate``."""
        if self.rule is not None:
            return partial(learned_stepper, rule=self.rule)
        assert self.build is not None
        assert learning_rate is not None
        return partial(hand_designed_stepper, build=self.build, lr=learning_rate)

    @classmethod
    def baselines(cls, builds: Mapping[str, BuildOptimizer] = HAND_DESIGNED) -> list[Entrant]:
        """The usual baselines, all to be tuned."""
        return [cls.tuned(name, build) for name, build in builds.items()]
