"""Classification of images or signals by small convolutional networks."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import check_choice, check_number
from ._base import BatchedRun, TaskRun, fork_generator
from ._data import data_name
from ._images import ImageRun, ImageTask
from ._layout import Layout, affine
from ._mlp import ACTIVATIONS, MODULES, example_cross_entropies

__all__ = ["ConvClassification"]

_STRIDE = 2


class _ConvRun(ImageRun, BatchedRun):
    task: ConvClassification

    @property
    def tensor_sizes(self) -> tuple[int, ...]:
        return self.task.layout.sizes

    def batched(self, params: Tensor, *inputs: Tensor) -> Tensor:
        pixels, labels = inputs
        return self.each(params, pixels, labels).mean(dim=1)

    def each(self, params: Tensor, pixels: Tensor, labels: Tensor) -> Tensor:
        runs, size = labels.shape
        task = self.task
        activation = ACTIVATIONS[task.activation]
        convolve = F.conv1d if len(task.images.shape) == 1 else F.conv2d
        *layers, weight, bias = task.layout.split(params)
        # The runs are the groups of one convolution.
        hidden = pixels.transpose(0, 1).reshape(size, runs, *task.images.shape)
        for kernel, offset in zip(layers[::2], layers[1::2], strict=True):
            hidden = activation(
                convolve(
                    hidden,
                    kernel.flatten(0, 1),
                    offset.flatten(),
                    stride=_STRIDE,
                    padding=task.kernel_size // 2,
                    groups=runs,
                )
            )
        features = hidden.reshape(size, runs, -1).transpose(0, 1)
        logits = torch.baddbmm(bias.unsqueeze(1), features, weight.transpose(1, 2))
        return example_cross_entropies(logits, labels)


class ConvClassification(ImageTask):
    """Cross-entropy of a small convolutional network on minibatches of images or signals.

    Convolutions of stride 2, each followed by the activation and halving the size (rounded up), and
    a linear layer on all that the last one gives; two-dimensional on images, one-dimensional on
    signals. Coordinates are laid out as the parameters of ``module()``, and start as torch's do.

    Args:
        data, batch_size, split, fraction: see ``MLPClassification``.
        channels: of each convolution, at least one.
        kernel_size: odd; padded by half of it.
        activation: ``"sigmoid"``, ``"relu"``, ``"elu"`` or ``"tanh"``.

    Raises:
        FileNotFoundError, ValueError: if the data is not there or not MNIST.

    Example:
        >>> task = ConvClassification("digits", channels=(8, 16))
        >>> task.dim
        1898
        >>> run = task.sample(2, torch.Generator().manual_seed(0))
        >>> run.loss_and_grad(run.params, run.next_batch())[1].shape
        torch.Size([2, 1898])
        >>> ConvClassification("signals", channels=(8, 16), kernel_size=5).dim
        2314
    """

    def __init__(
        self,
        data: str | os.PathLike[str] = "digits",
        channels: Sequence[int] = (8, 16),
        kernel_size: int = 3,
        activation: str = "relu",
        batch_size: int = 32,
        split: str = "meta_train",
        fraction: float = 0.5,
    ) -> None:
        if isinstance(channels, (str, int)) or not channels:
            raise TypeError(
                "channels must be a sequence of at least one number of channels such as (8, 16), "
                f"got {channels!r}"
            )
        for count in channels:
            check_number("channels", count, minimum=1, integer=True)
        check_number("kernel_size", kernel_size, minimum=1, integer=True)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        check_choice("activation", activation, tuple(ACTIVATIONS))
        super().__init__(data, batch_size, split, fraction)
        self.channels, self.kernel_size = tuple(channels), kernel_size
        self.activation = activation
        kernel = (kernel_size,) * len(self.images.shape)
        slots = [
            slot
            for n_in, n_out in pairwise((1, *self.channels))
            for slot in affine(n_out, n_in, *kernel)
        ]
        self.layout = Layout([*slots, *affine(self.images.num_classes, self._features)])

    @property
    def _features(self) -> int:
        """Inputs of the linear layer."""
        sizes = list(self.images.shape)
        for _ in self.channels:
            sizes = [(size + 1) // _STRIDE for size in sizes]
        return self.channels[-1] * math.prod(sizes)

    @property
    def dim(self) -> int:
        """Number of coordinates of one run."""
        return self.layout.dim

    def config(self) -> dict[str, Any]:
        return {
            "data": data_name(self.data),
            "channels": list(self.channels),
            "kernel_size": self.kernel_size,
            "activation": self.activation,
            "batch_size": self.batch_size,
            "split": self.split,
            "fraction": self.fraction,
        }

    def module(self) -> nn.Sequential:
        """The network that one run trains; it takes ``(B, pixels)``."""
        convolution = nn.Conv1d if len(self.images.shape) == 1 else nn.Conv2d
        layers: list[nn.Module] = [nn.Unflatten(1, (1, *self.images.shape))]
        for n_in, n_out in pairwise((1, *self.channels)):
            padding = self.kernel_size // 2
            layers.append(convolution(n_in, n_out, self.kernel_size, _STRIDE, padding))
            layers.append(MODULES[self.activation]())
        return nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(self._features, self.images.num_classes)
        )

    def sample(
        self, num_runs: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> TaskRun:
        params = self.layout.draw(num_runs, generator, dtype)
        return _ConvRun(self, {"params": params}, fork_generator(generator))
