"""Reconstruction of images or signals by multi-layer perceptrons with a bottleneck."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import check_choice
from ._base import BatchedRun, TaskRun, fork_generator
from ._images import ImageRun
from ._mlp import ACTIVATIONS, ImageMLP, network

__all__ = ["Autoencoder"]


class _AutoencoderRun(ImageRun, BatchedRun):
    task: Autoencoder

    @property
    def tensor_sizes(self) -> tuple[int, ...]:
        return tuple(self.task.sizes)

    def batched(self, params: Tensor, *inputs: Tensor) -> Tensor:
        pixels, labels = inputs
        return self.each(params, pixels, labels).mean(dim=1)

    def each(self, params: Tensor, pixels: Tensor, labels: Tensor) -> Tensor:
        outputs = network(params, pixels, self.task.widths, ACTIVATIONS[self.task.activation])
        distance = F.mse_loss if self.task.loss == "squared" else F.binary_cross_entropy_with_logits
        return distance(outputs, pixels, reduction="none").mean(dim=2)


class Autoencoder(ImageMLP):
    """Reconstruction of images by a multi-layer perceptron with a bottleneck, on minibatches.

    The loss is the mean over pixels and images. The last layer is linear; coordinates are laid out
    as ``MLPClassification``'s (``module()`` gives the network).

    Args:
        data, batch_size, split, fraction: see ``MLPClassification``.
        hidden: width of each hidden layer, the bottleneck's among them.
        activation: ``"sigmoid"``, ``"relu"``, ``"elu"`` or ``"tanh"``.
        init_scale: see ``MLPClassification``.
        loss: ``"squared"``, the squared distance of outputs and pixels; ``"cross_entropy"``, that
            of pixels in [0, 1] and the outputs' sigmoid, for images only.

    Raises:
        FileNotFoundError, ValueError: if the data is not there or not MNIST.

    Example:
        >>> task = Autoencoder("digits", hidden=(32, 8, 32))
        >>> task.dim
        4744
        >>> run = task.sample(2, torch.Generator().manual_seed(0))
        >>> run.loss_and_grad(run.params, run.next_batch())[1].shape
        torch.Size([2, 4744])
    """

    def __init__(
        self,
        data: str | os.PathLike[str] = "digits",
        hidden: Sequence[int] = (32, 8, 32),
        activation: str = "tanh",
        batch_size: int = 64,
        init_scale: float | str = "torch",
        loss: str = "squared",
        split: str = "meta_train",
        fraction: float = 0.5,
    ) -> None:
        check_choice("loss", loss, ("squared", "cross_entropy"))
        if loss == "cross_entropy" and data == "signals":
            raise ValueError(
                "loss='cross_entropy' is for pixels in [0, 1], and signals are not bounded; use "
                "loss='squared'"
            )
        super().__init__(data, hidden, activation, batch_size, init_scale, split, fraction)
        self.loss = loss

    @property
    def outputs(self) -> int:
        return self.images.train_images.shape[1]

    def config(self) -> dict[str, Any]:
        return {**super().config(), "loss": self.loss}

    def sample(
        self, num_runs: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> TaskRun:
        params = self.draw_params(num_runs, generator, dtype)
        return _AutoencoderRun(self, {"params": params}, fork_generator(generator))
