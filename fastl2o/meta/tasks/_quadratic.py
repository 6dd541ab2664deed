"""Random quadratics, the first task of the literature (Andrychowicz et al. 2016, section 3.1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import check_choice, check_num_runs, check_number
from ._base import Batch, Task, TaskRun, VmapRun, fork_generator

__all__ = ["Quadratic"]


class _QuadraticRun(VmapRun):
    def context(self) -> Batch:
        return (self.tensors["matrix"], self.tensors["target"])

    def loss(self, params: Tensor, *inputs: Tensor) -> Tensor:
        matrix, target = inputs
        residual = matrix @ params - target
        return residual.square().sum()

    def loss_and_grad(self, params: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        losses, grads = self.loss_and_grad_at(params.unsqueeze(0), batch)
        return losses.squeeze(0), grads.squeeze(0)

    def loss_and_grad_at(self, points: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        # Written out because a 10-dimensional step is all overhead: some ten calls for all points
        # instead of some forty under vmap.
        matrix, target = self.tensors["matrix"], self.tensors["target"]
        residual = torch.baddbmm(
            target.unsqueeze(1), points.transpose(0, 1), matrix.transpose(1, 2), beta=-1
        )  # (R, K, dim)
        grads = torch.baddbmm(residual, residual, matrix, beta=0, alpha=2)
        grads = grads.transpose(0, 1).contiguous()
        return residual.square().sum(dim=2).t().contiguous(), grads


class Quadratic(Task):
    """f(theta) = ||W theta - y||^2 with a fresh square W and y for every run.

    Args:
        dim: number of coordinates, and rows of W.
        distribution: of the entries of W and y: ``"normal"`` is N(0, 1), the reproductions' and the
            paper's text; ``"uniform"`` is U[0, 1], DeepMind's code.
        init_scale: theta_0 ~ N(0, init_scale^2); 0 starts at the origin (reproductions), 0.01 in
            DeepMind's code.

    Example:
        >>> run = Quadratic(dim=10).sample(4, torch.Generator().manual_seed(0))
        >>> losses, grads = run.loss_and_grad(run.params, run.next_batch())
        >>> losses.shape, grads.shape
        (torch.Size([4]), torch.Size([4, 10]))
    """

    def __init__(
        self, dim: int = 10, distribution: str = "normal", init_scale: float = 0.0
    ) -> None:
        check_number("dim", dim, minimum=1, integer=True)
        check_choice("distribution", distribution, ("normal", "uniform"))
        check_number("init_scale", init_scale, minimum=0)
        self.dim, self.distribution, self.init_scale = dim, distribution, init_scale

    def config(self) -> dict[str, Any]:
        return {"dim": self.dim, "distribution": self.distribution, "init_scale": self.init_scale}

    def sample(
        self, num_runs: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> TaskRun:
        check_num_runs(num_runs)
        draw = torch.randn if self.distribution == "normal" else torch.rand
        tensors = {
            "matrix": draw(num_runs, self.dim, self.dim, generator=generator, dtype=dtype),
            "target": draw(num_runs, self.dim, generator=generator, dtype=dtype),
            "params": torch.randn(num_runs, self.dim, generator=generator, dtype=dtype)
            * self.init_scale,
        }
        return _QuadraticRun(tensors, fork_generator(generator))
