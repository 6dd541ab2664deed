"""Rule: the learned optimizer itself, an architecture with its meta-parameters."""

from __future__ import annotations

import abc
import os
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

Weights = Mapping[str, Tensor]
# Kernels hold config numbers in float32.
SMALLEST, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


class Rule(nn.Module, abc.ABC):
    """Base of all rules: a shared network that turns each coordinate's gradient into its update.

    A rule holds meta-parameters and defines, in plain torch, what is computed; `fastl2o.ops`
    decides how. The update u of a step is **added**: theta' = (1 - lr * weight_decay) * theta + lr
    * u.

    Attributes:
        family: name of the architecture, as written in rule files.
        needs_step: whether the rule needs the number of steps already taken (for bias correction).
        card: what is known about the meta-parameters (how trained, on what); filled by
            `fastl2o.load`.

    Subclasses give `config`, `state_planes`, `reset_parameters`, and the maths on flat coordinates:
    `_forward` and `_backward`.
    """

    family: ClassVar[str]
    needs_step: ClassVar[bool] = False
    card: dict[str, Any]

    def __init__(self) -> None:
        super().__init__()
        self.card = {}
        self._layout: tuple[tuple[str, torch.Size], ...] = ()
        self._tables: list[dict[str, Any]] | None = None
        self._flat: tuple[Tensor, list[Tensor]] | None = None

    # What a family defines
    # ------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as numbers and strings that JSON can hold."""

    @property
    @abc.abstractmethod
    def state_planes(self) -> int:
        """Number S of state numbers per coordinate."""

    @abc.abstractmethod
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh meta-parameters from the family's published initialisation."""

    @abc.abstractmethod
    def _forward(
        self, grad: Tensor, planes: Tensor, step: int | Tensor, weights: Weights
    ) -> tuple[Tensor, Tensor]:
        """Update `(N,)` and new planes `(S, N)`, all inputs `(N,)`, `(S, N)` of one dtype."""

    @abc.abstractmethod
    def _backward(
        self,
        d_update: Tensor,
        d_new_planes: Tensor,
        grad: Tensor,
        planes: Tensor,
        step: int | Tensor,
        weights: Weights,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Hand-derived gradients of `_forward`: of grad, of planes, of the weights by name."""

    # Meta-parameters as one vector
    # ----------------------------------------------------------------------------------

    @property
    def layout(self) -> tuple[tuple[str, torch.Size], ...]:
        """Names and shapes of the meta-parameters in the order of the flat vector."""
        if not self._layout:
            self._layout = tuple(
                (name, parameter.shape) for name, parameter in self.named_parameters()
            )
        return self._layout

    @property
    def num_meta_parameters(self) -> int:
        """Length M of the flat vector of meta-parameters."""
        return sum(shape.numel() for _, shape in self.layout)

    def flat_parameters(self) -> Tensor:
        """All meta-parameters as one vector `(M,)`, differentiable, in the order of `layout`."""
        return torch.cat([parameter.reshape(-1) for parameter in self.parameters()])

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """Split a flat vector `(M,)` into views named and shaped like the meta-parameters.

        Raises:
            ValueError: `flat` is not one-dimensional with `num_meta_parameters` elements.
        """
        if flat.shape != (self.num_meta_parameters,):
            raise ValueError(
                f"flat: expected shape ({self.num_meta_parameters},) for {self!r}, got "
                f"{tuple(flat.shape)}; pass a vector laid out as flat_parameters() of a rule with "
                "the same config"
            )
        parts = flat.split([shape.numel() for _, shape in self.layout])
        return {
            name: part.view(shape) for (name, shape), part in zip(self.layout, parts, strict=True)
        }

    def flat_buffer(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """The flat vector `(M,)`, detached, in a buffer of this rule that each call refills.

        Refilling costs a few microseconds and allocates nothing after the first call; it is done
        each time because writes through `parameter.data` leave no trace in a version counter, and a
        stale copy would be a silent error.
        """
        if self._tables is None:
            self._tables = [module._parameters for module in self.modules() if module._parameters]
        if self._flat is None or self._flat[0].device != device or self._flat[0].dtype != dtype:
            flat = torch.empty(self.num_meta_parameters, dtype=dtype, device=device)
            self._flat = (flat, list(self.unflatten(flat).values()))
        buffer, views = self._flat
        # Entering no_grad a second time costs as much as a quarter of the copy.
        with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
            torch._foreach_copy_(
                views, [parameter for table in self._tables for parameter in table.values()]
            )
        return buffer

    # The specification
    # ----------------------------------------------------------------------------------------------

    def init_state(self, param: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Zero state `(S, *param.shape)` of `dtype` on the parameter's device."""
        return torch.zeros((self.state_planes, *param.shape), dtype=dtype, device=param.device)

    def reference_step(
        self, grad: Tensor, state: Tensor, step: int | Tensor = 0, meta: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One step in plain torch: the specification that every kernel is tested against.

        Differentiable in `grad`, `state` and the meta-parameters; nothing is detached here.

        Args:
            grad: gradients, any shape and floating dtype.
            state: `(S, *grad.shape)`. Its dtype decides the dtype of the maths: float64 for
                float64, else float32.
            step: number of steps already taken, an int or a 0-dim tensor.
            meta: flat meta-parameters `(M,)` to use in place of the rule's own.

        Returns:
            The update, shaped like `grad`, in the dtype of the maths, and the new state, shaped and
            typed like `state`.

        Raises:
            ValueError: `state` or `meta` has the wrong shape.
            TypeError: `grad` or `state` is not floating.
        """
        flat_grad, planes, weights = self._inputs(grad, state, meta)
        update, new_planes = self._forward(flat_grad, planes, step, weights)
        return update.reshape(grad.shape), new_planes.to(state.dtype).reshape(state.shape)

    def reference_backward(
        self,
        d_update: Tensor,
        d_new_state: Tensor,
        grad: Tensor,
        state: Tensor,
        step: int | Tensor = 0,
        meta: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Hand-derived backward of `reference_step`, in plain torch and without autograd.

        Args:
            d_update: upstream gradient of the update, shaped like `grad`.
            d_new_state: upstream gradient of the new state, shaped like `state`.
            grad, state, step, meta: as given to `reference_step`.

        Returns:
            Gradients of `grad`, of `state` and of the flat meta-parameters `(M,)`, each typed like
            what it belongs to.

        Raises:
            As `reference_step`.
        """
        with torch.no_grad():
            flat_grad, planes, weights = self._inputs(grad, state, meta)
            d_grad, d_planes, d_weights = self._backward(
                d_update.to(planes.dtype).reshape(flat_grad.shape),
                d_new_state.to(planes.dtype).reshape(planes.shape),
                flat_grad,
                planes,
                step,
                weights,
            )
            d_meta = torch.cat([d_weights[name].reshape(-1) for name, _ in self.layout])
            meta_dtype = next(self.parameters()).dtype if meta is None else meta.dtype
        return (
            d_grad.to(grad.dtype).reshape(grad.shape),
            d_planes.to(state.dtype).reshape(state.shape),
            d_meta.to(meta_dtype),
        )

    def _inputs(
        self, grad: Tensor, state: Tensor, meta: Tensor | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Check shapes; flatten to coordinates and cast to the dtype of the maths."""
        if not (grad.is_floating_point() and state.is_floating_point()):
            raise TypeError(
                f"grad and state: expected floating dtypes, got {grad.dtype} and {state.dtype}; "
                "pass complex tensors through torch.view_as_real"
            )
        if state.shape != (self.state_planes, *grad.shape):
            raise ValueError(
                f"state: expected shape {(self.state_planes, *grad.shape)}, that is (state_planes, "
                f"*grad.shape), got {tuple(state.shape)}; make it with rule.init_state(param)"
            )
        dtype = torch.float64 if state.dtype == torch.float64 else torch.float32
        named = dict(self.named_parameters()) if meta is None else self.unflatten(meta)
        weights = {name: weight.to(dtype) for name, weight in named.items()}
        count = grad.numel()  # spelled out, because reshape(S, -1) is ambiguous for empty tensors
        return (
            grad.to(dtype).reshape(count),
            state.to(dtype).reshape(self.state_planes, count),
            weights,
        )

    # Files, copies, printing
    # ----------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str], card: Mapping[str, Any] | None = None) -> None:
        """Write a file that `fastl2o.load(path)` reads; see `fastl2o._files.save_rule`."""
        from .._files import (
            save_rule,  # here, because _files builds rules and so imports this package
        )

        save_rule(self, path, card)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": None, "_flat": None}  # scratch is not part of a copy

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.config().items())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


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


def truncated_normal_(tensor: Tensor, sd: float, generator: torch.Generator | None) -> None:
    """Normal, sd as given before truncation at two of them, as TensorFlow's initialiser."""
    nn.init.trunc_normal_(tensor, std=sd, a=-2 * sd, b=2 * sd, generator=generator)


def check_integer(name: str, value: object, low: int, high: int) -> int:
    """Return `value` if it is an int in [low, high], else raise naming the argument."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"Invalid {name}: {value!r}; pass an int from {low} to {high}")
    if not low <= value <= high:
        raise ValueError(f"Invalid {name}: {value}; pass an int from {low} to {high}")
    return value


def check_number(name: str, value: object, accepted: str, low: float, high: float) -> float:
    """Return `value` as a float if it is in [low, high], else raise; `accepted` words that."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"Invalid {name}: {value!r}; pass a number {accepted}")
    if not low <= value <= high:  # NaN and infinities are outside of finite bounds
        raise ValueError(f"Invalid {name}: {value}; pass a number {accepted}")
    return float(value)
