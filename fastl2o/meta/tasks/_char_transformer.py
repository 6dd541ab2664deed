"""Prediction of characters by a tiny transformer."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import check_number
from ._base import TaskRun, fork_generator
from ._layout import Layout, Slot, affine
from ._mlp import cross_entropies
from ._text import ALPHABET, TextRun, TextTask

__all__ = ["CharTransformer"]


class _CharTransformerRun(TextRun):
    task: CharTransformer

    @property
    def tensor_sizes(self) -> tuple[int, ...]:
        return self.task.layout.sizes

    def batched(self, params: Tensor, *inputs: Tensor) -> Tensor:
        (windows,) = inputs
        size, length = windows.shape[1], self.task.length
        pieces = self.task.layout.split(params)
        embedding, positions = pieces[:2]
        one_hot = F.one_hot(windows[:, :, :-1].flatten(1), len(ALPHABET)).to(params.dtype)
        tokens = one_hot.bmm(embedding).unflatten(1, (size, length)) + positions.unsqueeze(1)
        for layer in range(self.task.num_layers):
            tokens = self._layer(tokens, pieces[2 + 12 * layer : 14 + 12 * layer])
        *norm, weight, bias = pieces[-4:]
        logits = _linear(_norm(tokens, *norm), weight, bias)
        return cross_entropies(logits.flatten(1, 2), windows[:, :, 1:].flatten(1))

    def _layer(self, tokens: Tensor, pieces: list[Tensor]) -> Tensor:
        """One ``nn.TransformerEncoderLayer`` with ``norm_first``, on ``(R, B, T, E)``."""
        attention, feedforward, norms = pieces[:4], pieces[4:8], pieces[8:]
        tokens = tokens + self._attention(_norm(tokens, *norms[:2]), *attention)
        inner = F.gelu(_linear(_norm(tokens, *norms[2:]), *feedforward[:2]))
        return tokens + _linear(inner, *feedforward[2:])

    def _attention(
        self, tokens: Tensor, weight_in: Tensor, bias_in: Tensor, weight: Tensor, bias: Tensor
    ) -> Tensor:
        length, heads = tokens.shape[2], self.task.num_heads
        projected = _linear(tokens, weight_in, bias_in).unflatten(3, (3, heads, -1))
        query, key, value = projected.permute(3, 0, 1, 4, 2, 5)  # each (R, B, heads, T, E / heads)
        scores = query @ key.transpose(3, 4) / math.sqrt(query.shape[4])
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        shares = scores.masked_fill(future, -math.inf).softmax(dim=4)
        return _linear((shares @ value).transpose(2, 3).flatten(3), weight, bias)


def _linear(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``(R, B, T, in)`` to ``(R, B, T, out)`` by each run's own weight and bias."""
    flat = torch.baddbmm(bias.unsqueeze(1), inputs.flatten(1, 2), weight.transpose(1, 2))
    return flat.unflatten(1, inputs.shape[1:3])


def _norm(tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    each = (slice(None), None, None)
    return torch.addcmul(bias[each], weight[each], F.layer_norm(tokens, tokens.shape[3:]))


class _Module(nn.Module):
    def __init__(self, task: CharTransformer) -> None:
        super().__init__()
        bound = 1 / math.sqrt(task.width)
        self.embedding = nn.Embedding(len(ALPHABET), task.width)
        self.positions = nn.Embedding(task.length, task.width)
        for table in (self.embedding, self.positions):
            nn.init.uniform_(table.weight, -bound, bound)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                task.width,
                task.num_heads,
                task.feedforward,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(task.num_layers)
        )
        self.norm = nn.LayerNorm(task.width)
        self.readout = nn.Linear(task.width, len(ALPHABET))

    def forward(self, places: Tensor) -> Tensor:
        length = places.shape[1]
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        tokens = self.embedding(places) + self.positions.weight[:length]
        for layer in self.layers:
            tokens = layer(tokens, src_mask=future)
        logits: Tensor = self.readout(self.norm(tokens))
        return logits


class CharTransformer(TextTask):
    """Cross-entropy of a causal transformer that predicts each next character of a text.

    Learned embeddings of the 29 characters and of the places in a window, ``num_layers`` of
    ``nn.TransformerEncoderLayer`` (layer norm first, GELU, no dropout), a layer norm and a linear
    layer. The text is generated (``draw_text``). Coordinates are laid out as the parameters of
    ``module()`` and start as torch's do, but for the embeddings, U(-1, 1) / sqrt(width).

    Args:
        width: of the tokens; a multiple of ``num_heads``.
        num_heads, num_layers: of attention, and of the network.
        feedforward: width of the hidden layer in each layer.
        length, batch_size, language, split, fraction: see ``TextTask``.

    Example:
        >>> task = CharTransformer(num_layers=1)
        >>> task.dim
        3469
        >>> run = task.sample(2, torch.Generator().manual_seed(0))
        >>> run.loss_and_grad(run.params, run.next_batch())[1].shape
        torch.Size([2, 3469])
    """

    def __init__(
        self,
        width: int = 16,
        num_heads: int = 2,
        num_layers: int = 1,
        feedforward: int = 32,
        length: int = 16,
        batch_size: int = 8,
        language: int = 0,
        split: str = "meta_train",
        fraction: float = 0.5,
    ) -> None:
        numbers = {"width": width, "num_heads": num_heads, "num_layers": num_layers}
        for name, value in {**numbers, "feedforward": feedforward}.items():
            check_number(name, value, minimum=1, integer=True)
        if width % num_heads:
            raise ValueError(f"width must be a multiple of num_heads = {num_heads}, got {width}")
        super().__init__(length, batch_size, language, split, fraction)
        self.width, self.num_heads, self.num_layers = width, num_heads, num_layers
        self.feedforward = feedforward
        start, norm = 1 / math.sqrt(width), (Slot((width,), 0.0, 1.0), Slot((width,)))
        layer = [
            Slot((3 * width, width), math.sqrt(6 / (4 * width))),
            Slot((3 * width,)),
            Slot((width, width), start),
            Slot((width,)),
            *affine(feedforward, width),
            *affine(width, feedforward),
            *norm,
            *norm,
        ]
        embeddings = [Slot((len(ALPHABET), width), start), Slot((length, width), start)]
        readout = affine(len(ALPHABET), width)
        self.layout = Layout([*embeddings, *(layer * num_layers), *norm, *readout])

    @property
    def dim(self) -> int:
        """Number of coordinates of one run."""
        return self.layout.dim

    def config(self) -> dict[str, Any]:
        names = ("width", "num_heads", "num_layers", "feedforward")
        return {**{name: getattr(self, name) for name in names}, **super().config()}

    def module(self) -> nn.Module:
        """The network that one run trains: ``(B, T)`` places in the alphabet to logits."""
        return _Module(self)

    def sample(
        self, num_runs: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> TaskRun:
        params = self.layout.draw(num_runs, generator, dtype)
        return _CharTransformerRun(self, {"params": params}, fork_generator(generator))
