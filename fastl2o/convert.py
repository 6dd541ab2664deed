"""Meta-parameters from other implementations, as arrays: never as a pickle."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .rules import LSTMRule, RNNPropRule

__all__ = ["from_sonnet"]

_LAYER_NAME = re.compile(r"lstm_([1-9][0-9]*)/(w_gates|b_gates)")
INPUT_ORDERS = ("gradient_first", "momentum_first")


def from_sonnet(
    arrays: Mapping[str, Any],
    *,
    p: float = 5.0,
    eps: float = 2.0**-23,
    output_scale: float = 0.01,
    input_order: str = "gradient_first",
    update_sign: int = -1,
    step_size: float = 0.1,
    beta1: float = 0.95,
    beta2: float = 0.95,
    forget_bias: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> LSTMRule | RNNPropRule:
    """Build a rule from weights in the layout of Sonnet v1 (and of TensorFlow 1's LSTMCell).

    In that layout one matrix `lstm_k/w_gates` `(in + H, 4H)` multiplies [input, hidden] from the
    right, its column blocks are the gates i, j, f, o with j the candidate, and the forget gate is
    sigmoid(a_f + 1) with that 1 not stored. `arrays` with an `input_projection` make an
    RNNPropRule, others an LSTMRule; hidden size, number of layers and preprocessing follow from the
    shapes (2 inputs: "log_sign", 1 input: "identity").

    Args:
        arrays: `lstm_1/w_gates`, `lstm_1/b_gates` `(4H,)`, `lstm_2/...`, ..., `linear/w` `(H, 1)`,
            `linear/b` `(1,)`, and for RNNprop `input_projection/w` `(2, H)`, `input_projection/b`
            `(H,)`. Nested dictionaries {"lstm_1": {"w_gates": ...}} are taken too. Arrays are
            copied.
        p, eps, output_scale: of the LSTM rule; the defaults are those of DeepMind's code on MNIST
            (1.0 on quadratics).
        input_order: order of RNNprop's two inputs, "gradient_first" (the authors) or
            "momentum_first" (the port by VITA-Group).
        update_sign: whether the source adds its update (+1: theta += step_size * tanh(o), the VITA
            port) or subtracts it (-1, the authors). RNNprop only; tanh is odd, so +1 negates the
            readout.
        step_size: the source's factor on tanh(o); the authors' 0.1, the VITA port's 0.01.
        beta1, beta2: of RNNprop.
        forget_bias: what the source adds to a_f without storing it.
        dtype: of the meta-parameters, float32 or float64.

    Returns:
        The rule, on the CPU, that makes the same updates.

    Raises:
        ValueError: names, shapes, values or options that fit neither layout; the message says what
            was expected.
        TypeError: ``arrays`` is no dictionary, or ``forget_bias`` no number.

    Example:
        >>> H = 3
        >>> arrays = {"lstm_1/w_gates": np.zeros((2 + H, 4 * H)), "lstm_1/b_gates": np.zeros(4 * H),
        ...           "linear/w": np.ones((H, 1)), "linear/b": np.zeros(1)}
        >>> rule = from_sonnet(arrays, p=10.0, output_scale=0.1)
        >>> rule.hidden_size, rule.num_layers, rule.preprocess, rule.layers[0].bias[H].item()
        (3, 1, 'log_sign', 1.0)
    """
    if input_order not in INPUT_ORDERS:
        raise ValueError(
            f"Invalid input_order: {input_order!r}; pass one of "
            f"{', '.join(map(repr, INPUT_ORDERS))}"
        )
    if update_sign not in (-1, 1):
        raise ValueError(
            f"Invalid update_sign: {update_sign!r}; pass -1 (theta -= update) or 1 (theta += "
            "update)"
        )
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"Invalid dtype: {dtype}; pass torch.float32 or torch.float64")
    if not isinstance(arrays, Mapping):
        raise TypeError(
            f"Invalid arrays: {type(arrays).__name__}; pass a dictionary of arrays by name"
        )
    if isinstance(forget_bias, bool) or not isinstance(forget_bias, (int, float)):
        raise TypeError(f"Invalid forget_bias: {forget_bias!r}; pass a number, such as 1.0")
    source = _collect(arrays)
    is_rnnprop = any(name.startswith("input_projection/") for name in source)
    num_layers = _count_layers(source)
    _check_names(source, num_layers, is_rnnprop)

    hidden_size = source["linear/w"].shape[0] if source["linear/w"].ndim else 0
    if hidden_size < 1 or source["linear/w"].shape != (hidden_size, 1):
        raise ValueError(
            "arrays['linear/w']: expected shape (H, 1) with the hidden size H of at least 1, got "
            f"{source['linear/w'].shape}"
        )
    if is_rnnprop:
        num_inputs = hidden_size
        _check_shape(source, "input_projection/w", (2, hidden_size))
        _check_shape(source, "input_projection/b", (hidden_size,))
    elif num_layers == 0:
        num_inputs = hidden_size
    else:
        if source["lstm_1/w_gates"].ndim != 2:
            _check_shape(source, "lstm_1/w_gates", (2 + hidden_size, 4 * hidden_size))
        num_inputs = source["lstm_1/w_gates"].shape[0] - hidden_size
    if not is_rnnprop and num_inputs not in (1, 2):
        raise ValueError(
            f"arrays: {'linear/w' if num_layers == 0 else 'lstm_1/w_gates'} and linear/w mean "
            f"{num_inputs} inputs a coordinate; expected 2 (log and sign features) or 1 (raw "
            "gradient)"
        )
    _check_shape(source, "linear/b", (1,))

    state: dict[str, Tensor] = {}
    for layer in range(num_layers):
        width = num_inputs if layer == 0 else hidden_size
        state |= _convert_layer(source, layer, width, hidden_size, forget_bias, dtype)
    sign = -float(update_sign) if is_rnnprop else 1.0
    state["readout.weight"] = sign * _tensor(source["linear/w"].T, dtype)
    state["readout.bias"] = sign * _tensor(source["linear/b"], dtype)
    if is_rnnprop:
        projection = source["input_projection/w"]
        rows = projection if input_order == "gradient_first" else projection[::-1]
        state["projection.weight"] = _tensor(rows.T, dtype)
        state["projection.bias"] = _tensor(source["input_projection/b"], dtype)
    rule: LSTMRule | RNNPropRule
    with torch.device("meta"):  # draws no random numbers from the caller's generator
        if is_rnnprop:
            rule = RNNPropRule(
                hidden_size, num_layers, beta1=beta1, beta2=beta2, step_size=step_size
            )
        else:
            rule = LSTMRule(
                hidden_size if num_layers else 1,
                num_layers,
                preprocess="log_sign" if num_inputs == 2 else "identity",
                p=p,
                eps=eps,
                output_scale=output_scale,
            )
    beyond = [name for name, value in state.items() if not bool(value.isfinite().all())]
    if beyond:
        raise ValueError(
            f"arrays: {', '.join(beyond)} of the rule would hold NaN or Inf in {dtype}; pass other "
            "weights, a finite forget_bias, or dtype=torch.float64"
        )
    rule.load_state_dict(state, assign=True)
    return rule


def _collect(arrays: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """Flatten nested dictionaries; turn every leaf into a finite float64 array."""
    source: dict[str, np.ndarray[Any, Any]] = {}
    for name, value in arrays.items():
        if isinstance(value, Mapping):
            source |= _collect({f"{name}/{key}": leaf for key, leaf in value.items()})
            continue
        try:
            array = np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"arrays[{name!r}]: is no array of numbers ({error})") from error
        if array.dtype.kind not in "fiu":
            raise ValueError(f"arrays[{name!r}]: expected numbers, got dtype {array.dtype}")
        array = array.astype(np.float64)
        if not np.isfinite(array).all():
            raise ValueError(
                f"arrays[{name!r}]: holds NaN or Inf; pass the weights of a checkpoint that works"
            )
        source[str(name)] = array
    return source


def _count_layers(source: Mapping[str, object]) -> int:
    numbers = [int(match[1]) for name in source if (match := _LAYER_NAME.fullmatch(name))]
    return max(numbers, default=0)


def _check_names(source: Mapping[str, object], num_layers: int, is_rnnprop: bool) -> None:
    expected = {
        f"lstm_{k}/{part}" for k in range(1, num_layers + 1) for part in ("w_gates", "b_gates")
    }
    expected |= {"linear/w", "linear/b"}
    if is_rnnprop:
        expected |= {"input_projection/w", "input_projection/b", "lstm_1/w_gates", "lstm_1/b_gates"}
    missing, extra = sorted(expected - source.keys()), sorted(source.keys() - expected)
    if missing or extra:
        raise ValueError(
            f"arrays: missing {missing or 'none'}, unexpected {extra or 'none'}; expected "
            "lstm_1/w_gates, lstm_1/b_gates, lstm_2/..., linear/w, linear/b and, for RNNprop, "
            "input_projection/w, input_projection/b"
        )


def _check_shape(
    source: Mapping[str, np.ndarray[Any, Any]], name: str, shape: tuple[int, ...]
) -> None:
    if source[name].shape != shape:
        raise ValueError(
            f"arrays[{name!r}]: expected shape {shape} to fit the other arrays (hidden size is "
            f"read from linear/w), got {source[name].shape}"
        )


def _convert_layer(
    source: Mapping[str, np.ndarray[Any, Any]],
    layer: int,
    width: int,
    hidden_size: int,
    forget_bias: float,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    weight_name, bias_name = f"lstm_{layer + 1}/w_gates", f"lstm_{layer + 1}/b_gates"
    _check_shape(source, weight_name, (width + hidden_size, 4 * hidden_size))
    _check_shape(source, bias_name, (4 * hidden_size,))

    def reorder(columns: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        i, j, f, o = np.split(columns, 4, axis=-1)
        return np.concatenate((i, f, j, o), axis=-1)

    weight, bias = reorder(source[weight_name]).T, reorder(source[bias_name])
    bias[hidden_size : 2 * hidden_size] += forget_bias
    return {
        f"layers.{layer}.weight_ih": _tensor(weight[:, :width], dtype),
        f"layers.{layer}.weight_hh": _tensor(weight[:, width:], dtype),
        f"layers.{layer}.bias": _tensor(bias, dtype),
    }


def _tensor(array: np.ndarray[Any, Any], dtype: torch.dtype) -> Tensor:
    return torch.tensor(np.ascontiguousarray(array), dtype=dtype)
