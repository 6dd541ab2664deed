"""Conversion from Sonnet's layout, against the formula as Sonnet writes it, and its errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fastl2o.convert import from_sonnet
from fastl2o.rules import LSTMRule, RNNPropRule

Arrays = dict[str, Any]
HIDDEN = 5


def sonnet_arrays(num_inputs: int, num_layers: int, *, projection: bool = False) -> Arrays:
    """Random float64 weights in Sonnet's layout."""
    random = np.random.default_rng(0)
    arrays: Arrays = {}
    width = num_inputs
    if projection:
        arrays["input_projection/w"] = random.normal(size=(2, HIDDEN))
        arrays["input_projection/b"] = random.normal(size=HIDDEN)
        width = HIDDEN
    for layer in range(1, num_layers + 1):
        arrays[f"lstm_{layer}/w_gates"] = 0.5 * random.normal(size=(width + HIDDEN, 4 * HIDDEN))
        arrays[f"lstm_{layer}/b_gates"] = 0.5 * random.normal(size=4 * HIDDEN)
        width = HIDDEN
    arrays["linear/w"] = random.normal(size=(width, 1))
    arrays["linear/b"] = random.normal(size=1)
    return arrays


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


class SonnetStack:
    """Sonnet's LSTM layers and linear output as its code writes them, on rows of inputs."""

    def __init__(self, arrays: Arrays, rows: int) -> None:
        self.arrays = arrays
        self.layers = sum(name.endswith("w_gates") for name in arrays)
        self.h = [np.zeros((rows, HIDDEN)) for _ in range(self.layers)]
        self.c = [np.zeros((rows, HIDDEN)) for _ in range(self.layers)]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        for k in range(self.layers):
            weight = self.arrays[f"lstm_{k + 1}/w_gates"]
            gates = np.concatenate((x, self.h[k]), axis=1) @ weight
            i, j, f, o = np.split(gates + self.arrays[f"lstm_{k + 1}/b_gates"], 4, axis=1)
            self.c[k] = sigmoid(f + 1) * self.c[k] + sigmoid(i) * np.tanh(j)
            self.h[k] = x = sigmoid(o) * np.tanh(self.c[k])
        return (x @ self.arrays["linear/w"] + self.arrays["linear/b"])[:, 0]


def gradients(steps: int = 4, rows: int = 11) -> np.ndarray:
    random = np.random.default_rng(1)
    return random.normal(size=(steps, rows)) * 10.0 ** random.uniform(-6, 1, size=(steps, rows))


@pytest.mark.parametrize("num_layers", [0, 1, 2, 3])
@pytest.mark.parametrize("num_inputs", [1, 2])
def test_lstm_makes_the_same_updates(num_inputs: int, num_layers: int) -> None:
    arrays = sonnet_arrays(num_inputs, num_layers)
    rule = from_sonnet(arrays, p=5.0, eps=2.0**-23, output_scale=0.01, dtype=torch.float64)
    assert isinstance(rule, LSTMRule)
    assert rule.preprocess == ("log_sign" if num_inputs == 2 else "identity")
    assert rule.num_layers == num_layers
    stack = SonnetStack(arrays, 11)
    state = rule.init_state(torch.zeros(11), torch.float64)
    for grad in gradients():
        x = grad[:, None]
        if num_inputs == 2:
            x1 = np.maximum(np.log(np.abs(grad) + 2.0**-23) / 5.0, -1.0)
            x = np.stack((x1, np.clip(np.exp(5.0) * grad, -1.0, 1.0)), axis=1)
        update, state = rule.reference_step(torch.from_numpy(grad), state)
        np.testing.assert_allclose(update.detach().numpy(), 0.01 * stack(x), rtol=0, atol=2e-15)


@pytest.mark.parametrize("step_size", [0.1, 0.01])
@pytest.mark.parametrize("update_sign", [-1, 1])
@pytest.mark.parametrize("input_order", ["gradient_first", "momentum_first"])
def test_rnnprop_makes_the_same_updates(
    input_order: str, update_sign: int, step_size: float
) -> None:
    arrays = sonnet_arrays(0, 2, projection=True)
    rule = from_sonnet(
        arrays,
        input_order=input_order,
        update_sign=update_sign,
        step_size=step_size,
        dtype=torch.float64,
    )
    assert isinstance(rule, RNNPropRule)
    stack = SonnetStack(arrays, 11)
    state = rule.init_state(torch.zeros(11), torch.float64)
    m, v = np.zeros(11), np.zeros(11)
    for step, grad in enumerate(gradients()):
        m, v = 0.95 * m + 0.05 * grad, 0.95 * v + 0.05 * grad**2
        correction = 1 - 0.95 ** (step + 1)
        r = np.sqrt(v / correction) + 1e-8
        inputs = [grad / r, m / correction / r]
        if input_order == "momentum_first":
            inputs.reverse()
        y = np.stack(inputs, axis=1) @ arrays["input_projection/w"] + arrays["input_projection/b"]
        expected = update_sign * step_size * np.tanh(stack(np.where(y > 0, y, np.expm1(y))))
        update, state = rule.reference_step(torch.from_numpy(grad), state, step)
        np.testing.assert_allclose(update.detach().numpy(), expected, rtol=0, atol=2e-15)


def test_published_checkpoint_shapes() -> None:
    shapes = {
        "lstm_1/w_gates": (22, 80),
        "lstm_1/b_gates": (80,),
        "lstm_2/w_gates": (40, 80),
        "lstm_2/b_gates": (80,),
        "linear/w": (20, 1),
        "linear/b": (1,),
    }
    arrays = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    rule = from_sonnet(arrays)
    assert (rule.num_meta_parameters, rule.num_layers, rule.hidden_size) == (5141, 2, 20)
    assert rule.config() == LSTMRule(p=5.0, eps=2.0**-23, output_scale=0.01).config()
    arrays["lstm_1/w_gates"] = np.zeros((40, 80), np.float32)
    arrays["input_projection/w"] = np.zeros((2, 20), np.float32)
    arrays["input_projection/b"] = np.zeros(20, np.float32)
    assert from_sonnet(arrays).num_meta_parameters == 6641


def test_nested_dictionaries_copies_and_the_forget_bias() -> None:
    arrays = sonnet_arrays(2, 1)
    nested: Arrays = {}
    for name, array in arrays.items():
        module, leaf = name.split("/")
        nested.setdefault(module, {})[leaf] = array
    rule = from_sonnet(nested)
    assert torch.equal(rule.flat_parameters(), from_sonnet(arrays).flat_parameters())
    before = rule.flat_parameters().clone()
    arrays["lstm_1/w_gates"][:] = 0.0
    assert torch.equal(rule.flat_parameters(), before)
    other = from_sonnet(nested, forget_bias=0.0).layers[0].bias
    assert torch.allclose(
        from_sonnet(nested).layers[0].bias - other, torch.eye(4)[1].repeat_interleave(HIDDEN)
    )


def test_converting_draws_no_random_numbers() -> None:
    state = torch.get_rng_state()
    rule = from_sonnet(sonnet_arrays(2, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.requires_grad for parameter in rule.parameters())
    assert all(parameter.device.type == "cpu" for parameter in rule.parameters())


def without(name: str) -> Arrays:
    arrays = sonnet_arrays(2, 2)
    del arrays[name]
    return arrays


def with_array(name: str, array: Any, *, projection: bool = False) -> Arrays:
    return sonnet_arrays(2, 2, projection=projection) | {name: array}


BAD_ARRAYS: dict[str, tuple[Arrays, str]] = {
    "missing-layer-bias": (without("lstm_2/b_gates"), r"missing \['lstm_2/b_gates'\]"),
    "missing-first-layer": (without("lstm_1/w_gates"), r"missing \['lstm_1/w_gates'\]"),
    "missing-linear": (without("linear/w"), r"missing \['linear/w'\]"),
    "extra": (with_array("lstm_2/peephole", np.zeros(5)), r"unexpected \['lstm_2/peephole'\]"),
    "half-a-projection": (with_array("input_projection/w", np.zeros((2, 5))), "input_projection/b"),
    "transposed": (with_array("lstm_2/w_gates", np.zeros((20, 10))), r"expected shape \(10, 20\)"),
    "short-bias": (with_array("lstm_1/b_gates", np.zeros(19)), r"expected shape \(20,\)"),
    "wide-readout": (with_array("linear/w", np.zeros((5, 2))), r"expected shape \(H, 1\)"),
    "flat-readout": (with_array("linear/w", np.zeros(5)), r"shape \(H, 1\).*got \(5,\)"),
    "empty-readout": (with_array("linear/w", np.zeros((0, 1))), r"H of at least 1, got \(0, 1\)"),
    "flat-layer": (with_array("lstm_1/w_gates", np.zeros(7)), r"expected shape \(7, 20\)"),
    "ragged": (with_array("linear/b", [[1], [2, 3]]), r"arrays\['linear/b'\]: is no array"),
    "huge": (with_array("linear/b", np.array([1e300])), "readout.bias of the rule would hold NaN"),
    "no-readout-bias": (with_array("linear/b", np.zeros(0)), r"arrays\['linear/b'\]"),
    "three-inputs": (with_array("lstm_1/w_gates", np.zeros((8, 20))), "mean 3 inputs a coordinate"),
    "three-projected-inputs": (
        with_array("input_projection/w", np.zeros((3, 5)), projection=True),
        r"expected shape \(2, 5\)",
    ),
    "nan": (with_array("linear/b", np.array([np.nan])), "holds NaN or Inf"),
    "text": (with_array("linear/b", np.array(["1"])), "expected numbers"),
    "objects": (with_array("linear/b", np.array([None])), "expected numbers"),
    "nothing": ({}, "missing"),
}


@pytest.mark.parametrize(("arrays", "message"), BAD_ARRAYS.values(), ids=BAD_ARRAYS)
def test_bad_arrays_are_named(arrays: Arrays, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_sonnet(arrays)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("input_order", "mg"),
        ("update_sign", 0),
        ("dtype", torch.float16),
        ("p", 0.0),
        ("output_scale", float("nan")),
    ],
)
def test_bad_options_are_named(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"Invalid {option}"):
        from_sonnet(sonnet_arrays(2, 2), **{option: value})


def test_other_things_than_arrays_are_refused() -> None:
    with pytest.raises(TypeError, match="Invalid arrays: list; pass a dictionary"):
        from_sonnet([np.zeros(3)])
    with pytest.raises(TypeError, match="Invalid forget_bias: '1'"):
        from_sonnet(sonnet_arrays(2, 2), forget_bias="1")


def test_torch_parameters_are_taken_as_arrays() -> None:
    arrays = sonnet_arrays(2, 2)
    parameters = {k: torch.nn.Parameter(torch.from_numpy(v)) for k, v in arrays.items()}
    rules = [from_sonnet(source) for source in (arrays, parameters)]
    assert torch.equal(*(rule.flat_parameters() for rule in rules))
