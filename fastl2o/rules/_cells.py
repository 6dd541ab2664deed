"""Cell maths shared by the coordinate-wise rules, forward and hand-derived backward.

Everything is plain torch and works on planes: a tensor of features is `(features, N)` with one
column per coordinate, so weights multiply from the left and no transpose is needed. Gate order is
i, f, g, o; in code the candidate is `cand`, so that "gradient" always means the optimizee's
gradient. Source of the equations: arXiv 1606.04474 (rule), arXiv 1703.03633 (RNNprop).

LSTM cell, with W `(4H, in)`, U `(4H, H)`, b `(4H,)`:

    [a_i a_f a_g a_o] = W x + U h + b
    c' = sigmoid(a_f) c + sigmoid(a_i) tanh(a_g)        h' = sigmoid(a_o) tanh(c')

Backward, given dh' and dc' (the upstream gradients of both outputs), with i, f, o the gates after
the sigmoid:

    dc    = dc' + dh' o (1 - tanh(c')^2)
    da_i  = dc cand i (1 - i)              da_f = dc c f (1 - f)
    da_g  = dc i (1 - cand^2)              da_o = dh' tanh(c') o (1 - o)
    dx    = W^T da      dh = U^T da        dc_prev = dc f
    dW    = da x^T      dU = da h^T        db = sum over coordinates of da
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class CellTape(NamedTuple):
    """What one LSTM cell computed, every entry `(H, N)` except `x`, which is `(in, N)`."""

    x: Tensor
    h: Tensor
    c: Tensor
    i: Tensor
    f: Tensor
    cand: Tensor
    o: Tensor
    c_next: Tensor
    tanh_c: Tensor

    @property
    def h_next(self) -> Tensor:
        """The cell's output h' = o * tanh(c')."""
        return self.o * self.tanh_c


def lstm_cell(
    x: Tensor, h: Tensor, c: Tensor, weights: Mapping[str, Tensor], layer: int
) -> CellTape:
    """Run layer number `layer` of `weights` on inputs x `(in, N)` and state h, c `(H, N)`."""
    gates = torch.addmm(
        weights[f"layers.{layer}.bias"].unsqueeze(1), weights[f"layers.{layer}.weight_ih"], x
    )
    gates = torch.addmm(gates, weights[f"layers.{layer}.weight_hh"], h)  # (4H, N)
    a_i, a_f, a_g, a_o = gates.chunk(4, dim=0)
    i, f, cand, o = a_i.sigmoid(), a_f.sigmoid(), a_g.tanh(), a_o.sigmoid()
    c_next = f * c + i * cand
    return CellTape(x, h, c, i, f, cand, o, c_next, c_next.tanh())


class CellGradients(NamedTuple):
    """Gradients of one LSTM cell's inputs and meta-parameters, shaped like what they belong to."""

    x: Tensor
    h: Tensor
    c: Tensor
    weight_ih: Tensor
    weight_hh: Tensor
    bias: Tensor


def lstm_cell_backward(
    d_h_next: Tensor, d_c_next: Tensor, tape: CellTape, weights: Mapping[str, Tensor], layer: int
) -> CellGradients:
    """Differentiate `lstm_cell`; the derivation is in this module's docstring."""
    x, h, c, i, f, cand, o, _, tanh_c = tape
    d_c = d_c_next + d_h_next * o * (1 - tanh_c * tanh_c)
    d_gates = torch.cat(
        (
            d_c * cand * i * (1 - i),
            d_c * c * f * (1 - f),
            d_c * i * (1 - cand * cand),
            d_h_next * tanh_c * o * (1 - o),
        )
    )  # (4H, N)
    return CellGradients(
        x=weights[f"layers.{layer}.weight_ih"].T @ d_gates,
        h=weights[f"layers.{layer}.weight_hh"].T @ d_gates,
        c=d_c * f,
        weight_ih=d_gates @ x.T,
        weight_hh=d_gates @ h.T,
        bias=d_gates.sum(dim=1),
    )


def lstm_stack(
    x: Tensor, planes: Tensor, weights: Mapping[str, Tensor], num_layers: int
) -> tuple[Tensor, list[CellTape]]:
    """Run all layers on planes h1, c1, h2, c2, ... `(2 * num_layers * H, N)`: top output, tapes."""
    tapes: list[CellTape] = []
    for layer, (h, c) in enumerate(_layer_states(planes, num_layers)):
        tape = lstm_cell(x, h, c, weights, layer)
        tapes.append(tape)
        x = tape.h_next
    return x, tapes


def stack_planes(tapes: list[CellTape], like: Tensor) -> Tensor:
    """The new planes of a stack, `(2 * num_layers * H, N)`; a copy of `like` without layers."""
    if not tapes:
        return like.clone()  # an operator may not return its own input
    return torch.cat([plane for tape in tapes for plane in (tape.h_next, tape.c_next)])


def lstm_stack_backward(
    d_top: Tensor, d_planes: Tensor, tapes: list[CellTape], weights: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Differentiate `lstm_stack`: gradients of x, of the planes, and of the weights by name."""
    d_states: list[Tensor] = []
    d_weights: dict[str, Tensor] = {}
    incoming = _layer_states(d_planes, len(tapes))
    for layer in reversed(range(len(tapes))):
        d_h, d_c = incoming[layer]
        gradients = lstm_cell_backward(d_top + d_h, d_c, tapes[layer], weights, layer)
        d_top = gradients.x
        d_states[:0] = (gradients.h, gradients.c)
        d_weights[f"layers.{layer}.weight_ih"] = gradients.weight_ih
        d_weights[f"layers.{layer}.weight_hh"] = gradients.weight_hh
        d_weights[f"layers.{layer}.bias"] = gradients.bias
    return d_top, (torch.cat(d_states) if d_states else torch.zeros_like(d_planes)), d_weights


def _layer_states(planes: Tensor, num_layers: int) -> list[tuple[Tensor, Tensor]]:
    if num_layers == 0:
        return []
    parts = planes.chunk(2 * num_layers, dim=0)
    return list(zip(parts[0::2], parts[1::2], strict=True))


def log_sign_features(grad: Tensor, p: float, eps: float) -> Tensor:
    """The two preprocessed inputs `(2, N)` of gradients `(N,)`.

    x1 = max(log(|g| + eps) / p, -1), x2 = clip(e^p g, -1, 1): all published variants are this one
    function (paper, appendix A: p = 10, eps = 0; DeepMind's code: p = 5, eps = 2^-23). NaN
    gradients stay NaN.

    Example:
        >>> log_sign_features(torch.tensor([0.0, 1.0, -1.0]), 10.0, 0.0).tolist()
        [[-1.0, 0.0, 0.0], [0.0, 1.0, -1.0]]
    """
    # The smallest normal number in place of 0 keeps autograd's 0 * (1 / 0) away; its log / p is
    # below -1 for p <= 80.
    magnitude = (grad.abs() + eps).clamp(min=torch.finfo(grad.dtype).tiny)
    return torch.stack(
        ((magnitude.log() / p).clamp(min=-1.0), (math.exp(p) * grad).clamp(-1.0, 1.0))
    )


def log_sign_features_backward(d_features: Tensor, grad: Tensor, p: float, eps: float) -> Tensor:
    """Differentiate `log_sign_features`.

    dx1/dg = sign(g) / (p (|g| + eps)) where x1 > -1, dx2/dg = e^p where |x2| < 1, else 0.
    """
    magnitude = (grad.abs() + eps).clamp(min=torch.finfo(grad.dtype).tiny)
    log_part = torch.where(magnitude.log() / p >= -1.0, grad.sign() / (p * magnitude), 0.0)
    linear_part = ((math.exp(p) * grad).abs() <= 1.0).to(grad.dtype) * math.exp(p)
    return d_features[0] * log_part + d_features[1] * linear_part


def readout(top: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """The linear output `(N,)` of the top features `(H, N)`."""
    return torch.addmm(
        weights["readout.bias"].unsqueeze(1), weights["readout.weight"], top
    ).squeeze(0)


def readout_backward(
    d_output: Tensor, top: Tensor, weights: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Differentiate `readout`: gradients of the top features and of the weights by name."""
    d_weights = {
        "readout.weight": d_output.unsqueeze(0) @ top.T,
        "readout.bias": d_output.sum().reshape(1),
    }
    return weights["readout.weight"].T * d_output, d_weights
