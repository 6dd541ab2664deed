"""Tasks made from tasks: noise and gaps in gradients, other scales, logarithms, sums.

The transforms of the ensemble of Wichrowska et al. 2017 (arXiv 1703.04813).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._checks import check_number
from ._base import Batch, Task, TaskRun, fork_generator
from ._transforms import TransformedRun, check_task, load_parts

__all__ = ["GradientNoise", "LogObjective", "Rescaled", "SparseGradients", "SumOf"]

# log(f + this), so that a loss of zero has a logarithm.
_LOG_FLOOR = 1e-6


class _ChangedRun(TransformedRun):
    """A run of another's parameters, changed by ``amount``."""

    def __init__(self, inner: TaskRun, generator: torch.Generator, amount: float = 0.0) -> None:
        super().__init__(inner, {"params": inner.params}, generator)
        self.amount = amount


class _ChangedGradientRun(_ChangedRun):
    """What changes the gradient is drawn with the batch: the same batch gives the same gradient."""

    @property
    def changes_gradients(self) -> bool:
        return True

    @abstractmethod
    def change(self, grads: Tensor, drawn: Tensor) -> Tensor:
        """The gradients ``(R, D)`` that the rule sees, given what was drawn for them."""

    def losses(self, params: Tensor, batch: Batch) -> Tensor:
        return self.inner.losses(params, batch[1:])

    def loss_and_grad(self, params: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        losses, grads = self.inner.loss_and_grad(params, batch[1:])
        return losses, self.change(grads, batch[0])

    def loss_and_grads(self, params: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        losses, grads, own = self.inner.loss_and_grads(params, batch[1:])
        return losses, self.change(grads, batch[0]), own

    def full_batch(self) -> Batch:
        return (torch.empty(0), *self.inner.full_batch())

    def held_out(self, generator: torch.Generator) -> TaskRun:
        return self.inner.held_out(generator)


class _NoisyRun(_ChangedGradientRun):
    def next_batch(self) -> Batch:
        shape, dtype = self.params.shape, self.params.dtype
        noise = torch.randn(shape, generator=self.generator, dtype=dtype)
        return (noise, *self.inner.next_batch())

    def change(self, grads: Tensor, drawn: Tensor) -> Tensor:
        return grads.add(drawn, alpha=self.amount)


class _SparseRun(_ChangedGradientRun):
    def next_batch(self) -> Batch:
        kept = torch.rand(self.params.shape, generator=self.generator) >= self.amount
        return (kept, *self.inner.next_batch())

    def change(self, grads: Tensor, drawn: Tensor) -> Tensor:
        return grads * drawn


class _Wrapper(Task):
    """A task around another, of which it keeps the held-out version.

    Args:
        task: the other.
        amount: the argument besides it, by name, if there is one.
    """

    run_type: ClassVar[type[_ChangedRun]]

    def __init__(self, task: Task, **amount: float) -> None:
        check_task(task)
        self.task, self._amount = task, amount

    def config(self) -> dict[str, Any]:
        return {"task": repr(self.task), **self._amount}

    def held_out(self) -> Task:
        """The same around the inner task's held-out version."""
        return type(self)(self.task.held_out(), **self._amount)

    def sample(
        self, num_runs: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> TaskRun:
        inner = self.task.sample(num_runs, generator, dtype)
        return self.run_type(inner, fork_generator(generator), *self._amount.values())


class GradientNoise(_Wrapper):
    """The task, with noise of N(0, sd^2) added to every gradient; losses are as they were.

    With ``second_order=True`` meta-gradients do not see the noise.

    Example:
        >>> from fastl2o.meta.tasks import Quadratic
        >>> GradientNoise(Quadratic(dim=3), sd=0.5).sample(2, torch.Generator().manual_seed(0)).dim
        3
    """

    run_type = _NoisyRun

    def __init__(self, task: Task, sd: float = 0.5) -> None:
        check_number("sd", sd, minimum=0)
        super().__init__(task, sd=sd)
        self.sd = sd


class SparseGradients(_Wrapper):
    """The task, with each entry of each gradient set to 0 with probability ``fraction``.

    Example:
        >>> from fastl2o.meta.tasks import Quadratic
        >>> SparseGradients(Quadratic(dim=3)).fraction
        0.99
    """

    run_type = _SparseRun

    def __init__(self, task: Task, fraction: float = 0.99) -> None:
        check_number("fraction", fraction, minimum=0, below=1)
        super().__init__(task, fraction=fraction)
        self.fraction = fraction


class _LogRun(_ChangedRun):
    def transform(self, params: Tensor, losses: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
        shifted = losses + _LOG_FLOOR
        logarithms = torch.log(shifted) - math.log(_LOG_FLOOR)
        return (logarithms, *(grad / shifted.unsqueeze(1) for grad in grads))


class LogObjective(_Wrapper):
    """log(f + 1e-6) - log(1e-6) in place of f, which must not be negative.

    Example:
        >>> from fastl2o.meta.tasks import Bowl
        >>> run = LogObjective(Bowl()).sample(2, torch.Generator().manual_seed(0))
        >>> run.losses(torch.zeros(2, 2), ()).tolist()
        [0.0, 0.0]
    """

    run_type = _LogRun

    def __init__(self, task: Task) -> None:
        super().__init__(task)


class _RescaledRun(_ChangedRun):
    def transform(self, params: Tensor, losses: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
        return (losses * self.amount, *(grad * self.amount for grad in grads))


class Rescaled(_Wrapper):
    """The task's loss times ``factor``.

    Example:
        >>> from fastl2o.meta.tasks import Norm
        >>> Rescaled(Norm(dim=18, p=3.0), factor=1000.0).factor
        1000.0
    """

    run_type = _RescaledRun

    def __init__(self, task: Task, factor: float = 10.0) -> None:
        check_number("factor", factor, minimum=0, exclusive=True)
        super().__init__(task, factor=factor)
        self.factor = factor


class _SumRun(TaskRun):
    def __init__(self, parts: list[TaskRun], generator: torch.Generator) -> None:
        params = torch.cat([part.params for part in parts], dim=1)
        super().__init__({"params": params}, generator)
        self.parts = parts
        self._lengths = [_batch_length(part) for part in parts]

    @property
    def tensor_sizes(self) -> tuple[int, ...]:
        return tuple(size for part in self.parts for size in part.tensor_sizes)

    def next_batch(self) -> Batch:
        return tuple(tensor for part in self.parts for tensor in part.next_batch())

    @property
    def changes_gradients(self) -> bool:
        return any(part.changes_gradients for part in self.parts)

    def full_batch(self) -> Batch:
        return tuple(tensor for part in self.parts for tensor in part.full_batch())

    def generators(self) -> list[torch.Generator]:
        return [self.generator, *(g for part in self.parts for g in part.generators())]

    def held_out(self, generator: torch.Generator) -> TaskRun:
        return _SumRun([part.held_out(generator) for part in self.parts], generator)

    def _split(self, params: Tensor, batch: Batch) -> list[tuple[TaskRun, Tensor, Batch]]:
        pieces = params.split([part.dim for part in self.parts], dim=1)
        found, at = [], 0
        for part, piece, length in zip(self.parts, pieces, self._lengths, strict=True):
            found.append((part, piece.contiguous(), batch[at : at + length]))
            at += length
        return found

    def losses(self, params: Tensor, batch: Batch) -> Tensor:
        parts = self._split(params, batch)
        return torch.stack([part.losses(piece, own) for part, piece, own in parts]).sum(dim=0)

    def loss_and_grad(self, params: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        parts = self._split(params, batch)
        results = [part.loss_and_grad(piece, own) for part, piece, own in parts]
        losses, grads = zip(*results, strict=True)
        return torch.stack(losses).sum(dim=0), torch.cat(grads, dim=1)

    def loss_and_grads(self, params: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        parts = self._split(params, batch)
        results = [part.loss_and_grads(piece, own) for part, piece, own in parts]
        losses, seen, of_losses = (list(each) for each in zip(*results, strict=True))
        return torch.stack(losses).sum(dim=0), torch.cat(seen, dim=1), torch.cat(of_losses, dim=1)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "parts": [part.state_dict() for part in self.parts]}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"params": (sum(part.dim for part in self.parts),)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_parts(self, self.parts, state.get("parts", []), state)


def _batch_length(run: TaskRun) -> int:
    """Tensors of a batch; the run's random numbers are put back."""
    state = run.state_dict()
    length = len(run.next_batch())
    run.load_state_dict(state)
    return length


class SumOf(Task):
    """Several tasks at once, each on coordinates of its own: the loss is their sum.

    Args:
        tasks: at least one; their coordinates follow one another in the flat vector.

    Example:
        >>> from fastl2o.meta.tasks import Bowl, Quadratic
        >>> SumOf([Bowl(), Quadratic(dim=3)]).sample(2, torch.Generator().manual_seed(0)).dim
        5
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        if not isinstance(tasks, Sequence) or not tasks:
            raise ValueError(f"tasks must be a sequence of at least one task, got {tasks!r}")
        for task in tasks:
            check_task(task)
        self.tasks = list(tasks)

    def config(self) -> dict[str, Any]:
        return {"tasks": [repr(task) for task in self.tasks]}

    def held_out(self) -> Task:
        """The sum of the held-out versions."""
        return SumOf([task.held_out() for task in self.tasks])

    def sample(
        self, num_runs: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> TaskRun:
        parts = [task.sample(num_runs, generator, dtype) for task in self.tasks]
        return _SumRun(parts, fork_generator(generator))
