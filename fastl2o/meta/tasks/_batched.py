"""Runs whose losses are written for all runs at once, and differentiated by one backward."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from ._base import Batch, TaskRun

__all__ = ["BatchedRun"]


class BatchedRun(TaskRun):
    """A run that defines ``batched`` in place of ``loss``.

    For problems of a few coordinates one backward over all runs costs a fraction of ``vmap``.
    """

    @abstractmethod
    def batched(self, params: Tensor, *inputs: Tensor) -> Tensor:
        """Losses ``(R,)`` at ``params (R, D)``; run r depends on ``params[r]`` only."""

    def loss(self, params: Tensor, *inputs: Tensor) -> Tensor:
        return self.batched(params.unsqueeze(0), *(t.unsqueeze(0) for t in inputs))[0]

    def losses(self, params: Tensor, batch: Batch) -> Tensor:
        return self.batched(params, *self.context(), *self.gather(batch))

    def loss_and_grad(self, params: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = params.detach().requires_grad_()
            losses = self.losses(leaf, batch)
            (grads,) = torch.autograd.grad(losses.sum(), leaf)
        return losses.detach(), grads
