"""Maths of the hierarchical rule: its GRU and the features of a parameter's gradient."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ._base import Weights

if TYPE_CHECKING:
    from .hierarchical import HierarchicalRule

RMS_EPS = 1e-16
SQUARE_EPS = 1e-12
LOG_RATE_LIMIT = 33.0
# What larger gradients count as. Even over the root of RMS_EPS alone the square of an average is
# 1e38, which float32 holds; decays that round to 1 leave no more than that.
GRADIENT_LIMIT = 1e11


class GRUCell(nn.Module):
    """Weights of a GRU with a reset gate that acts before the product: `(2H, in + H)` for r and u.

    The candidate's are `(H, in + H)`. `torch.nn.GRU` resets after the product, so its weights do
    not carry over.
    """

    def __init__(self, in_features: int, hidden_size: int) -> None:
        super().__init__()
        self.gates = nn.Parameter(torch.empty(2 * hidden_size, in_features + hidden_size))
        self.gates_bias = nn.Parameter(torch.empty(2 * hidden_size))
        self.candidate = nn.Parameter(torch.empty(hidden_size, in_features + hidden_size))
        self.candidate_bias = nn.Parameter(torch.empty(hidden_size))


def gru(x: Tensor, h: Tensor, weights: Weights, name: str, injected: Tensor | None) -> Tensor:
    """New h `(H, N)` from inputs `(in, N)`, h `(H, N)` and an injected bias `(3H,)` for r, u, c.

    r = sigmoid(W_r [x, h] + b_r + J_r), u alike, c = tanh(W_c [x, r h] + b_c + J_c),
    h' = u h + (1 - u) c: u keeps the old state.
    """
    size = h.shape[0]
    gates_bias, candidate_bias = weights[f"{name}.gates_bias"], weights[f"{name}.candidate_bias"]
    if injected is not None:
        gates_bias = gates_bias + injected[: 2 * size]
        candidate_bias = candidate_bias + injected[2 * size :]
    gates = torch.sigmoid(weights[f"{name}.gates"] @ torch.cat((x, h)) + gates_bias[:, None])
    r, u = gates[:size], gates[size:]
    c = torch.tanh(weights[f"{name}.candidate"] @ torch.cat((x, r * h)) + candidate_bias[:, None])
    return u * h + (1 - u) * c


def affine(weights: Weights, name: str, x: Tensor) -> Tensor:
    """Linear map of a vector."""
    return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]


def asinh(x: Tensor) -> Tensor:
    """sign(x) log1p(a + a^2 / (1 + sqrt(1 + a^2))), a = |x|: no cancellation on either side."""
    a = x.abs()
    return x.sign() * torch.log1p(a + a * a / (1 + torch.sqrt(1 + a * a)))


def clip_log_rate(x: Tensor) -> Tensor:
    """Clip to +-33 with the gradient of the identity."""
    return x + (x.clamp(-LOG_RATE_LIMIT, LOG_RATE_LIMIT) - x).detach()


def decays(beta: Tensor, num_scales: int) -> Tensor:
    """beta^(0.5^s) for s = 0, 1, ..., `(num_scales, N)`, by successive square roots."""
    scales = [beta]
    for _ in range(num_scales - 1):
        scales.append(scales[-1].sqrt())
    return torch.stack(scales)


def features(
    gradient: Tensor,
    averages: Tensor,
    squares: Tensor,
    centred_log_rate: Tensor,
    betas: Tensor | float,
    beta_l: Tensor | float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """New averages and squares `(s, N)`, the scaled averages m `(s, N)` and the inputs `(3 s, N)`.

    The inputs with s = 4: m_0 .. m_3; m_0 m_1, m_1 m_2, m_2 m_3; four log squares minus their mean;
    the centred log rate.
    """
    gradient = gradient.clamp(-GRADIENT_LIMIT, GRADIENT_LIMIT)
    averages = betas * averages + (1 - betas) * gradient
    squares = beta_l * squares + (1 - beta_l) * (averages * averages + SQUARE_EPS)
    scaled = asinh(averages / torch.sqrt(squares + RMS_EPS))
    logs = torch.log(squares + RMS_EPS)
    inputs = torch.cat(
        (scaled, scaled[:-1] * scaled[1:], logs - logs.mean(dim=0), centred_log_rate[None])
    )
    return averages, squares, scaled, inputs


def initialise_(rule: HierarchicalRule, generator: torch.Generator | None) -> None:
    """The authors' initialisation; see `HierarchicalRule.reset_parameters`."""
    cells = (rule.param_gru, rule.tensor_gru, rule.global_gru)
    maps = (rule.tensor_to_param, rule.global_to_param, rule.global_to_tensor)
    weights = [w for cell in cells for w in (cell.gates, cell.candidate)]
    for weight in [*weights, *(affine.weight for affine in maps)]:
        weight.normal_(0.0, 0.5 / math.sqrt(weight.shape[1]), generator=generator)
    for cell in cells:
        cell.gates_bias.fill_(2.2)
        cell.candidate_bias.zero_()
    for affine in maps:
        affine.bias.zero_()
    for start in (rule.param_start, rule.tensor_start, rule.global_start):
        start.uniform_(-1.0, 1.0, generator=generator)
    for readout in (rule.direction, rule.square_decay, rule.average_decay):
        readout.normal_(0.0, 0.5 / math.sqrt(rule.param_size), generator=generator)
    rule.shortcut.normal_(1 / rule.num_scales, 0.05, generator=generator)
    if rule.attention:
        rule.attention_direction.copy_(rule.direction)
        rule.attention_shortcut.copy_(rule.shortcut)
    rule.rate.zero_()
    rule.rate_bias.zero_()
    rule.square_decay_bias.fill_(3.2)
    rule.average_decay_bias.fill_(2.2)
    rule.rate_momentum.fill_(3.2)
    rule.log_rate_offset.fill_(-1.0)
