"""Classification of generated points: softmax regression, and labels of a random network."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .._checks import check_num_runs, check_number
from ._base import Batch, BatchedRun, Task, TaskRun, fork_generator
from ._mlp import check_hidden, cross_entropies, network

__all__ = ["RandomMLP", "SoftmaxRegression"]


class _MinibatchRun(BatchedRun):
    """Draws minibatch indices; ``inputs`` (R, points, features), ``labels`` (R, points)."""

    def __init__(
        self,
        sizes: Sequence[int],
        batch_size: int,
        weight_decay: float,
        tensors: dict[str, Tensor],
        generator: torch.Generator,
    ) -> None:
        super().__init__(tensors, generator)
        self.sizes, self.batch_size, self.weight_decay = sizes, batch_size, weight_decay

    @property
    def tensor_sizes(self) -> tuple[int, ...]:
        layers = itertools.pairwise(self.sizes)
        return tuple(size for n_in, n_out in layers for size in (n_in * n_out, n_out))

    def next_batch(self) -> Batch:
        points = self.tensors["inputs"].shape[1]
        shape = (self.num_runs, self.batch_size)
        return (torch.randint(points, shape, generator=self.generator),)

    def full_batch(self) -> Batch:
        return (torch.arange(self.tensors["inputs"].shape[1]).expand(self.num_runs, -1),)

    def gather(self, batch: Batch) -> Batch:
        (indices,) = batch
        inputs, labels = self.tensors["inputs"], self.tensors["labels"]
        where = indices.unsqueeze(2).expand(-1, -1, inputs.shape[2])
        return inputs.gather(1, where), labels.gather(1, indices)

    def batched(self, params: Tensor, *inputs: Tensor) -> Tensor:
        points, labels = inputs
        losses = cross_entropies(network(params, points, self.sizes), labels)
        return losses + self.weight_decay * params.square().mean(dim=1)


def draw_network(
    num_runs: int, sizes: Sequence[int], scale: float, generator: torch.Generator, like: Tensor
) -> Tensor:
    """Flat parameters (R, D): weights of N(0, scale^2 / inputs), biases 0."""
    parts = []
    for n_in, n_out in itertools.pairwise(sizes):
        shape = (num_runs, n_in * n_out)
        weight = torch.randn(shape, generator=generator, dtype=like.dtype)
        parts += [weight * (scale / math.sqrt(n_in)), like.new_zeros(num_runs, n_out)]
    return torch.cat(parts, dim=1)


class SoftmaxRegression(Task):
    """Two Gaussian clouds of points told apart by a linear model, in minibatches.

    The centres of the classes lie at plus and minus ``separation`` / 2 along a random direction.

    Args:
        features: of a point.
        separation: distance of the centres; the clouds have standard deviation 1.
        batch_size: points of a minibatch, drawn with replacement.
        points: in the data set of a run.
        weight_decay: factor of the mean squared parameter in the loss.

    Example:
        >>> SoftmaxRegression(features=10).sample(2, torch.Generator().manual_seed(0)).dim
        22
    """

    def __init__(
        self,
        features: int = 10,
        separation: float = 2.0,
        batch_size: int = 100,
        points: int = 1000,
        weight_decay: float = 1e-3,
    ) -> None:
        for name, value in (("features", features), ("batch_size", batch_size), ("points", points)):
            check_number(name, value, minimum=1, integer=True)
        check_number("separation", separation, minimum=0)
        check_number("weight_decay", weight_decay, minimum=0)
        self.features, self.separation, self.batch_size = features, separation, batch_size
        self.points, self.weight_decay = points, weight_decay

    def config(self) -> dict[str, Any]:
        names = ("features", "separation", "batch_size", "points", "weight_decay")
        return {name: getattr(self, name) for name in names}

    def sample(
        self, num_runs: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> TaskRun:
        check_num_runs(num_runs)
        direction = torch.randn(num_runs, 1, self.features, generator=generator, dtype=dtype)
        direction = functional.normalize(direction, dim=2)
        labels = torch.randint(2, (num_runs, self.points), generator=generator)
        clouds = torch.randn(num_runs, self.points, self.features, generator=generator, dtype=dtype)
        side = (labels.to(dtype) - 0.5).unsqueeze(2)
        sizes = (self.features, 2)
        tensors = {
            "params": draw_network(num_runs, sizes, 1.0, generator, clouds),
            "inputs": clouds + self.separation * side * direction,
            "labels": labels,
        }
        return _MinibatchRun(
            sizes, self.batch_size, self.weight_decay, tensors, fork_generator(generator)
        )


class RandomMLP(Task):
    """A sigmoid network learns the labels that a random network of its own shape gives to points.

    Args:
        features: of a point.
        hidden: widths of the hidden layers.
        batch_size: points of a minibatch, drawn with replacement.
        points: in the data set of a run; their features are of N(0, 1).
        init_scale: weights start at N(0, init_scale^2 / inputs), biases at 0.

    Example:
        >>> RandomMLP(features=8, hidden=(8, 5)).sample(2, torch.Generator().manual_seed(0)).dim
        129
    """

    def __init__(
        self,
        features: int = 8,
        hidden: Sequence[int] = (8, 5),
        batch_size: int = 10,
        points: int = 1000,
        init_scale: float = 1.2,
    ) -> None:
        for name, value in (("features", features), ("batch_size", batch_size), ("points", points)):
            check_number(name, value, minimum=1, integer=True)
        check_hidden(hidden)
        check_number("init_scale", init_scale, minimum=0)
        self.features, self.hidden, self.batch_size = features, tuple(hidden), batch_size
        self.points, self.init_scale = points, init_scale

    def config(self) -> dict[str, Any]:
        return {
            "features": self.features,
            "hidden": list(self.hidden),
            "batch_size": self.batch_size,
            "points": self.points,
            "init_scale": self.init_scale,
        }

    def sample(
        self, num_runs: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> TaskRun:
        check_num_runs(num_runs)
        sizes = (self.features, *self.hidden, 2)
        shape = (num_runs, self.points, self.features)
        inputs = torch.randn(shape, generator=generator, dtype=dtype)
        # A teacher of larger weights, so that both classes are common.
        teacher = draw_network(num_runs, sizes, 4.0, generator, inputs)
        logits = network(teacher, inputs, sizes)
        margin = logits[:, :, 1] - logits[:, :, 0]
        tensors = {
            "params": draw_network(num_runs, sizes, self.init_scale, generator, inputs),
            "inputs": inputs,
            "labels": (margin > margin.median(dim=1, keepdim=True).values).long(),
        }
        return _MinibatchRun(sizes, self.batch_size, 0.0, tensors, fork_generator(generator))
