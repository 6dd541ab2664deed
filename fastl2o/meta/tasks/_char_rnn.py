"""Prediction of characters by a small recurrent network."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import check_choice, check_number
from ._base import TaskRun, fork_generator
from ._layout import Layout, Slot, affine
from ._mlp import cross_entropies
from ._text import ALPHABET, TextRun, TextTask

__all__ = ["CharRNN"]

_GATES = {"tanh": 1, "gru": 3}


class _CharRNNRun(TextRun):
    task: CharRNN

    @property
    def tensor_sizes(self) -> tuple[int, ...]:
        return self.task.layout.sizes

    def batched(self, params: Tensor, *inputs: Tensor) -> Tensor:
        (windows,) = inputs
        runs, size = windows.shape[:2]
        steps = windows.transpose(1, 2)  # (R, length + 1, B): a step's inputs lie together
        weight_in, weight_hidden, bias_in, bias_hidden, weight, bias = self.task.layout.split(
            params
        )
        one_hot = F.one_hot(steps[:, :-1].flatten(1), len(ALPHABET)).to(params.dtype)
        hidden = params.new_zeros(runs, size, self.task.hidden_size)
        drive = torch.baddbmm(bias_in.unsqueeze(1), one_hot, weight_in.transpose(1, 2))
        unroll = _gru if self.task.cell == "gru" else _tanh
        states = unroll(
            drive.unflatten(1, (-1, size)),
            hidden,
            weight_hidden.transpose(1, 2).contiguous(),
            bias_hidden.unsqueeze(1),
        )
        logits = torch.baddbmm(bias.unsqueeze(1), torch.cat(states, dim=1), weight.transpose(1, 2))
        return cross_entropies(logits, steps[:, 1:].flatten(1))


def _tanh(drive: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    """States ``(R, B, H)`` after each step of ``drive (R, T, B, H)``."""
    states = []
    for driven in (drive + bias.unsqueeze(1)).unbind(1):
        hidden = torch.tanh(torch.baddbmm(driven, hidden, weight))
        states.append(hidden)
    return states


def _gru(drive: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    """The same by ``nn.GRU``'s gates, in its order: reset, update, new."""
    width = hidden.shape[2]
    parts = (2 * width, width)
    gates, news = (part.unbind(1) for part in drive.split(parts, dim=3))
    states = []
    for gate, new in zip(gates, news, strict=True):
        gate_back, new_back = torch.baddbmm(bias, hidden, weight).split(parts, dim=2)
        reset, update = (gate + gate_back).sigmoid().chunk(2, dim=2)
        hidden = torch.lerp(torch.tanh(torch.addcmul(new, reset, new_back)), hidden, update)
        states.append(hidden)
    return states


class _Module(nn.Module):
    def __init__(self, cell: str, hidden_size: int) -> None:
        super().__init__()
        kind = nn.GRU if cell == "gru" else nn.RNN
        self.recurrent = kind(len(ALPHABET), hidden_size, batch_first=True)
        self.readout = nn.Linear(hidden_size, len(ALPHABET))

    def forward(self, places: Tensor) -> Tensor:
        one_hot = F.one_hot(places, len(ALPHABET)).to(self.readout.weight.dtype)
        logits: Tensor = self.readout(self.recurrent(one_hot)[0])
        return logits


class CharRNN(TextTask):
    """Cross-entropy of a recurrent network that predicts each next character of a text.

    One layer of ``nn.RNN`` or ``nn.GRU`` on one-hot characters, started at zero in every window,
    and a linear layer over the 29 characters. The text is generated (``draw_text``). Coordinates
    are laid out as the parameters of ``module()``, and start as torch's do.

    Args:
        cell: ``"tanh"`` or ``"gru"``.
        hidden_size: of the network.
        length, batch_size, language, split, fraction: see ``TextTask``.

    Example:
        >>> task = CharRNN(cell="gru", hidden_size=24)
        >>> task.dim
        4685
        >>> run = task.sample(2, torch.Generator().manual_seed(0))
        >>> run.loss_and_grad(run.params, run.next_batch())[1].shape
        torch.Size([2, 4685])
    """

    def __init__(
        self,
        cell: str = "tanh",
        hidden_size: int = 24,
        length: int = 16,
        batch_size: int = 16,
        language: int = 0,
        split: str = "meta_train",
        fraction: float = 0.5,
    ) -> None:
        check_choice("cell", cell, tuple(_GATES))
        check_number("hidden_size", hidden_size, minimum=1, integer=True)
        super().__init__(length, batch_size, language, split, fraction)
        self.cell, self.hidden_size = cell, hidden_size
        rows, bound = _GATES[cell] * hidden_size, 1 / math.sqrt(hidden_size)
        shapes: list[tuple[int, ...]] = [
            (rows, len(ALPHABET)),
            (rows, hidden_size),
            (rows,),
            (rows,),
        ]
        slots = [Slot(shape, bound) for shape in shapes]
        self.layout = Layout([*slots, *affine(len(ALPHABET), hidden_size)])

    @property
    def dim(self) -> int:
        """Number of coordinates of one run."""
        return self.layout.dim

    def config(self) -> dict[str, Any]:
        return {"cell": self.cell, "hidden_size": self.hidden_size, **super().config()}

    def module(self) -> nn.Module:
        """The network that one run trains: ``(B, T)`` places in the alphabet to logits."""
        return _Module(self.cell, self.hidden_size)

    def sample(
        self, num_runs: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> TaskRun:
        params = self.layout.draw(num_runs, generator, dtype)
        return _CharRNNRun(self, {"params": params}, fork_generator(generator))
