"""Data of classification tasks: scikit-learn's digits, MNIST from an .npz file, signals."""

from __future__ import annotations

import os
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from .._checks import check_choice, check_number
from ._signals import CLASSES, LENGTH, draw_signals

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "DATA_VARIABLE",
    "Images",
    "check_held_out",
    "check_split",
    "data_name",
    "find_mnist",
    "load_images",
    "train_part",
]

DATA_VARIABLE = "FASTL2O_DATA"
"""The environment variable that names the MNIST file, or its folder."""

_HOW = (
    f"pass the path of an mnist.npz, or set ${DATA_VARIABLE} to that file or to a directory "
    "that holds it"
)
# Two spellings of the same four arrays: torchvision-like exports, and the Keras mnist.npz.
_KEYS = (
    ("train_images", "train_labels", "test_images", "test_labels"),
    ("x_train", "y_train", "x_test", "y_test"),
)
_DIGITS_TEST = 360  # of 1,797; scikit-learn's digits come without a split
_SIGNALS_TRAIN, _SIGNALS_TEST = 4000, 1000
_SPLITS = ("train", "meta_train", "meta_valid", "test")


class Images(NamedTuple):
    """Images or signals as stored, ``(N, pixels)`` uint8 or float32, and what they are.

    ``scale`` is the factor that brings pixels to [0, 1] (1 for signals, of about unit size), and
    ``shape`` that of one image, (height, width), or signal, (length,).
    """

    train_images: Tensor
    train_labels: Tensor  # (N,) int64
    test_images: Tensor
    test_labels: Tensor
    scale: float
    num_classes: int
    shape: tuple[int, ...]


def data_name(data: str) -> str:
    """What the data is, whatever it was found by: "digits", "signals" or "mnist"."""
    return data if data in ("digits", "signals") else "mnist"


def check_split(split: str, fraction: float) -> None:
    """Refuse a split or fraction that no data has."""
    check_choice("split", split, _SPLITS)
    check_number("fraction", fraction, minimum=0, exclusive=True)
    if fraction >= 1:
        raise ValueError(f"fraction must lie between 0 and 1 (both excluded), got {fraction!r}")


class _OnSplit(Protocol):
    def held_out(self) -> Self: ...


_Task = TypeVar("_Task", bound=_OnSplit)


def check_held_out(task: _Task) -> _Task:
    """The task on the data that it holds out, or a refusal where it holds out none."""
    held_out = task.held_out()
    if held_out is task:
        raise ValueError(f"{task!r} holds out no data; give it split='meta_train'")
    return held_out


def train_part(count: int, split: str, fraction: float, what: str) -> slice:
    """Which of ``count`` training ``what`` ("images", say) are the split's, other than "test"'s."""
    cut = round(count * fraction)
    first, last = {"train": (0, count), "meta_train": (0, cut), "meta_valid": (cut, count)}[split]
    if first == last:
        raise ValueError(
            f"split {split!r} of {count} training {what} with fraction {fraction} is empty; "
            f"choose another split or fraction, or more {what}"
        )
    return slice(first, last)


def find_mnist(path: str | os.PathLike[str] | None = None) -> Path:
    """The MNIST .npz: ``path``, or what ``$FASTL2O_DATA`` names.

    Either may be a directory that holds mnist.npz.

    Raises:
        FileNotFoundError: if neither leads to a file; the message says what to pass.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "mnist.npz").write_bytes(b"")
        >>> find_mnist(folder).name
        'mnist.npz'
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
    """Load ``"digits"``, ``"signals"``, or MNIST: ``"mnist"`` (by ``$FASTL2O_DATA``) or a path.

    What was loaded stays in memory and is shared by all tasks on it.

    Raises:
        FileNotFoundError: if the MNIST file is not there.
        ModuleNotFoundError: for the digits without scikit-learn.
        ValueError: if the file is not MNIST (not an .npz, other keys, shapes or dtypes).
    """
    if data == "digits":
        return _load_digits()
    if data == "signals":
        return _load_signals()
    path = find_mnist(None if data == "mnist" else data)
    return _load_mnist(str(path), path.stat().st_mtime_ns)


@lru_cache(maxsize=1)
def _load_digits() -> Images:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ModuleNotFoundError(
            "data='digits' needs scikit-learn, which holds the images: pip install 'fastl2o[data]'"
        ) from error

    bunch = load_digits()
    # The file is ordered by writer: a fixed permutation makes every split a sample of all of them.
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(bunch.data).to(torch.uint8)[order]
    labels = torch.from_numpy(bunch.target).long()[order]
    cut = len(order) - _DIGITS_TEST
    return Images(images[:cut], labels[:cut], images[cut:], labels[cut:], 1 / 16, 10, (8, 8))


@lru_cache(maxsize=1)
def _load_signals() -> Images:
    signals, labels = draw_signals(_SIGNALS_TRAIN + _SIGNALS_TEST)
    cut = _SIGNALS_TRAIN
    return Images(signals[:cut], labels[:cut], signals[cut:], labels[cut:], 1.0, CLASSES, (LENGTH,))


@lru_cache(maxsize=2)
def _load_mnist(path: str, _modified: int) -> Images:
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("it is no zip archive, or a truncated one")
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        # numpy advises to allow pickles, which can run any code.
        pickled = "it holds Python objects, which are never loaded"
        reason = pickled if "pickle" in str(error) else error
        raise ValueError(f"{path!r} is not an .npz file of arrays: {reason}; {_HOW}") from error
    keys = next((keys for keys in _KEYS if arrays.keys() >= set(keys)), None)
    if keys is None:
        raise ValueError(
            f"{path!r} is not MNIST: it holds the arrays {sorted(arrays)}, and {list(_KEYS[0])} "
            f"(or {list(_KEYS[1])}) are needed; {_HOW}"
        )
    try:
        train = _images_and_labels(keys[:2], arrays)
        test = _images_and_labels(keys[2:], arrays)
    except ValueError as error:
        raise ValueError(f"{path!r} is not MNIST: {error}; {_HOW}") from None
    return Images(*train, *test, 1 / 255, 10, (28, 28))


def _images_and_labels(
    keys: tuple[str, ...], arrays: dict[str, np.ndarray[Any, Any]]
) -> tuple[Tensor, Tensor]:
    """Pixels ``(N, 784)`` uint8 and labels ``(N,)`` int64, or what is wrong with the arrays."""
    images, labels = (arrays[key] for key in keys)
    shaped = images.ndim > 1 and images.shape[1:] in ((28, 28), (784,)) and len(images) > 0
    if images.dtype != np.uint8 or not shaped:
        raise ValueError(
            f"{keys[0]} is {images.dtype} of shape {images.shape}, uint8 (N, 28, 28) is needed"
        )
    integers = labels.shape == (len(images),) and labels.dtype.kind in "ui"
    if not integers or labels.min() < 0 or labels.max() > 9:
        raise ValueError(
            f"{keys[1]} is {labels.dtype} of shape {labels.shape}, an integer label 0..9 for each "
            f"of the {len(images)} images is needed"
        )
    pixels = torch.from_numpy(images.reshape(len(images), 784))
    return pixels, torch.from_numpy(labels.astype(np.int64))
