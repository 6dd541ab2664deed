"""Tasks made from tasks: the training tricks of RNNprop (Lv et al. 2017, section 4)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import check_num_runs, check_number
from ._base import Batch, Task, TaskRun, fork_generator

__all__ = ["RandomScaling", "TransformedRun", "WithConvex", "WrappedRun", "check_task"]


class WrappedRun(TaskRun):
    """A run around another: its batches are the inner run's, its state holds the inner one's."""

    def __init__(
        self, inner: TaskRun, tensors: dict[str, Tensor], generator: torch.Generator
    ) -> None:
        super().__init__(tensors, generator)
        self.inner = inner

    @property
    def tensor_sizes(self) -> tuple[int, ...]:
        return self.inner.tensor_sizes

    def next_batch(self) -> Batch:
        return self.inner.next_batch()

    def full_batch(self) -> Batch:
        return self.inner.full_batch()

    def generators(self) -> list[torch.Generator]:
        return [self.generator, *self.inner.generators()]

    def held_out(self, generator: torch.Generator) -> TaskRun:
        other = copy.copy(self)
        other.inner, other.generator = self.inner.held_out(generator), generator
        return other

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "inner": self.inner.state_dict()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {**super().shapes(), "params": (self.inner.dim,)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_parts(self, [self.inner], [state.get("inner", {})], state)


def load_parts(
    run: TaskRun, parts: Sequence[TaskRun], saved: Sequence[dict[str, Any]], state: dict[str, Any]
) -> None:
    """Load the runs that ``run`` is made of from ``saved``, then itself; all of it, or nothing.

    The parts come first: those of drawn sizes change theirs, and with them what fits the whole.
    """
    if len(saved) != len(parts):
        raise ValueError(
            f"task run state: expected those of {len(parts)} runs inside it, got {len(saved)}; "
            "restore it into a run of the task that it was saved from"
        )
    before = [part.state_dict() for part in parts]
    try:
        for part, of_part in zip(parts, saved, strict=True):
            part.load_state_dict(of_part)
        TaskRun.load_state_dict(run, state)
    except ValueError:
        for part, of_part in zip(parts, before, strict=True):
            part.load_state_dict(of_part)
        raise


class TransformedRun(WrappedRun):
    """A run whose losses and gradients follow from the inner run's, noise and gaps included."""

    @property
    def changes_gradients(self) -> bool:
        return self.inner.changes_gradients

    def inner_params(self, params: Tensor) -> Tensor:
        """Where the inner run stands, differentiable."""
        return params

    def transform(self, params: Tensor, losses: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
        """The losses, differentiable, and a gradient for each of the inner run's ``grads``.

        Gradients are transformed apart from each other and are not changed in place.
        """
        return (losses, *grads)

    def losses(self, params: Tensor, batch: Batch) -> Tensor:
        (losses,) = self.transform(params, self.inner.losses(self.inner_params(params), batch))
        return losses

    def loss_and_grad(self, params: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        found = self.inner.loss_and_grad(self.inner_params(params), batch)
        losses, grads = self.transform(params, *found)
        return losses, grads

    def loss_and_grads(self, params: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        found = self.inner.loss_and_grads(self.inner_params(params), batch)
        losses, grads, own = self.transform(params, *found)
        return losses, grads, own


class _ScaledRun(TransformedRun):
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys(self.tensors, (self.inner.dim,))

    def inner_params(self, params: Tensor) -> Tensor:
        return params * self.tensors["scale"]

    def transform(self, params: Tensor, losses: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
        return (losses, *(grad * self.tensors["scale"] for grad in grads))


class RandomScaling(Task):
    """Per coordinate c = exp(U(-bound, bound)), drawn per run: optimise f(c * x) from x_0 / c.

    The rule can then not rely on the size of gradients or parameters, only on how they change.

    Args:
        task: the task to rescale.
        bound: r of the draw; 3 on the authors' MLP, 1 on their convex part.

    Example:
        >>> from fastl2o.meta.tasks import Quadratic
        >>> task = RandomScaling(Quadratic(dim=3), bound=1.0)
        >>> task.sample(2, torch.Generator().manual_seed(0)).params.shape
        torch.Size([2, 3])
    """

    def __init__(self, task: Task, bound: float = 3.0) -> None:
        check_number("bound", bound, minimum=0)
        check_task(task)
        self.task, self.bound = task, bound

    def config(self) -> dict[str, Any]:
        return {"task": repr(self.task), "bound": self.bound}

    def held_out(self) -> Task:
        """The task without the scaling, which is an augmentation."""
        return self.task.held_out()

    def sample(
        self, num_runs: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> TaskRun:
        inner = self.task.sample(num_runs, generator, dtype)
        scale = self._draw_scale(inner, generator)
        tensors = {"params": inner.params / scale, "scale": scale}
        return _ScaledRun(inner, tensors, fork_generator(generator))

    def _draw_scale(self, inner: TaskRun, generator: torch.Generator) -> Tensor:
        """The factors ``(R, D)``."""
        uniform = torch.rand(inner.params.shape, generator=generator, dtype=inner.params.dtype)
        return torch.exp((2 * uniform - 1) * self.bound)


_CLIP = 10.0  # rnnprop.md section 3: mean_i clip((x_i - a_i)^2, 0, 10)


class _ConvexRun(TransformedRun):
    @property
    def tensor_sizes(self) -> tuple[int, ...]:
        return (*self.inner.tensor_sizes, self.tensors["centre"].shape[1])

    def shapes(self) -> dict[str, tuple[int, ...]]:
        extra = self.tensors["centre"].shape[1]
        return {**super().shapes(), "params": (self.inner.dim + extra,)}

    def inner_params(self, params: Tensor) -> Tensor:
        return params[:, : self.inner.dim].contiguous()

    def transform(self, params: Tensor, losses: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
        scale, centre = self.tensors["scale"], self.tensors["centre"]
        offset = params[:, self.inner.dim :] * scale - centre
        squares = offset.square()
        losses = losses + squares.clamp(max=_CLIP).mean(dim=1)
        convex = torch.where(squares <= _CLIP, offset * scale * (2.0 / centre.shape[1]), 0.0)
        return (losses, *(torch.cat([grad, convex], dim=1) for grad in grads))


class WithConvex(Task):
    """The task's loss plus mean_i clip((c_i x_i - a_i)^2, 0, 10) over ``num`` extra coordinates.

    a ~ U(-1, 1) per run, x_0 = 0; the extra coordinates follow the task's own in the flat vector.
    The gradient is zero where the clip is active.

    Args:
        task: the task to extend.
        num: number of extra coordinates.
        bound: random scaling of the extra coordinates, c = exp(U(-bound, bound)); the authors use
            1, 0 is none.

    Example:
        >>> from fastl2o.meta.tasks import Quadratic
        >>> task = WithConvex(Quadratic(dim=3), num=20)
        >>> task.sample(2, torch.Generator().manual_seed(0)).dim
        23
    """

    def __init__(self, task: Task, num: int = 20, bound: float = 0.0) -> None:
        check_number("num", num, minimum=1, integer=True)
        check_number("bound", bound, minimum=0)
        check_task(task)
        self.task, self.num, self.bound = task, num, bound

    def config(self) -> dict[str, Any]:
        return {"task": repr(self.task), "num": self.num, "bound": self.bound}

    def held_out(self) -> Task:
        """The task without the convex part, which is an augmentation."""
        return self.task.held_out()

    def sample(
        self, num_runs: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> TaskRun:
        check_num_runs(num_runs)
        inner = self.task.sample(num_runs, generator, dtype)
        centre = 2 * torch.rand(num_runs, self.num, generator=generator, dtype=dtype) - 1
        uniform = torch.rand(num_runs, self.num, generator=generator, dtype=dtype)
        start = torch.cat([inner.params, torch.zeros_like(centre)], dim=1)
        tensors = {
            "params": start,
            "centre": centre,
            "scale": torch.exp((2 * uniform - 1) * self.bound),
        }
        return _ConvexRun(inner, tensors, fork_generator(generator))


def check_task(task: object) -> None:
    """Refuse what is no task, naming the argument."""
    if not isinstance(task, Task):
        raise TypeError(f"task must be a fastl2o.meta.tasks.Task to build on, got {task!r}")
