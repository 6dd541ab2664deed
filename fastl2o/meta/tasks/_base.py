"""Tasks: families of optimizees with data, and batches of training runs drawn from them.

A run is a flat parameter vector of D coordinates; R runs advance together as one ``(R, D)`` tensor,
so that a rule takes all of them in one kernel call.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Batch", "BatchedRun", "FunctionRun", "Task", "TaskRun", "VmapRun"]

Batch = tuple[Tensor, ...]
"""What one loss evaluation draws at random: tensors ``(R, ...)``, runs in front; may be empty."""


def fork_generator(generator: torch.Generator) -> torch.Generator:
    """A new generator seeded by one draw from ``generator``, so that runs own their numbers."""
    seed = int(torch.randint(2**62, (), generator=generator).item())
    return torch.Generator().manual_seed(seed)


class TaskRun(ABC):
    """R training runs of one task, at fixed data and initial parameters.

    Subclasses give ``losses`` and ``loss_and_grad`` of all runs at once; ``VmapRun`` and
    ``BatchedRun`` make both from a single loss function.

    Attributes:
        tensors: everything drawn when the run was sampled, by name, runs in front; holds at least
            ``params``.
        generator: the run's own generator, from which ``next_batch`` draws.

    Example:
        >>> import fastl2o
        >>> run = fastl2o.meta.tasks.Quadratic(dim=3).sample(2, torch.Generator().manual_seed(0))
        >>> losses, grads = run.loss_and_grad(run.params, run.next_batch())
        >>> run.num_runs, run.dim, losses.shape, grads.shape
        (2, 3, torch.Size([2]), torch.Size([2, 3]))
    """

    def __init__(self, tensors: dict[str, Tensor], generator: torch.Generator) -> None:
        self.tensors = tensors
        self.generator = generator

    @property
    def params(self) -> Tensor:
        """Initial parameters, ``(R, D)``; callers that step in place clone them first."""
        return self.tensors["params"]

    @property
    def num_runs(self) -> int:
        """R, the number of runs that advance together."""
        return self.params.shape[0]

    @property
    def dim(self) -> int:
        """D, the number of coordinates of one run."""
        return self.params.shape[1]

    @property
    def tensor_sizes(self) -> tuple[int, ...]:
        """How many of a run's D coordinates belong to each of the model's tensors, in order.

        Rules that look at whole tensors need it; one tensor by default.
        """
        return (self.dim,)

    @property
    def changes_gradients(self) -> bool:
        """Whether the gradients of ``loss_and_grad`` are others than the losses' own."""
        return False

    def next_batch(self) -> Batch:
        """Draw what the next loss evaluation needs (minibatch indices, say), anew each time."""
        return ()

    def full_batch(self) -> Batch:
        """The batch of all data, in place of a drawn one; for ``losses`` only."""
        return ()

    def held_out(self, generator: torch.Generator) -> TaskRun:
        """The same runs on data that they do not train on, to measure their losses by.

        Problem and parameters are this run's, whose tensors it may share; minibatches are drawn
        from ``generator``. Nothing is added to its gradients, and none are left out.

        Raises:
            ValueError: if there is no such data.
        """
        raise ValueError(
            f"a {type(self).__name__} has no data besides what it trains on; held-out losses need "
            "a task on images, signals or text with split='meta_train'"
        )

    @abstractmethod
    def losses(self, params: Tensor, batch: Batch) -> Tensor:
        """Losses ``(R,)`` at ``params (R, D)``, differentiable."""

    @abstractmethod
    def loss_and_grad(self, params: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Losses ``(R,)`` and gradients ``(R, D)`` at ``params (R, D)``, without a graph."""

    def loss_and_grads(self, params: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """As ``loss_and_grad``, and the losses' own gradients ``(R, D)``.

        The latter are without noise and gaps; they are the former unless ``changes_gradients``.
        """
        losses, grads = self.loss_and_grad(params, batch)
        return losses, grads, grads

    def loss_and_grad_at(self, points: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Losses ``(K, R)`` and gradients ``(K, R, D)`` at K points of each run, on one batch.

        As ``loss_and_grad`` at each of ``points (K, R, D)``; evolution strategies come with two.
        """
        pairs = [self.loss_and_grad(point, batch) for point in points]
        losses, grads = zip(*pairs, strict=True)
        return torch.stack(losses), torch.stack(grads)

    def generators(self) -> list[torch.Generator]:
        """All generators that batches are drawn from, for drawing the same ones again."""
        return [self.generator]

    def state_dict(self) -> dict[str, Any]:
        """Tensors and generator state, enough to continue with the same bits."""
        return {"tensors": dict(self.tensors), "generator": self.generator.get_state()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape per run of each of ``tensors`` that ``load_state_dict`` accepts."""
        return {name: tuple(tensor.shape[1:]) for name, tensor in self.tensors.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a ``state_dict`` of a run of the same task; a refused one changes nothing.

        Raises:
            ValueError: if the saved tensors are not those of this task (other names or shapes per
                run).
        """
        saved: dict[str, Tensor] = state.get("tensors", {})
        ours = self.shapes()
        theirs = {name: tuple(t.shape[1:]) for name, t in saved.items()}
        if ours != theirs:
            raise ValueError(
                f"task run state: expected tensors {ours} per run, got {theirs}; "
                "restore it into a run of the task that it was saved from"
            )
        self.tensors = {name: t.clone() for name, t in saved.items()}
        self.generator.set_state(state["generator"])


class FunctionRun(TaskRun):
    """A run whose losses are a function of the parameters, ``context()`` and ``gather(batch)``."""

    def context(self) -> Batch:
        """Tensors ``(R, ...)`` that the function reads at every evaluation besides the batch."""
        return ()

    def gather(self, batch: Batch) -> Batch:
        """Turn a drawn batch into the tensors ``(R, ...)`` that the function reads."""
        return batch


class VmapRun(FunctionRun):
    """A run that defines the loss of one run; ``torch.func.vmap`` batches it over the runs.

    Example:
        >>> class Cubes(VmapRun):
        ...     def loss(self, params):
        ...         return (params ** 3).sum()
        >>> run = Cubes({"params": torch.ones(2, 3)}, torch.Generator())
        >>> run.loss_and_grad(run.params, run.next_batch())[1]
        tensor([[3., 3., 3.],
                [3., 3., 3.]])
    """

    @abstractmethod
    def loss(self, params: Tensor, *inputs: Tensor) -> Tensor:
        """Loss of ONE run at ``params (D,)``; ``inputs``: ``context()`` and ``gather(batch)``."""

    def losses(self, params: Tensor, batch: Batch) -> Tensor:
        inputs = (*self.context(), *self.gather(batch))
        result: Tensor = vmap(self.loss)(params, *inputs)
        return result

    def loss_and_grad(self, params: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        inputs = (*self.context(), *self.gather(batch))
        grads, losses = vmap(grad_and_value(self.loss))(params, *inputs)
        return losses, grads


class BatchedRun(FunctionRun):
    """A run that defines the losses of all runs at once, differentiated by one backward.

    For problems of a few coordinates that costs a fraction of ``vmap``.

    Example:
        >>> class Cubes(BatchedRun):
        ...     def batched(self, params):
        ...         return (params ** 3).sum(dim=1)
        >>> run = Cubes({"params": torch.ones(2, 3)}, torch.Generator())
        >>> run.loss_and_grad(run.params, run.next_batch())[0]
        tensor([3., 3.])
    """

    @abstractmethod
    def batched(self, params: Tensor, *inputs: Tensor) -> Tensor:
        """Losses ``(R,)`` at ``params (R, D)``; run r depends on ``params[r]`` only."""

    def losses(self, params: Tensor, batch: Batch) -> Tensor:
        return self.batched(params, *self.context(), *self.gather(batch))

    def loss_and_grad(self, params: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = params.detach().requires_grad_()
            losses = self.batched(leaf, *self.context(), *self.gather(batch))
            (grads,) = torch.autograd.grad(losses.sum(), leaf)
        return losses.detach(), grads


class Task(ABC):
    """A family of optimizees. Sampling it gives a ``TaskRun``: R runs that advance as one batch.

    Example:
        >>> class Bowl(VmapRun):
        ...     def loss(self, params):
        ...         return (params ** 2).sum()
        >>> class Bowls(Task):
        ...     def sample(self, num_runs, generator, dtype=torch.float32):
        ...         params = torch.randn(num_runs, 5, generator=generator, dtype=dtype)
        ...         seed = int(torch.randint(2**62, (), generator=generator))
        ...         return Bowl({"params": params}, torch.Generator().manual_seed(seed))
        ...     def config(self):
        ...         return {}
        >>> Bowls().sample(4, torch.Generator().manual_seed(0)).params.shape
        torch.Size([4, 5])
    """

    @abstractmethod
    def sample(
        self, num_runs: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> TaskRun:
        """Draw ``num_runs`` runs from ``generator`` (CPU); parameters are of ``dtype``."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Constructor arguments, JSON-able: identifies the task in checkpoints and cards."""

    def with_options(self, **options: Any) -> Self:
        """The same task with some constructor arguments changed."""
        return type(self)(**{**{name: getattr(self, name) for name in self.config()}, **options})

    def held_out(self) -> Task:
        """The task that validates a rule trained on this one; the same distribution by default."""
        return self

    def __repr__(self) -> str:
        arguments = ", ".join(f"{key}={value!r}" for key, value in self.config().items())
        return f"{type(self).__name__}({arguments})"
