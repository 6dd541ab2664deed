"""Classification by small multi-layer perceptrons, the field's standard optimizee."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import check_choice, check_num_runs, check_number
from ._base import Batch, TaskRun, VmapRun, fork_generator
from ._data import data_name
from ._images import ImageRun, ImageTask

__all__ = [
    "ACTIVATIONS",
    "MODULES",
    "ImageMLP",
    "MLPClassification",
    "check_hidden",
    "check_init_scale",
    "cross_entropies",
    "example_cross_entropies",
    "network",
    "split_layers",
]

# Derivatives of the activations as functions of their output, which is what a forward pass keeps.
_DERIVATIVES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": lambda out: out * (1 - out),
    "relu": lambda out: (out > 0).to(out.dtype),
    "elu": lambda out: out.clamp(max=0) + 1,
    "tanh": lambda out: 1 - out * out,
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "relu": F.relu,
    "elu": F.elu,
    "tanh": torch.tanh,
}
MODULES = {
    "sigmoid": torch.nn.Sigmoid,
    "relu": torch.nn.ReLU,
    "elu": torch.nn.ELU,
    "tanh": torch.nn.Tanh,
}


class _MLPRun(ImageRun, VmapRun):
    task: MLPClassification

    @property
    def tensor_sizes(self) -> tuple[int, ...]:
        return tuple(self.task.sizes)

    def loss(self, params: Tensor, *inputs: Tensor) -> Tensor:
        pixels, labels = inputs
        activation = ACTIVATIONS[self.task.activation]
        # One split, not four slices: its backward is one concatenation instead of four zero-padded
        # (D,) sums.
        pieces = iter(params.split(self.task.sizes))
        hidden = pixels
        for layer, (n_in, n_out) in enumerate(pairwise(self.task.widths)):
            weight, bias = next(pieces).view(n_out, n_in), next(pieces)
            hidden = F.linear(activation(hidden) if layer else hidden, weight, bias)
        return F.cross_entropy(hidden, labels)

    def loss_and_grad(self, params: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        losses, grads = self.loss_and_grad_at(params.unsqueeze(0), batch)
        return losses.squeeze(0), grads.squeeze(0)

    def loss_and_grad_at(self, points: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        # Written out with batched matrix products: under vmap, whose gradients these are, the same
        # arithmetic takes several times as long. Images are the last dimension, since torch's
        # softmax is many times slower over a last dimension of ten classes.
        pixels, labels = self.gather(batch)
        count, (runs, size) = len(points), labels.shape
        layers = split_layers(points.flatten(0, 1), self.task.widths)
        outputs, logits = self._forward(layers, pixels)
        log_odds = torch.log_softmax(logits, dim=1)
        picked = labels.expand(count, -1, -1).reshape(count * runs, 1, size)
        losses = log_odds.gather(1, picked).sum(dim=(1, 2)).div_(-size)
        delta = log_odds.exp()  # (K R, classes, B), becomes d loss / d logits
        delta.scatter_add_(1, picked, delta.new_full(picked.shape, -1.0)).div_(size)
        pieces: list[Tensor] = []
        for (weight, _), out in zip(reversed(layers[1:]), reversed(outputs), strict=True):
            pieces = [delta.bmm(out.transpose(1, 2)).flatten(1), delta.sum(dim=2), *pieces]
            delta = weight.transpose(1, 2).bmm(delta)
            delta.mul_(_DERIVATIVES[self.task.activation](out))
        weight_grad = delta.new_empty((*delta.shape[:2], pixels.shape[2]))
        for of_point, own in zip(weight_grad.chunk(count), delta.chunk(count), strict=True):
            torch.bmm(own, pixels, out=of_point)
        grads = torch.cat([weight_grad.flatten(1), delta.sum(dim=2), *pieces], dim=1)
        return losses.view(count, runs), grads.view(points.shape)

    def _forward(
        self, layers: Sequence[tuple[Tensor, Tensor]], pixels: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """Outputs of the hidden layers, and the logits ``(K R, classes, B)``.

        Of ``pixels (R, B, pixels)``, for K networks of each run.
        """
        (weight, bias), *later = layers
        count = len(weight) // len(pixels)
        logits = pixels.new_empty((*bias.shape, pixels.shape[1]))
        for out, own, shift in zip(
            logits.chunk(count), weight.chunk(count), bias.unsqueeze(2).chunk(count), strict=True
        ):
            torch.baddbmm(shift, own, pixels.transpose(1, 2), out=out)
        outputs: list[Tensor] = []
        for weight, bias in later:
            outputs.append(ACTIVATIONS[self.task.activation](logits))
            logits = torch.baddbmm(bias.unsqueeze(2), weight, outputs[-1])
        return outputs, logits

    def each(self, params: Tensor, pixels: Tensor, labels: Tensor) -> Tensor:
        logits = self._forward(split_layers(params, self.task.widths), pixels)[1]
        return example_cross_entropies(logits.transpose(1, 2), labels)


def split_layers(params: Tensor, widths: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Weight ``(R, out, in)`` and bias ``(R, out)`` of each layer: views of ``params (R, D)``."""
    shapes = list(pairwise(widths))
    pieces = iter(params.split([n for n_in, n_out in shapes for n in (n_in * n_out, n_out)], dim=1))
    return [(next(pieces).unflatten(1, (n_out, n_in)), next(pieces)) for n_in, n_out in shapes]


def network(
    params: Tensor,
    points: Tensor,
    widths: Sequence[int],
    activation: Callable[[Tensor], Tensor] = torch.sigmoid,
) -> Tensor:
    """Outputs (R, B, out) of R networks with flat ``params (R, D)`` at ``points (R, B, in)``."""
    for layer, (weight, bias) in enumerate(split_layers(params, widths)):
        inputs = activation(points) if layer else points
        points = torch.baddbmm(bias.unsqueeze(1), inputs, weight.transpose(1, 2))
    return points


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy ``(R,)`` of ``logits (R, B, classes)`` at ``labels (R, B)``."""
    return example_cross_entropies(logits, labels).mean(dim=1)


def example_cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropies ``(R, B)`` of ``logits (R, B, classes)`` at ``labels (R, B)``."""
    each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return each.view(labels.shape)


def check_hidden(hidden: Sequence[int]) -> None:
    """Refuse what is no sequence of layer widths."""
    if isinstance(hidden, (str, int)):
        raise TypeError(f"hidden must be a sequence of layer widths such as (20,), got {hidden!r}")
    for width in hidden:
        check_number("hidden", width, minimum=1, integer=True)


def check_init_scale(init_scale: float | str) -> None:
    """Refuse what is neither a standard deviation nor ``"torch"``."""
    if not isinstance(init_scale, str):
        check_number("init_scale", init_scale, minimum=0)
    elif init_scale != "torch":
        raise ValueError(
            "init_scale must be a finite number of at least 0, or 'torch' (nn.Linear's "
            f"initialisation); got {init_scale!r}"
        )


class ImageMLP(ImageTask):
    """A multi-layer perceptron on minibatches of images; subclasses say what it is to put out.

    Args:
        hidden, activation, init_scale: see ``MLPClassification``.
        data, batch_size, split, fraction: see ``ImageTask``.
    """

    def __init__(
        self,
        data: str | os.PathLike[str],
        hidden: Sequence[int],
        activation: str,
        batch_size: int,
        init_scale: float | str,
        split: str,
        fraction: float,
    ) -> None:
        check_hidden(hidden)
        check_choice("activation", activation, tuple(ACTIVATIONS))
        check_init_scale(init_scale)
        super().__init__(data, batch_size, split, fraction)
        self.hidden, self.activation, self.init_scale = tuple(hidden), activation, init_scale
        self.widths = (self.images.train_images.shape[1], *self.hidden, self.outputs)
        self.sizes = [
            size for n_in, n_out in pairwise(self.widths) for size in (n_in * n_out, n_out)
        ]

    @property
    def outputs(self) -> int:
        """Width of the last layer."""
        return self.images.num_classes

    @property
    def dim(self) -> int:
        """Number of coordinates of one run."""
        return sum(self.sizes)

    def config(self) -> dict[str, Any]:
        # The path of the images is where, not what: a checkpoint or card is the same wherever MNIST
        # lies.
        return {
            "data": data_name(self.data),
            "hidden": list(self.hidden),
            "activation": self.activation,
            "batch_size": self.batch_size,
            "init_scale": self.init_scale,
            "split": self.split,
            "fraction": self.fraction,
        }

    def module(self) -> torch.nn.Sequential:
        """The network that one run trains, for comparison with ordinary optimizers."""
        layers: list[torch.nn.Module] = []
        for n_in, n_out in pairwise(self.widths):
            layers += [torch.nn.Linear(n_in, n_out), MODULES[self.activation]()]
        return torch.nn.Sequential(*layers[:-1])

    def draw_params(self, num_runs: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        """Initial parameters ``(R, D)``."""
        check_num_runs(num_runs)
        if not isinstance(self.init_scale, str):
            normal = torch.randn(num_runs, self.dim, generator=generator, dtype=dtype)
            return normal * self.init_scale
        # nn.Linear: weights and biases alike are U(-1, 1) / sqrt(n_in).
        pieces = []
        for n_in, n_out in pairwise(self.widths):
            uniform = torch.rand(num_runs, (n_in + 1) * n_out, generator=generator, dtype=dtype)
            pieces.append((2 * uniform - 1) / math.sqrt(n_in))
        return torch.cat(pieces, dim=1)


class MLPClassification(ImageMLP):
    """Cross-entropy of a multi-layer perceptron on minibatches of images.

    A minibatch is drawn uniformly with replacement, anew at every evaluation. Coordinates are laid
    out as the parameters of ``nn.Sequential(Linear, activation, Linear, ...)``: W1 (out, in) row by
    row, b1, W2, b2 and so on (``module()`` gives that network).

    Args:
        data: ``"digits"`` (scikit-learn's 1,797 8x8 images), ``"mnist"`` (found by
            ``$FASTL2O_DATA``), the path of an MNIST .npz or of a directory that holds mnist.npz, or
            ``"signals"`` (generated, 5,000 of 40 samples in ten classes). Pixels are scaled to
            [0, 1].
        hidden: width of each hidden layer.
        activation: ``"sigmoid"``, ``"relu"``, ``"elu"`` or ``"tanh"``.
        batch_size: images a minibatch.
        init_scale: all weights and biases ~ N(0, init_scale^2); or ``"torch"``, ``nn.Linear``'s
            default.
        split: images the runs train on: ``"train"`` all training images; ``"meta_train"`` the first
            ``fraction`` of them, ``"meta_valid"`` the rest (what ``held_out`` gives for
            ``"meta_train"``); ``"test"``.
        fraction: share of the training images that is for meta-training.

    Raises:
        FileNotFoundError, ValueError: if the data is not there or not MNIST.

    Example:
        >>> task = MLPClassification("digits", hidden=(20,), batch_size=32)
        >>> task.dim
        1510
        >>> run = task.sample(2, torch.Generator().manual_seed(0))
        >>> run.loss_and_grad(run.params, run.next_batch())[1].shape
        torch.Size([2, 1510])
    """

    def __init__(
        self,
        data: str | os.PathLike[str] = "digits",
        hidden: Sequence[int] = (20,),
        activation: str = "sigmoid",
        batch_size: int = 128,
        init_scale: float | str = 0.01,
        split: str = "meta_train",
        fraction: float = 0.5,
    ) -> None:
        super().__init__(data, hidden, activation, batch_size, init_scale, split, fraction)

    def sample(
        self, num_runs: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> TaskRun:
        params = self.draw_params(num_runs, generator, dtype)
        return _MLPRun(self, {"params": params}, fork_generator(generator))
