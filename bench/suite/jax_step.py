"""The LSTM rule's step as an optax-style jitted function of JAX, where JAX is installed."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from ..common import require
from ..eager import EagerOptimizer
from ..step import Buffers, make_rule


def lstm_step(size: int) -> Callable[[], object] | str:
    """A step on ``size`` coordinates, already compiled and checked, or why there is none."""
    if find_spec("jax") is None:
        return "no row for JAX: it is not installed (pip install jax)"
    import jax
    from jax import numpy as jnp

    rule = make_rule("lstm")
    config, hidden = rule.config(), rule.config()["hidden_size"]
    weights = {
        name: jnp.asarray(value.numpy())
        for name, value in rule.unflatten(rule.flat_parameters().detach()).items()
    }

    def cell(number: int, x: Any, h: Any, c: Any) -> tuple[Any, Any]:
        gates = x @ weights[f"layers.{number}.weight_ih"].T
        gates += h @ weights[f"layers.{number}.weight_hh"].T + weights[f"layers.{number}.bias"]
        i, f, g, o = jnp.split(gates, 4, axis=1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return jax.nn.sigmoid(o) * jnp.tanh(c), c

    def update(param: Any, grad: Any, state: Any) -> tuple[Any, Any]:
        log = jnp.maximum(jnp.log(jnp.abs(grad) + config["eps"]) / config["p"], -1.0)
        x = jnp.stack((log, jnp.clip(jnp.exp(config["p"]) * grad, -1.0, 1.0)), axis=1)
        new_state = []
        for number in range(config["num_layers"]):
            x, c = cell(number, x, *state[2 * number : 2 * number + 2])
            new_state += [x, c]
        out = x @ weights["readout.weight"].T + weights["readout.bias"]
        return param + config["output_scale"] * out[:, 0], new_state

    compiled = jax.jit(update, donate_argnums=(0, 2))
    start = Buffers(rule, size)
    eager = EagerOptimizer(rule, start.params[0].clone(), start.grads[0])
    grad = jnp.asarray(start.grads[0].numpy())
    held = [
        jnp.asarray(start.params[0].numpy()),
        [jnp.zeros((size, hidden)) for _ in range(2 * config["num_layers"])],
    ]

    def run() -> None:
        held[:] = compiled(held[0], grad, held[1])
        jax.block_until_ready(held)

    for _ in range(3):
        run()
        eager.step()
    error = float((torch.tensor(jax.device_get(held[0])) - eager.param).abs().max())
    require(error < 1e-4, f"JAX's step differs from eager torch by {error:.1e}")
    return run
