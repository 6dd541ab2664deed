"""What tasks on images or signals share: the data's splits, and minibatches of it."""

from __future__ import annotations

import os
from abc import abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._checks import check_number
from ._base import Batch, FunctionRun, Task
from ._data import Images, check_held_out, check_split, load_images, train_part

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["ImageRun", "ImageTask"]

# Images of all runs that are converted at a time where losses of whole sets are measured.
_CHUNK = 1000


class ImageTask(Task):
    """A task on minibatches of images, drawn uniformly with replacement at every evaluation.

    Args:
        data: ``"digits"``, ``"signals"``, ``"mnist"``, or a path that leads to an MNIST .npz.
        batch_size: images a minibatch.
        split: ``"train"``, ``"meta_train"``, ``"meta_valid"`` or ``"test"``.
        fraction: share of the training images that is for meta-training.

    Raises:
        FileNotFoundError, ValueError: if the data is not there or not MNIST.
    """

    def __init__(
        self, data: str | os.PathLike[str], batch_size: int, split: str, fraction: float
    ) -> None:
        check_number("batch_size", batch_size, minimum=1, integer=True)
        check_split(split, fraction)
        self.data, self.batch_size = os.fspath(data), batch_size
        self.split, self.fraction = split, fraction
        self.images: Images = load_images(data)

    def held_out(self) -> Self:
        """The same task on images that meta-training does not see, if it is on ``"meta_train"``."""
        return self.with_options(split="meta_valid") if self.split == "meta_train" else self

    def examples(self) -> tuple[Tensor, Tensor]:
        """Images ``(N, pixels)`` as stored and labels ``(N,)`` of the split."""
        if self.split == "test":
            return self.images.test_images, self.images.test_labels
        images, labels = self.images.train_images, self.images.train_labels
        part = train_part(len(labels), self.split, self.fraction, "images")
        return images[part], labels[part]


class ImageRun(FunctionRun):
    """Draws image indices; its function reads pixels ``(R, B, pixels)`` and labels ``(R, B)``.

    The runs of ``twin`` keep in ``tensors`` which of their images is replaced, and by which.
    """

    def __init__(
        self, task: ImageTask, tensors: dict[str, Tensor], generator: torch.Generator
    ) -> None:
        super().__init__(tensors, generator)
        self.task = task
        self.images, self.labels = task.examples()
        self._pixels: Tensor | None = None

    def next_batch(self) -> Batch:
        shape = (self.num_runs, self.task.batch_size)
        return (torch.randint(len(self.labels), shape, generator=self.generator),)

    def full_batch(self) -> Batch:
        return (torch.arange(len(self.labels)).expand(self.num_runs, -1),)

    def held_out(self, generator: torch.Generator) -> Self:
        # A twin's replaced image is one of the training set.
        return type(self)(check_held_out(self.task), {"params": self.params}, generator)

    def gather(self, batch: Batch) -> Batch:
        (indices,) = batch
        shape = (*indices.shape, self.images.shape[1])
        flat = indices.reshape(-1)
        # The converted pixels live in one reused buffer: a fresh 3 MB allocation a step costs more
        # than the copy.
        if self._pixels is None or self._pixels.shape != shape:
            self._pixels = torch.empty(shape, dtype=self.params.dtype)
        pixels = self._pixels
        pixels.view(len(flat), -1).copy_(self.images.index_select(0, flat))
        labels = self.labels.index_select(0, flat).view(indices.shape)
        if "replaced" in self.tensors:
            met = indices == self.tensors["replaced"].unsqueeze(1)
            runs = met.nonzero()[:, 0]
            pixels[met] = self.tensors["new_images"][runs].to(pixels.dtype)
            labels[met] = self.tensors["new_labels"][runs]
        return pixels.mul_(self.task.images.scale), labels

    def losses(self, params: Tensor, batch: Batch) -> Tensor:
        # A graph may keep these pixels until its backward pass, so they get a buffer of their own.
        self._pixels = None
        # VmapRun or BatchedRun, whichever follows in the subclass.
        losses = super().losses(params, batch)  # type: ignore[safe-super]
        self._pixels = None
        return losses

    @abstractmethod
    def each(self, params: Tensor, pixels: Tensor, labels: Tensor) -> Tensor:
        """Losses ``(R, B)`` of single images, whose means over B are the losses."""

    @torch.no_grad()
    def example_losses(self, params: Tensor, held_out: bool) -> Tensor:
        """Losses ``(R, N)`` of single images at ``params (R, D)``.

        Of all training images, or of the test images (``held_out``) but for the first R, which
        ``twin`` may put into training sets.
        """
        count = len(self.task.images.test_labels) - self.num_runs if held_out else len(self.labels)
        losses = []
        for indices in torch.arange(count).split(_CHUNK):
            batch = (indices.expand(self.num_runs, -1),)
            pixels, labels = self._test_images(batch) if held_out else self.gather(batch)
            losses.append(self.each(params, pixels, labels))
        self._pixels = None
        return torch.cat(losses, dim=1)

    def _test_images(self, batch: Batch) -> Batch:
        (indices,) = batch
        data, chosen = self.task.images, indices + self.num_runs
        return data.test_images[chosen].to(self.params.dtype) * data.scale, data.test_labels[chosen]

    def twin(self, generator: torch.Generator) -> Self:
        """The same runs on training sets with one image replaced, drawn for each run.

        Starts and minibatches (as positions in the set) are the same; run r has test image r in the
        place of a training image. For measurements of stability (arXiv 1509.01240).

        Raises:
            ValueError: if the runs train on the test images, or are more than there are.
        """
        data, runs = self.task.images, self.num_runs
        if self.task.split == "test":
            raise ValueError(
                f"{self.task!r} trains on the test images, which leaves none to test on; choose "
                "split 'train', 'meta_train' or 'meta_valid'"
            )
        if runs >= len(data.test_labels):
            raise ValueError(
                f"{runs} runs need a test image each, and one must be left to test on; there are "
                f"{len(data.test_labels)}: take fewer runs"
            )
        ours = torch.Generator()
        ours.set_state(self.generator.get_state())
        tensors = {
            "params": self.params,
            "replaced": torch.randint(len(self.labels), (runs,), generator=generator),
            "new_images": data.test_images[:runs],
            "new_labels": data.test_labels[:runs],
        }
        return type(self)(self.task, tensors, ours)
