"""Image data for classification tasks: scikit-learn's digits, or MNIST from an .npz file."""

from __future__ import annotations

import os
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["DATA_VARIABLE", "Images", "find_mnist", "load_images"]

DATA_VARIABLE = "FASTL2O_DATA"
_HOW = f"pass the path of an mnist.npz, or set ${DATA_VARIABLE} to that file or to a directory that holds it"
# Two spellings of the same four arrays: torchvision-like exports, and the Keras mnist.npz.
_KEYS = (
    ("train_images", "train_labels", "test_images", "test_labels"),
    ("x_train", "y_train", "x_test", "y_test"),
)
_DIGITS_TEST = 360  # of 1,797; scikit-learn's digits come without a split


class Images(NamedTuple):
    """Images as stored, ``(N, pixels)`` uint8, with the factor that brings pixels to [0, 1]."""

    train_images: Tensor
    train_labels: Tensor  # (N,) int64
    test_images: Tensor
    test_labels: Tensor
    scale: float
    num_classes: int


def find_mnist(path: str | os.PathLike[str] | None = None) -> Path:
    """The MNIST .npz: ``path``, or what ``$FASTL2O_DATA`` names (the file, or a directory with mnist.npz).

    Raises:
        FileNotFoundError: if neither leads to a file; the message says what to pass.
    """
    given = os.fspath(path) if path is not None else os.environ.get(DATA_VARIABLE, "")
    source = "data" if path is not None else f"${DATA_VARIABLE}"
    if not given:
        raise FileNotFoundError(
            f"data='mnist' needs the MNIST images, and ${DATA_VARIABLE} is not set; {_HOW}"
        )
    found = Path(given).expanduser()
    if found.is_dir():
        found = found / "mnist.npz"
    if not found.is_file():
        raise FileNotFoundError(f"{source} = {given!r}: there is no file {str(found)!r}; {_HOW}")
    return found.resolve()


def load_images(data: str | os.PathLike[str]) -> Images:
    """Load ``"digits"``, ``"mnist"`` (by ``$FASTL2O_DATA``) or the MNIST .npz at a path; kept in memory once.

    Raises:
        FileNotFoundError: if the MNIST file is not there.
        ValueError: if the file is not MNIST (not an .npz, other keys, shapes or dtypes).
    """
    if data == "digits":
        return _load_digits()
    path = find_mnist(None if data == "mnist" else data)
    return _load_mnist(str(path), path.stat().st_mtime_ns)


@lru_cache(maxsize=1)
def _load_digits() -> Images:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    # The file is ordered by writer: a fixed permutation makes every split a sample of all of them.
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(bunch.data).to(torch.uint8)[order]
    labels = torch.from_numpy(bunch.target).long()[order]
    cut = len(order) - _DIGITS_TEST
    return Images(images[:cut], labels[:cut], images[cut:], labels[cut:], 1 / 16, 10)


@lru_cache(maxsize=2)
def _load_mnist(path: str, _modified: int) -> Images:
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as archive:
            if not hasattr(archive, "files"):
                raise ValueError("a single array")
            names = set(archive.files)
            keys = next((keys for keys in _KEYS if names.issuperset(keys)), None)
            if keys is None:
                raise ValueError(
                    f"it holds the arrays {sorted(names)}, and {list(_KEYS[0])} (or {list(_KEYS[1])}) are needed"
                )
            arrays = [archive[key] for key in keys]
    except (ValueError, OSError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path!r} is not MNIST as an .npz file: {error}; {_HOW}") from error
    images, labels = arrays[0::2], arrays[1::2]
    for key, array in zip(keys[0::2], images, strict=True):
        if array.dtype != np.uint8 or array.shape[1:] not in ((28, 28), (784,)) or len(array) == 0:
            raise ValueError(
                f"{path!r} is not MNIST: {key} is {array.dtype} of shape {array.shape}, and uint8 (N, 28, 28) is needed; {_HOW}"
            )
    for key, array, pictures in zip(keys[1::2], labels, images, strict=True):
        if (
            array.shape != (len(pictures),)
            or array.dtype.kind not in "ui"
            or array.min() < 0
            or array.max() > 9
        ):
            raise ValueError(
                f"{path!r} is not MNIST: {key} is {array.dtype} of shape {array.shape}, and one integer label 0..9 "
                f"for each of the {len(pictures)} images is needed; {_HOW}"
            )
    pixels = [torch.from_numpy(array.reshape(len(array), 784)) for array in images]
    targets = [torch.from_numpy(array.astype(np.int64)) for array in labels]
    return Images(pixels[0], targets[0], pixels[1], targets[1], 1 / 255, 10)
