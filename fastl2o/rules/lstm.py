"""The coordinate-wise LSTM rule (arXiv 1606.04474, "Learning to learn by gradient descent ...")."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import _cells
from ._base import LARGEST, Weights, check_integer, check_number
from ._coordinate import CoordinateRule
from ._modules import Affine, LSTMLayer, saturate_gates, truncated_normal_

PREPROCESS = ("identity", "log_sign")


class LSTMRule(CoordinateRule):
    """A stack of LSTM layers and a linear readout, shared by all coordinates.

    u = output_scale * (readout(LSTM(...LSTM(features(g)))) ), and u is added to the parameter. The
    features are the raw gradient (`preprocess="identity"`, one input) or, with `"log_sign"`, the
    two inputs

        x1 = max(log(|g| + eps) / p, -1)          x2 = clip(e^p g, -1, 1).

    State planes: h1, c1, h2, c2, ..., `hidden_size` planes each. Flat meta-parameters: for each
    layer weight_ih, weight_hh, bias, then readout.weight, readout.bias. The default has 5,141
    meta-parameters and 80 planes.

    Args:
        hidden_size: width H of every layer, 1 to 64.
        num_layers: 0 to 3; with 0 the readout acts on the features and there is no state.
        preprocess: "log_sign" or "identity".
        p: constant of the preprocessing, from 1e-6 to 80 (e^p must fit float32). Paper: 10;
            DeepMind's code: 5.
        eps: constant of the preprocessing, at least 0. Paper: 0; DeepMind's code: 2^-23.
        output_scale: factor on the readout. DeepMind's code: 0.01 on MNIST, 1 on quadratics;
            reproductions: 0.1.

    Raises:
        ValueError, TypeError: an argument is outside what is listed here.

    Example:
        >>> rule = LSTMRule(hidden_size=20, num_layers=2)
        >>> rule.num_meta_parameters, rule.state_planes
        (5141, 80)
        >>> grad = torch.tensor([0.5, -0.5])
        >>> update, state = rule.reference_step(grad, rule.init_state(grad))
        >>> update.shape, state.shape
        (torch.Size([2]), torch.Size([80, 2]))
    """

    family: ClassVar[str] = "lstm"

    def __init__(
        self,
        hidden_size: int = 20,
        num_layers: int = 2,
        preprocess: str = "log_sign",
        p: float = 10.0,
        eps: float = 0.0,
        output_scale: float = 0.1,
    ) -> None:
        super().__init__()
        self.hidden_size = check_integer("hidden_size", hidden_size, 1, 64)
        self.num_layers = check_integer("num_layers", num_layers, 0, 3)
        if preprocess not in PREPROCESS:
            raise ValueError(
                f"Invalid preprocess: {preprocess!r}; pass one of "
                f"{', '.join(map(repr, PREPROCESS))}"
            )
        self.preprocess = preprocess
        self.p = check_number("p", p, "from 1e-6 to 80, so that e^p fits float32", 1e-6, 80.0)
        self.eps = check_number("eps", eps, "of at least 0", 0.0, LARGEST)
        self.output_scale = check_number(
            "output_scale", output_scale, "that is finite in float32", -LARGEST, LARGEST
        )
        widths = [2 if preprocess == "log_sign" else 1] + [hidden_size] * num_layers
        self.layers = nn.ModuleList(LSTMLayer(width, hidden_size) for width in widths[:-1])
        self.readout = Affine(widths[-1], 1)
        self.reset_parameters()

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        names = ("hidden_size", "num_layers", "preprocess", "p", "eps", "output_scale")
        return {name: getattr(self, name) for name in names}

    @property
    def state_planes(self) -> int:
        """Number of state numbers per coordinate, 2 * num_layers * hidden_size."""
        return 2 * self.num_layers * self.hidden_size

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Sonnet's initialisation, as in DeepMind's code.

        Gate weights and biases: truncated normal, sd 1/sqrt(in + H), and 1 is added to the forget
        bias, which Sonnet keeps implicit. Readout: truncated normal weight, sd 1/sqrt(in), bias 0.
        """
        for layer in self.layers:
            assert isinstance(layer, LSTMLayer)
            sd = 1.0 / math.sqrt(layer.weight_ih.shape[1] + self.hidden_size)
            for parameter in layer.parameters():
                truncated_normal_(parameter, sd, generator)
            layer.bias.chunk(4)[1].add_(1.0)
        truncated_normal_(
            self.readout.weight, 1.0 / math.sqrt(self.readout.weight.shape[1]), generator
        )
        self.readout.bias.zero_()

    def _features(self, grad: Tensor) -> Tensor:
        if self.preprocess == "identity":
            return grad.unsqueeze(0)
        return _cells.log_sign_features(grad, self.p, self.eps)

    def _forward(
        self, grad: Tensor, planes: Tensor, step: int | Tensor, weights: Weights
    ) -> tuple[Tensor, Tensor]:
        top, tapes = _cells.lstm_stack(self._features(grad), planes, weights, self.num_layers)
        return self.output_scale * _cells.readout(top, weights), _cells.stack_planes(tapes, planes)

    def _backward(
        self,
        d_update: Tensor,
        d_new_planes: Tensor,
        grad: Tensor,
        planes: Tensor,
        step: int | Tensor,
        weights: Weights,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        top, tapes = _cells.lstm_stack(self._features(grad), planes, weights, self.num_layers)
        d_top, d_readout = _cells.readout_backward(self.output_scale * d_update, top, weights)
        d_features, d_planes, d_layers = _cells.lstm_stack_backward(
            d_top, d_new_planes, tapes, weights
        )
        if self.preprocess == "identity":
            d_grad = d_features.squeeze(0)
        else:
            d_grad = _cells.log_sign_features_backward(d_features, grad, self.p, self.eps)
        return d_grad, d_planes, d_layers | d_readout

    @classmethod
    def as_sgd(
        cls,
        lr: float,
        momentum: float = 0.0,
        epsilon: float = 1e-4,
        *,
        hidden_size: int = 20,
        num_layers: int = 2,
        dtype: torch.dtype = torch.float32,
    ) -> LSTMRule:
        """A rule that is `torch.optim.SGD(lr, momentum)`: an optimizer known to work, for tests.

        LSTM outputs are bounded, so with layers the equality is a limit: every tanh works in its
        linear part, on gradients multiplied by `epsilon`, with relative error 2/3 * num_layers *
        (epsilon * |momentum buffer|)^2. The first layer's forget gate holds the momentum. With
        `num_layers=0` the rule is u = -lr * g exactly.

        Args:
            lr: learning rate.
            momentum: 0 <= momentum < 1; must be 0 when `num_layers` is 0.
            epsilon: how far into the linear part to go; 1e-4 suits float32, 1e-6 float64.
            hidden_size, num_layers: of the rule.
            dtype: of the meta-parameters.

        Example:
            >>> rule = LSTMRule.as_sgd(0.5, num_layers=0)
            >>> grad = torch.tensor([2.0])
            >>> rule.reference_step(grad, rule.init_state(grad))[0].tolist()
            [-1.0]
        """
        momentum = check_number(
            "momentum", momentum, "of at least 0 and below 1", 0.0, math.nextafter(1.0, 0.0)
        )
        if num_layers == 0 and momentum != 0.0:
            raise ValueError(
                f"Invalid momentum: {momentum}; a rule without layers has no memory, pass 0"
            )
        rule = cls(hidden_size, num_layers, preprocess="identity", output_scale=1.0)
        rule.to(dtype)
        with torch.no_grad():
            for number, layer in enumerate(rule.layers):
                assert isinstance(layer, LSTMLayer)
                remember = number == 0 and momentum != 0.0
                saturate_gates(layer, math.log(momentum / (1.0 - momentum)) if remember else -40.0)
                layer.weight_ih[2 * hidden_size, 0] = (
                    epsilon if number == 0 else 1.0
                )  # candidate of unit 0
            rule.readout.weight.zero_()
            rule.readout.weight[0, 0] = -lr / epsilon if num_layers else -lr
            rule.readout.bias.zero_()
        return rule
