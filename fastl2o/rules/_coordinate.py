"""CoordinateRule: base of the rules whose coordinates do not talk to each other."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ._base import Rule, Weights
from ._modules import LSTMLayer, check_timescales, draw_timescales_


class CoordinateRule(Rule):
    """A rule that maps each coordinate's gradient and state to its update, with shared weights.

    Subclasses give the maths on flat coordinates: `_forward` and `_backward`.
    """

    runs_axis: ClassVar[int] = 1

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

    def init_runs(
        self, params: Tensor, sizes: Sequence[int], generator: torch.Generator | None = None
    ) -> Tensor:
        """State `(S, R, D)`; see `Rule.init_runs`."""
        return self.init_state(params, params.dtype)

    def runs_shape(self, runs: int, sizes: Sequence[int]) -> tuple[int, ...]:
        """`(S, R, D)`; see `Rule.runs_shape`."""
        return (self.state_planes, runs, sum(sizes))

    def reference_runs_step(
        self, grads: Tensor, state: Tensor, step: int, sizes: Sequence[int], meta: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`reference_step` of all coordinates; see `Rule.reference_runs_step`."""
        return self.reference_step(grads, state, step, meta)

    @torch.no_grad()
    def draw_timescales(
        self, low: float, high: float, generator: torch.Generator | None = None
    ) -> None:
        """Start half of each LSTM layer's units with long memories, by the biases of their gates.

        T is drawn log-uniformly from [low, high] for each of them; its forget gate starts at
        1 - 1/T and its input gate at 1/T, so that it holds an average over about T steps. After
        the chrono initialisation of Tallec and Ollivier (arXiv 1804.11188, section 2), who draw T
        uniformly. A rule that is to slow down over thousands of steps needs such units.

        Args:
            low, high: steps, 1 < low <= high.
            generator: source of the numbers.

        Example:
            >>> import fastl2o
            >>> rule = fastl2o.LSTMRule(hidden_size=4)
            >>> rule.draw_timescales(100.0, 100.0)
            >>> round(rule.layers[0].bias[4].sigmoid().item(), 4)
            0.99
        """
        low, high = check_timescales(low, high)
        for layer in self.modules():
            if isinstance(layer, LSTMLayer):
                draw_timescales_(layer, low, high, generator)

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
            ValueError, TypeError: as `reference_step`.
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
