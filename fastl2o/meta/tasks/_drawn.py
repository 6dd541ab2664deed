"""Tasks whose settings are drawn for every batch of runs: sizes of networks, sizes of batches."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from .._checks import check_choice, check_num_runs
from .._draws import as_range, draw_log_uniform
from ._base import Task, TaskRun
from ._data import data_name
from ._images import ImageTask
from ._mlp import ACTIVATIONS, MLPClassification, check_init_scale
from ._transforms import TransformedRun, check_task

__all__ = ["DrawnBatchSize", "DrawnMLP", "DrawnTask"]

Draw = dict[str, Any]


class _DrawnRun(TransformedRun):
    """A run of the task that was drawn; its state holds the draw, so that any run can take it."""

    def __init__(self, family: DrawnTask, draw: Draw, inner: TaskRun) -> None:
        super().__init__(inner, inner.tensors, inner.generator)
        self.family, self.draw = family, draw

    def held_out(self, generator: torch.Generator) -> TaskRun:
        return self.inner.held_out(generator)

    def state_dict(self) -> dict[str, Any]:
        return {"draw": dict(self.draw), "inner": self.inner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        draw = dict(state.get("draw", {}))
        if draw.keys() != self.draw.keys():
            raise ValueError(
                f"task run state: expected a draw of {sorted(self.draw)}, got one of "
                f"{sorted(draw)}; restore it into a run of the task that it was saved from"
            )
        # Drawn only for its form: everything in it is replaced by what was saved.
        inner = self.family.drawn(draw).sample(
            1, torch.Generator().manual_seed(0), self.params.dtype
        )
        inner.load_state_dict(state["inner"])
        self.draw, self.inner = draw, inner
        self.tensors, self.generator = inner.tensors, inner.generator


class DrawnTask(Task):
    """A task that draws another for every batch of runs, which then share what was drawn.

    Subclasses say what is drawn, and the task that a draw means. The state of a run holds its draw:
    ``load_state_dict`` takes over runs of other draws.

    Example:
        >>> from fastl2o.meta.tasks import Quadratic
        >>> class DrawnQuadratic(DrawnTask):
        ...     def config(self):
        ...         return {}
        ...     def draw(self, generator):
        ...         return {"dim": int(torch.randint(2, 20, (), generator=generator))}
        ...     def drawn(self, draw):
        ...         return Quadratic(**draw)
        >>> DrawnQuadratic().sample(2, torch.Generator().manual_seed(0)).dim
        10
    """

    @abstractmethod
    def draw(self, generator: torch.Generator) -> Draw:
        """Settings of one batch of runs: numbers, text and lists of them, for checkpoints."""

    @abstractmethod
    def drawn(self, draw: Draw) -> Task:
        """The task of a draw."""

    def sample(
        self, num_runs: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> TaskRun:
        check_num_runs(num_runs)
        draw = self.draw(generator)
        return _DrawnRun(self, draw, self.drawn(draw).sample(num_runs, generator, dtype))


class DrawnMLP(DrawnTask, ImageTask):
    """``MLPClassification`` with depth, widths and activation drawn for every batch of runs.

    The number of coordinates D of a run follows from the draw.

    Args:
        data, batch_size, split, fraction: see ``MLPClassification``.
        depth: number of hidden layers, or the (low, high) that it is drawn from uniformly.
        width: of each hidden layer, or the (low, high) that it is drawn from log-uniformly, for
            every layer anew.
        activations: those to draw from.
        init_scale: see ``MLPClassification``; ``nn.Linear``'s initialisation by default, which
            suits any depth.

    Example:
        >>> task = DrawnMLP("digits", depth=(1, 3), width=(8, 64))
        >>> run = task.sample(2, torch.Generator().manual_seed(0))
        >>> run.draw
        {'hidden': [10, 9, 9], 'activation': 'tanh'}
        >>> run.dim
        939
    """

    def __init__(
        self,
        data: str | os.PathLike[str] = "digits",
        depth: int | Sequence[int] = (1, 3),
        width: int | Sequence[int] = (8, 64),
        activations: Sequence[str] = tuple(ACTIVATIONS),
        batch_size: int = 128,
        init_scale: float | str = "torch",
        split: str = "meta_train",
        fraction: float = 0.5,
    ) -> None:
        self.depth, self.width = as_range("depth", depth), as_range("width", width)
        if isinstance(activations, str) or not activations:
            raise TypeError(
                "activations must be a sequence of at least one of "
                f"{', '.join(map(repr, ACTIVATIONS))}; got {activations!r}"
            )
        for activation in activations:
            check_choice("activations", activation, tuple(ACTIVATIONS))
        check_init_scale(init_scale)
        super().__init__(data, batch_size, split, fraction)
        self.activations, self.init_scale = tuple(activations), init_scale

    def config(self) -> dict[str, Any]:
        return {
            "data": data_name(self.data),
            "depth": list(self.depth),
            "width": list(self.width),
            "activations": list(self.activations),
            "batch_size": self.batch_size,
            "init_scale": self.init_scale,
            "split": self.split,
            "fraction": self.fraction,
        }

    def draw(self, generator: torch.Generator) -> Draw:
        low, high = self.depth
        depth = int(torch.randint(low, high + 1, (), generator=generator))
        hidden = [draw_log_uniform(*self.width, generator) for _ in range(depth)]
        which = int(torch.randint(len(self.activations), (), generator=generator))
        return {"hidden": hidden, "activation": self.activations[which]}

    def drawn(self, draw: Draw) -> MLPClassification:
        shared = ("data", "batch_size", "init_scale", "split", "fraction")
        return MLPClassification(**draw, **{name: getattr(self, name) for name in shared})


class DrawnBatchSize(DrawnTask):
    """The task with its batch size drawn log-uniformly for every batch of runs.

    Args:
        task: one that has a ``batch_size``. Transforms of tasks go around this one.
        low, high: smallest and largest batch.

    Example:
        >>> task = DrawnBatchSize(MLPClassification("digits"), low=8, high=256)
        >>> run = task.sample(2, torch.Generator().manual_seed(0))
        >>> run.next_batch()[0].shape
        torch.Size([2, 231])
    """

    def __init__(self, task: Task, low: int = 16, high: int = 512) -> None:
        check_task(task)
        if "batch_size" not in task.config():
            raise TypeError(
                f"task must have a batch_size to draw, and {task!r} has none; give a task on "
                "minibatches, and put transforms around it: GradientNoise(DrawnBatchSize(task))"
            )
        self.task, (self.low, self.high) = task, as_range("low, high", (low, high))

    def config(self) -> dict[str, Any]:
        return {"task": repr(self.task), "low": self.low, "high": self.high}

    def held_out(self) -> Task:
        """The task at its own batch size: drawing it is an augmentation."""
        return self.task.held_out()

    def draw(self, generator: torch.Generator) -> Draw:
        return {"batch_size": draw_log_uniform(self.low, self.high, generator)}

    def drawn(self, draw: Draw) -> Task:
        return self.task.with_options(**draw)
