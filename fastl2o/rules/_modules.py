"""Weights that rules are built from, and how they are drawn."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ._base import LARGEST, check_number


class Affine(nn.Module):
    """Weight `(out, in)` and bias `(out,)` of a linear map; the rule draws them."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features))


class LSTMLayer(nn.Module):
    """Weights of one LSTM cell: `(4H, in)`, `(4H, H)` and bias `(4H,)`, gates in order i, f, g, o.

    There is no implicit forget bias: what is stored is all there is.
    """

    def __init__(self, in_features: int, hidden_size: int) -> None:
        super().__init__()
        self.weight_ih = nn.Parameter(torch.empty(4 * hidden_size, in_features))
        self.weight_hh = nn.Parameter(torch.empty(4 * hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.empty(4 * hidden_size))


def saturate_gates(layer: LSTMLayer, forget_bias: float) -> None:
    """Turn a layer into h' = tanh(c'), c' = sigmoid(forget_bias) c + tanh(0), with every weight 0.

    Input and output gates get bias 40: 1 - sigmoid(40) = 4e-18 is below float64's roundoff.
    """
    for parameter in layer.parameters():
        parameter.zero_()
    b_i, b_f, _, b_o = layer.bias.chunk(4)
    b_i.fill_(40.0)
    b_o.fill_(40.0)
    b_f.fill_(forget_bias)


def draw_timescales_(
    layer: LSTMLayer, low: float, high: float, generator: torch.Generator | None
) -> None:
    """Let half of the layer's units forget over T steps, T log-uniform in [low, high].

    Their forget gates start at 1 - 1/T and their input gates at 1/T, by biases alone.
    """
    b_i, b_f, _, _ = layer.bias.chunk(4)
    units = len(b_i) // 2
    biases = long_memories(units, low, high, generator).to(b_f)
    b_f[:units] = biases
    b_i[:units] = -biases


def check_timescales(low: object, high: object) -> tuple[float, float]:
    """Return two numbers of steps with 1 < low <= high, else raise naming the argument."""
    shortest = check_number("low", low, "above 1", math.nextafter(1.0, 2.0), LARGEST)
    accepted = f"that is finite and at least low = {shortest}"
    return shortest, check_number("high", high, accepted, shortest, LARGEST)


def long_memories(units: int, low: float, high: float, generator: torch.Generator | None) -> Tensor:
    """Biases `(units,)`, float64, at which gates keep 1 - 1/T, T log-uniform in [low, high]."""
    drawn = torch.rand(units, generator=generator, dtype=torch.float64)
    return torch.log(low * (high / low) ** drawn - 1)


def truncated_normal_(tensor: Tensor, sd: float, generator: torch.Generator | None) -> None:
    """Normal, sd as given before truncation at two of them, as TensorFlow's initialiser."""
    nn.init.trunc_normal_(tensor, std=sd, a=-2 * sd, b=2 * sd, generator=generator)
