"""The RNNprop rule (arXiv 1703.03633, "Learning Gradient Descent: Better Generalization ...")."""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import _cells
from ._base import LARGEST, SMALLEST, Weights, check_integer, check_number
from ._coordinate import CoordinateRule
from ._modules import Affine, LSTMLayer, saturate_gates, truncated_normal_

_BELOW_ONE = math.nextafter(1.0, 0.0)
# Added outside the square root, as in the authors' code (nn_opt/rnn.py).
RMS_EPS = 1e-8


class _Moments(NamedTuple):
    """What a step computes from the gradient first; `(N,)` but for the two corrections."""

    m: Tensor
    v: Tensor
    root: Tensor  # sqrt(v / correction2), 0 where v is 0
    rms: Tensor  # root + 1e-8
    g_tilde: Tensor
    m_tilde: Tensor
    correction1: float | Tensor
    correction2: float | Tensor


class RNNPropRule(CoordinateRule):
    """Adam-like normalised inputs, a projection, LSTM layers and a bounded readout.

    With t = 1, 2, ... the number of this step:

        m = beta1 m + (1 - beta1) g              v = beta2 v + (1 - beta2) g^2
        r = sqrt(v / (1 - beta2^t)) + 1e-8       g~ = g / r       m~ = (m / (1 - beta1^t)) / r
        z = ELU(P [g~, m~] + p)                  h1, c1 = LSTM(z)     h2, c2 = LSTM(h1) ...
        u = -step_size * tanh(q . h + q0)

    State planes: m, v, then h1, c1, h2, c2, ..., `hidden_size` planes each. Flat meta-parameters:
    projection.weight, projection.bias, for each layer weight_ih, weight_hh, bias, then
    readout.weight, readout.bias. The default has 6,641 meta-parameters and 82 planes.

    Args:
        hidden_size: width of the projection and of every layer, 1 to 64.
        num_layers: 1 to 3.
        beta1, beta2: decay rates of m and v, at least 0 and below 1. Paper: 0.95 both.
        step_size: largest step per coordinate, above 0. Paper: 0.1.

    Raises:
        ValueError, TypeError: an argument is outside what is listed here.

    Example:
        >>> rule = RNNPropRule()
        >>> rule.num_meta_parameters, rule.state_planes
        (6641, 82)
        >>> grad = torch.tensor([0.5, -0.5])
        >>> update, state = rule.reference_step(grad, rule.init_state(grad), step=0)
        >>> bool((update.abs() <= rule.step_size).all())
        True
    """

    family: ClassVar[str] = "rnnprop"
    needs_step: ClassVar[bool] = True

    def __init__(
        self,
        hidden_size: int = 20,
        num_layers: int = 2,
        beta1: float = 0.95,
        beta2: float = 0.95,
        step_size: float = 0.1,
    ) -> None:
        super().__init__()
        self.hidden_size = check_integer("hidden_size", hidden_size, 1, 64)
        self.num_layers = check_integer("num_layers", num_layers, 1, 3)
        self.beta1 = check_number("beta1", beta1, "of at least 0 and below 1", 0.0, _BELOW_ONE)
        self.beta2 = check_number("beta2", beta2, "of at least 0 and below 1", 0.0, _BELOW_ONE)
        self.step_size = check_number("step_size", step_size, "above 0", SMALLEST, LARGEST)
        self.projection = Affine(2, hidden_size)
        self.layers = nn.ModuleList(LSTMLayer(hidden_size, hidden_size) for _ in range(num_layers))
        self.readout = Affine(hidden_size, 1)
        self.reset_parameters()

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        names = ("hidden_size", "num_layers", "beta1", "beta2", "step_size")
        return {name: getattr(self, name) for name in names}

    @property
    def state_planes(self) -> int:
        """Number of state numbers per coordinate, 2 + 2 * num_layers * hidden_size."""
        return 2 + 2 * self.num_layers * self.hidden_size

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """The authors' initialisation.

        Projection and readout: truncated normal weights of sd 0.1, biases 0. LSTM layers:
        TensorFlow 0.12's defaults, that is weights uniform within sqrt(3 / (in + H)) and biases 0,
        with 1 on the forget gate.
        """
        for affine in (self.projection, self.readout):
            truncated_normal_(affine.weight, 0.1, generator)
            affine.bias.zero_()
        for layer in self.layers:
            assert isinstance(layer, LSTMLayer)
            bound = math.sqrt(3.0 / (layer.weight_ih.shape[1] + self.hidden_size))
            layer.weight_ih.uniform_(-bound, bound, generator=generator)
            layer.weight_hh.uniform_(-bound, bound, generator=generator)
            layer.bias.zero_()
            layer.bias.chunk(4)[1].fill_(1.0)

    def _moments(self, grad: Tensor, planes: Tensor, step: int | Tensor) -> _Moments:
        m = self.beta1 * planes[0] + (1 - self.beta1) * grad
        v = self.beta2 * planes[1] + (1 - self.beta2) * grad * grad
        correction1 = _bias_correction(self.beta1, step, grad)
        correction2 = _bias_correction(self.beta2, step, grad)
        mean_square = v / correction2
        # sqrt'(0) counts as 0: both of its factors g and m are 0 there, and autograd's 0 * inf
        # would be NaN.
        zero = mean_square == 0
        root = torch.where(zero, 0.0, torch.where(zero, 1.0, mean_square).sqrt())
        rms = root + RMS_EPS
        return _Moments(
            m, v, root, rms, grad / rms, m / correction1 / rms, correction1, correction2
        )

    def _project(self, moments: _Moments, weights: Weights) -> tuple[Tensor, Tensor]:
        inputs = torch.stack((moments.g_tilde, moments.m_tilde))  # (2, N)
        affine = torch.addmm(
            weights["projection.bias"].unsqueeze(1), weights["projection.weight"], inputs
        )
        return inputs, functional.elu(affine)

    def _forward(
        self, grad: Tensor, planes: Tensor, step: int | Tensor, weights: Weights
    ) -> tuple[Tensor, Tensor]:
        moments = self._moments(grad, planes, step)
        _, z = self._project(moments, weights)
        top, tapes = _cells.lstm_stack(z, planes[2:], weights, self.num_layers)
        update = -self.step_size * _cells.readout(top, weights).tanh()
        first = torch.stack((moments.m, moments.v))
        return update, torch.cat((first, _cells.stack_planes(tapes, planes[2:])))

    def _backward(
        self,
        d_update: Tensor,
        d_new_planes: Tensor,
        grad: Tensor,
        planes: Tensor,
        step: int | Tensor,
        weights: Weights,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The chain of `_forward` backwards.

        With y = P [g~, m~] + p: dy = dz * (1 where y > 0, else e^y = z + 1). Then, with r = root +
        1e-8 and root = sqrt(v / correction2):

            dr  = -(dg~ g~ + dm~ m~) / r
            dv += dr / (2 root correction2)          dm += dm~ / (correction1 r)
            dg  = dg~ / r + (1 - beta1) dm + 2 (1 - beta2) g dv
        """
        moments = self._moments(grad, planes, step)
        inputs, z = self._project(moments, weights)
        top, tapes = _cells.lstm_stack(z, planes[2:], weights, self.num_layers)
        bounded = _cells.readout(top, weights).tanh()
        d_output = -self.step_size * d_update * (1 - bounded * bounded)
        d_top, d_readout = _cells.readout_backward(d_output, top, weights)
        d_z, d_lstm_planes, d_layers = _cells.lstm_stack_backward(
            d_top, d_new_planes[2:], tapes, weights
        )

        d_affine = d_z * torch.where(z > 0, 1.0, z + 1.0)
        d_projection = {
            "projection.weight": d_affine @ inputs.T,
            "projection.bias": d_affine.sum(dim=1),
        }
        d_g_tilde, d_m_tilde = weights["projection.weight"].T @ d_affine
        d_rms = -(d_g_tilde * moments.g_tilde + d_m_tilde * moments.m_tilde) / moments.rms
        safe_root = torch.where(moments.root == 0, 1.0, moments.root)
        d_root_square = torch.where(moments.root == 0, 0.0, d_rms / (2 * safe_root))
        d_v = d_new_planes[1] + d_root_square / moments.correction2
        d_m = d_new_planes[0] + d_m_tilde / moments.correction1 / moments.rms
        d_grad = (
            d_g_tilde / moments.rms + (1 - self.beta1) * d_m + 2 * (1 - self.beta2) * grad * d_v
        )
        d_moments = torch.stack((self.beta1 * d_m, self.beta2 * d_v))
        return d_grad, torch.cat((d_moments, d_lstm_planes)), d_projection | d_layers | d_readout

    @classmethod
    def as_adam(
        cls,
        lr: float,
        beta: float = 0.95,
        epsilon: float = 1e-4,
        *,
        hidden_size: int = 20,
        num_layers: int = 2,
        dtype: torch.dtype = torch.float32,
    ) -> RNNPropRule:
        """A rule that is `torch.optim.Adam(lr, betas=(beta, beta))`: for tests.

        The network reads only m~ and every tanh works in its linear part, on m~ times `epsilon`;
        the relative error is (2 * num_layers + 1) / 3 * epsilon^2. Equal betas bound |m~| by 1, so
        a shift of 2 * epsilon keeps the ELU in its linear part; the first layer's candidate bias
        takes the shift out again.

        Example:
            >>> rule = RNNPropRule.as_adam(0.5)
            >>> grad = torch.tensor([3.0])
            >>> round(rule.reference_step(grad, rule.init_state(grad))[0].item(), 6)
            -0.5
        """
        rule = cls(hidden_size, num_layers, beta1=beta, beta2=beta, step_size=lr / epsilon)
        rule.to(dtype)
        with torch.no_grad():
            rule.projection.weight.zero_()
            rule.projection.bias.zero_()
            rule.projection.weight[0, 1] = epsilon
            rule.projection.bias[0] = 2 * epsilon
            for number, layer in enumerate(rule.layers):
                assert isinstance(layer, LSTMLayer)
                saturate_gates(layer, -40.0)
                layer.weight_ih[2 * hidden_size, 0] = 1.0  # candidate of unit 0
                if number == 0:
                    layer.bias[2 * hidden_size] = -2 * epsilon
            rule.readout.weight.zero_()
            rule.readout.weight[0, 0] = 1.0
            rule.readout.bias.zero_()
        return rule


def _bias_correction(beta: float, step: int | Tensor, like: Tensor) -> float | Tensor:
    """1 - beta^t for t = step + 1, without the cancellation of computing beta^t first."""
    if beta == 0.0:
        return 1.0
    if isinstance(step, Tensor):
        exponent = (step.to(device=like.device, dtype=torch.float64) + 1) * math.log(beta)
        return -torch.expm1(exponent).to(like.dtype)
    return -math.expm1((step + 1) * math.log(beta))
