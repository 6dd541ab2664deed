"""Tasks in other parameters: scaled tensor by tensor, or split into length and direction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import vjp

from ._base import Task, TaskRun, fork_generator
from ._transforms import RandomScaling, TransformedRun, check_task

__all__ = ["TensorScaling", "WeightNormalization"]


class TensorScaling(RandomScaling):
    """Per tensor c = exp(U(-bound, bound)), drawn per run: optimise f(c * x) from x_0 / c.

    As ``RandomScaling``, but with one factor for all coordinates of a tensor of the model, as
    models of other widths and initialisations differ.

    Args:
        task: the task to rescale.
        bound: of the draw; 3 is a factor of 20 up or down.

    Example:
        >>> from fastl2o.meta.tasks import MLPClassification
        >>> task = TensorScaling(MLPClassification("digits", hidden=(5,)))
        >>> run = task.sample(2, torch.Generator().manual_seed(0))
        >>> run.tensors["scale"][0].unique_consecutive().numel(), run.tensor_sizes
        (4, (320, 5, 50, 10))
    """

    def _draw_scale(self, inner: TaskRun, generator: torch.Generator) -> Tensor:
        sizes = torch.tensor(inner.tensor_sizes)
        shape, dtype = (inner.num_runs, len(sizes)), inner.params.dtype
        uniform = torch.rand(shape, generator=generator, dtype=dtype)
        return torch.exp((2 * uniform - 1) * self.bound).repeat_interleave(sizes, dim=1)


class _NormalizedRun(TransformedRun):
    def __init__(self, inner: TaskRun, generator: torch.Generator) -> None:
        self._groups, self._count = _groups(inner)
        lengths = _lengths(inner.params, self._groups, self._count)
        params = torch.cat([inner.params, lengths], dim=1)
        super().__init__(inner, {"params": params}, generator)

    @property
    def tensor_sizes(self) -> tuple[int, ...]:
        return (*self.inner.tensor_sizes, *([self._count] if self._count else []))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"params": (self.inner.dim + _groups(self.inner)[1],)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._groups, self._count = _groups(self.inner)

    def inner_params(self, params: Tensor) -> Tensor:
        direction, length = params.split([self.inner.dim, self._count], dim=1)
        factor = length / _lengths(direction, self._groups, self._count)
        return direction * torch.cat([factor, torch.ones_like(params[:, :1])], dim=1).index_select(
            1, self._groups
        )

    def transform(self, params: Tensor, losses: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
        if not grads:
            return (losses,)
        pull = vjp(self.inner_params, params)[1]
        return (losses, *(pull(grad)[0] for grad in grads))


def _groups(run: TaskRun) -> tuple[Tensor, int]:
    """Which length each coordinate has ``(D,)``, and how many there are, K; K itself means none."""
    sizes = torch.tensor(run.tensor_sizes)
    nonzero = [bool((t != 0).any(dim=1).all()) for t in run.params.split(run.tensor_sizes, dim=1)]
    chosen = torch.tensor(nonzero) & (sizes > 1)
    count = int(chosen.sum())
    numbers = torch.where(chosen, chosen.cumsum(0) - 1, count)
    return numbers.repeat_interleave(sizes), count


def _lengths(params: Tensor, groups: Tensor, count: int) -> Tensor:
    """Euclidean lengths ``(R, K)`` of the tensors that have one."""
    sums = params.new_zeros(params.shape[0], count + 1)
    return sums.index_add(1, groups, params.square())[:, :count].sqrt()


class WeightNormalization(Task):
    """The task with each tensor theta written as g * v / ||v|| (Salimans & Kingma 2016, eq. 2).

    For whole tensors, where the paper has a length for each unit. The run's coordinates are v, laid
    out as theta, and then the lengths g; they start at v = theta_0 and g = ||theta_0||. Tensors of
    one coordinate, and those that are zero at the start, such as biases, stay as they are.

    Args:
        task: the task to write in other parameters.

    Example:
        >>> from fastl2o.meta.tasks import MLPClassification
        >>> task = WeightNormalization(MLPClassification("digits", hidden=(5,)))
        >>> task.sample(2, torch.Generator().manual_seed(0)).tensor_sizes
        (320, 5, 50, 10, 4)
    """

    def __init__(self, task: Task) -> None:
        check_task(task)
        self.task = task

    def config(self) -> dict[str, Any]:
        return {"task": repr(self.task)}

    def held_out(self) -> Task:
        """The task in its own parameters: writing it in others is an augmentation."""
        return self.task.held_out()

    def sample(
        self, num_runs: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> TaskRun:
        inner = self.task.sample(num_runs, generator, dtype)
        return _NormalizedRun(inner, fork_generator(generator))
