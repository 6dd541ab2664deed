"""Outer optimizers: what turns meta-gradients into updates of the meta-parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["MuonAdam"]


class MuonAdam(torch.optim.Optimizer):
    """Muon for the weight matrices, Adam for biases and the readout.

    A meta-gradient's matrices are dominated by a few directions; Muon (Jordan et al. 2024) gives
    all of them the same length. `torch.optim.Muon` takes matrices only and is scaled here as in
    Liu et al. (arXiv 2502.16982), so that both rates have the size of Adam's.

    Args:
        params: the meta-parameters, as tensors. A tensor of two dimensions, neither of them 1, is a
            matrix.
        lr: of the matrices; entries move by about 0.2 ``lr`` a step.
        momentum: of Muon (Nesterov).
        adam_lr: of the other parameters; ``lr`` / 5 by default.
        betas: of Adam.

    Raises:
        ValueError: from torch, for impossible values.

    Example:
        >>> import fastl2o
        >>> rule = fastl2o.LSTMRule()
        >>> optimizer = MuonAdam(rule.parameters(), lr=1e-2)
        >>> [len(group["params"]) for group in optimizer.param_groups]
        [4, 4]
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-2,
        momentum: float = 0.95,
        adam_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        matrices: list[Tensor] = []
        others: list[Tensor] = []
        for parameter in params:
            is_matrix = parameter.ndim == 2 and min(parameter.shape) > 1
            (matrices if is_matrix else others).append(parameter)
        self._parts: list[torch.optim.Optimizer] = []
        if matrices:
            self._parts.append(
                torch.optim.Muon(
                    matrices,
                    lr=lr,
                    momentum=momentum,
                    weight_decay=0.0,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        if others:
            rate = lr / 5 if adam_lr is None else adam_lr
            self._parts.append(torch.optim.Adam(others, lr=rate, betas=betas))
        super().__init__([dict(part.param_groups[0]) for part in self._parts], {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        # torch copies and pickles groups and state alone.
        super().__setstate__(state)
        self._parts = [
            (torch.optim.Muon if "ns_steps" in group else torch.optim.Adam)(group["params"])
            for group in self.param_groups
        ]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step from the ``.grad`` of the parameters; returns the closure's value, if any."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part, group in zip(self._parts, self.param_groups, strict=True):
            # Groups and state are this optimizer's, which may just have loaded others.
            part.param_groups, part.state = [group], self.state
            part.step()
        return loss


def twin(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """An optimizer of the same settings over the same parameters, with a state of its own."""
    other = copy.deepcopy(optimizer)
    other.state.clear()
    for group, original in zip(other.param_groups, optimizer.param_groups, strict=True):
        group["params"] = list(original["params"])
    return other


def settings(param_group: dict[str, Any]) -> dict[str, str]:
    """A parameter group's settings as text: what must agree when a training is continued."""
    return {key: repr(value) for key, value in param_group.items() if key != "params"}
