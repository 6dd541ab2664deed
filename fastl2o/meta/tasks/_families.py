"""Lists of tasks by family: those to meta-train on, and those that are only for validation."""

from __future__ import annotations

import os

from ._autoencoder import Autoencoder
from ._base import Task
from ._char_rnn import CharRNN
from ._char_transformer import CharTransformer
from ._conv import ConvClassification
from ._drawn import DrawnBatchSize, DrawnMLP
from ._ensemble import ensemble

__all__ = ["families", "held_out_families"]


def families(
    data: str | os.PathLike[str] = "digits", small_problems: bool = True
) -> dict[str, list[Task]]:
    """Task families to meta-train on, by name: networks on images and text, and small problems.

    Args:
        data: the images, ``"digits"``, ``"mnist"`` or the path of MNIST; ``"signals"`` are kept for
            ``held_out_families``.
        small_problems: include the families of ``ensemble()``.

    Returns:
        For each family a list of tasks; a trainer takes one list of all of them.

    Raises:
        ValueError: for data that is held out.
        FileNotFoundError, ValueError: if the data is not there or not MNIST.

    Example:
        >>> list(families(small_problems=False))
        ['drawn_mlp', 'conv', 'autoencoder', 'char_rnn']
    """
    if data == "signals":
        raise ValueError(
            "data = 'signals' is held out of meta-training: held_out_families() has the tasks on "
            "it; use 'digits' or MNIST here"
        )
    networks: dict[str, list[Task]] = {
        "drawn_mlp": [
            DrawnMLP(data),
            DrawnBatchSize(DrawnMLP(data, depth=(1, 2), width=(4, 32)), low=8, high=256),
        ],
        "conv": [
            ConvClassification(data),
            ConvClassification(data, channels=(6, 6), activation="tanh"),
            DrawnBatchSize(ConvClassification(data, (4, 8), 5, "elu"), low=8, high=64),
        ],
        "autoencoder": [
            Autoencoder(data),
            Autoencoder(data, (16,), "sigmoid", loss="cross_entropy"),
            Autoencoder(data, (24, 12, 24), "elu", batch_size=32),
        ],
        "char_rnn": [
            CharRNN(),
            CharRNN(hidden_size=12, length=24),
            DrawnBatchSize(CharRNN(hidden_size=32, length=8), low=4, high=64),
        ],
    }
    return {**(ensemble() if small_problems else {}), **networks}


def held_out_families() -> dict[str, list[Task]]:
    """Families that no rule is meta-trained on, by name: other networks, other data.

    None of their data, and none of their kinds of network but the multi-layer perceptron and the
    convolutional network, is in ``families()``: signals instead of images, another language, gated
    recurrences and attention. Recipes take them for validation only.

    Example:
        >>> sorted(held_out_families())
        ['char_gru', 'char_transformer', 'signal_autoencoder', 'signal_conv', 'signal_mlp']
    """
    return {
        "signal_mlp": [DrawnMLP("signals"), DrawnMLP("signals", depth=(4, 6), width=(8, 24))],
        "signal_conv": [
            ConvClassification("signals", kernel_size=5),
            ConvClassification("signals", (8, 8, 8), activation="elu"),
        ],
        "signal_autoencoder": [Autoencoder("signals", hidden=(20, 6, 20))],
        "char_gru": [CharRNN("gru", language=1), CharRNN("gru", 12, 24, language=2)],
        "char_transformer": [
            CharTransformer(language=1),
            CharTransformer(num_layers=2, language=2),
        ],
    }
