"""The outer step: what becomes of a meta-gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..rules import Rule
from ._checks import check_number
from ._saved import check_alike, check_optimizer_state
from .optimizers import settings, twin

__all__ = ["OuterUpdate", "SignalToNoise"]

# Outer steps that the moving averages of the meta-gradient look back.
_SNR_MEMORY = 100


class OuterUpdate:
    """Clipping, the rate's schedule, the optimizer, and the average of the meta-parameters.

    Args:
        rule: its parameters are updated in place.
        optimizer: over these parameters.
        schedule: factor on the optimizer's rates by outer step, or None.
        clip_grad: largest 2-norm of the meta-gradient, or None.
        average: decay of the moving average of the meta-parameters, or None.
        imitates: whether some updates are of imitation, which has its own copy of the optimizer.
    """

    def __init__(
        self,
        rule: Rule,
        optimizer: torch.optim.Optimizer,
        schedule: Callable[[int], float] | None,
        clip_grad: float | None,
        average: float | None,
        imitates: bool,
    ) -> None:
        self.rule, self.schedule, self.clip_grad = rule, schedule, clip_grad
        self._optimizers = [optimizer, twin(optimizer)] if imitates else [optimizer]
        self.settings = [settings(group) for group in optimizer.param_groups]
        self._base_lrs = [group["lr"] for group in optimizer.param_groups]
        self._averaged = None
        if average is not None:
            self._averaged = AveragedModel(rule, multi_avg_fn=get_ema_multi_avg_fn(average))

    @property
    def candidate(self) -> Rule:
        """What is validated: the average of the rule where one is kept, or else the rule."""
        return self.rule if self._averaged is None else cast(Rule, self._averaged.module)

    def factor(self, outer_step: int) -> float:
        """The schedule's factor on the rates."""
        return 1.0 if self.schedule is None else self.schedule(outer_step)

    def lr(self, outer_step: int) -> float:
        """The first group's rate."""
        return float(self._base_lrs[0]) * self.factor(outer_step)

    def apply(self, gradient: Tensor, outer_step: int, *, imitating: bool) -> bool:
        """Take one outer step; False, and the rule as it was, if it left a number not finite."""
        norm = float(torch.linalg.vector_norm(gradient))
        if self.clip_grad is not None and norm > self.clip_grad:
            gradient = gradient * (self.clip_grad / norm)
        pieces = self.rule.unflatten(gradient)
        before = {name: value.detach().clone() for name, value in self.rule.named_parameters()}
        for name, parameter in self.rule.named_parameters():
            if parameter.requires_grad:
                parameter.grad = pieces[name].clone()
        optimizer = self._optimizers[1 if imitating else 0]
        for group, base in zip(optimizer.param_groups, self._base_lrs, strict=True):
            group["lr"] = base * self.factor(outer_step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if all(bool(torch.isfinite(value).all()) for value in self.rule.parameters()):
            if self._averaged is not None:
                self._averaged.update_parameters(self.rule)
            return True
        with torch.no_grad():
            for name, parameter in self.rule.named_parameters():
                parameter.copy_(before[name])
        return False

    def state_dict(self) -> dict[str, Any]:
        """The rule, its average and the optimizers' states."""
        return {
            "rule": self.rule.state_dict(),
            "averaged": None if self._averaged is None else self._averaged.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what ``state_dict`` returned.

        Raises:
            Exception: of any kind, where it was damaged. Nothing is changed.
        """
        check_alike("rule", state["rule"], self.rule.state_dict())
        if self._averaged is not None:
            check_alike("averaged", state["averaged"], self._averaged.state_dict())
        trials = copy.deepcopy(self._optimizers)
        for optimizer, saved in zip(trials, state["optimizers"], strict=True):
            check_optimizer_state(saved, optimizer)
            optimizer.load_state_dict(copy.deepcopy(saved))
            _require_usable(optimizer)
        self.rule.load_state_dict(state["rule"])
        if self._averaged is not None:
            self._averaged.load_state_dict(state["averaged"])
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def _require_usable(optimizer: torch.optim.Optimizer) -> None:
    """Take a step with a copy: torch loads states that no step can be taken with."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()


class SignalToNoise:
    """Signal-to-noise ratio of successive meta-gradients g: |E g|^2 / (E |g|^2 - |E g|^2).

    The means are moving averages over about a hundred outer steps, so what the rule has changed in
    that time counts as noise. The square of a mean of a hundred holds a hundredth of the noise:
    without any signal the ratio is about 1/200.
    """

    def __init__(self) -> None:
        self.count, self._mean, self._square = 0, torch.empty(0), 0.0

    def update(self, gradient: Tensor) -> float:
        """Take in the next meta-gradient; the ratio so far, infinite for the first."""
        wide = gradient.double()
        if self.count == 0:
            self._mean = torch.zeros_like(wide)
        self.count += 1
        share = max(1 / self.count, 1 / _SNR_MEMORY)
        self._mean.lerp_(wide, share)
        self._square += share * (float(wide @ wide) - self._square)
        signal = float(self._mean @ self._mean)
        noise = self._square - signal
        return signal / noise if noise > 0.0 else torch.inf

    def state_dict(self) -> dict[str, Any]:
        """The moving averages."""
        return {"count": self.count, "mean": self._mean, "square": self._square}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> SignalToNoise:
        """What ``state_dict`` was called on.

        Raises:
            Exception: of any kind, where it was damaged.
        """
        check_number("count", state["count"], minimum=0, integer=True, below=2**63)
        made = cls()
        made.count, made._square = state["count"], float(state["square"])
        made._mean = state["mean"].clone()
        return made
