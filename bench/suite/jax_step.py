"""A coordinate-wise rule's step as an optax-style jitted function of JAX, where JAX is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fastl2o.rules import Rule

from ..eager import eager_state
from .gates import Start

MISSING = "no rows for JAX: it is not installed (pip install jax)"
FAMILIES = ("lstm", "rnnprop")
State = tuple[Any, list[Any]]  # steps taken; (m, v,) h1, c1, h2, c2


def installed() -> bool:
    """Whether there is a JAX to time."""
    return find_spec("jax") is not None


def _update(rule: Rule) -> Callable[[Any, State], tuple[Any, State]]:
    """Gradient and state to update and new state, as in optax, for jitting."""
    import jax
    from jax import numpy as jnp

    config, named = rule.config(), rule.unflatten(rule.flat_parameters().detach())
    weights = {name: jnp.asarray(value.cpu().numpy()) for name, value in named.items()}

    def cell(number: int, x: Any, h: Any, c: Any) -> tuple[Any, Any]:
        gates = x @ weights[f"layers.{number}.weight_ih"].T
        gates += h @ weights[f"layers.{number}.weight_hh"].T + weights[f"layers.{number}.bias"]
        i, f, g, o = jnp.split(gates, 4, axis=1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return jax.nn.sigmoid(o) * jnp.tanh(c), c

    def lstm_features(grad: Any, taken: Any, moments: list[Any]) -> tuple[Any, list[Any]]:
        log = jnp.maximum(jnp.log(jnp.abs(grad) + config["eps"]) / config["p"], -1.0)
        return jnp.stack((log, jnp.clip(jnp.exp(config["p"]) * grad, -1.0, 1.0)), axis=1), []

    def rnnprop_features(grad: Any, taken: Any, moments: list[Any]) -> tuple[Any, list[Any]]:
        beta1, beta2 = config["beta1"], config["beta2"]
        m = beta1 * moments[0] + (1 - beta1) * grad
        v = beta2 * moments[1] + (1 - beta2) * grad * grad
        rms = jnp.sqrt(v / (1 - beta2 ** (taken + 1))) + 1e-8
        inputs = jnp.stack((grad / rms, m / (1 - beta1 ** (taken + 1)) / rms), axis=1)
        projected = inputs @ weights["projection.weight"].T + weights["projection.bias"]
        return jax.nn.elu(projected), [m, v]

    rnnprop = rule.family == "rnnprop"
    features, first = (rnnprop_features, 2) if rnnprop else (lstm_features, 0)

    def update(grad: Any, state: State) -> tuple[Any, State]:
        taken, planes = state
        x, new = features(grad, taken, planes[:first])
        cells = planes[first:]
        for number in range(config["num_layers"]):
            x, c = cell(number, x, *cells[2 * number : 2 * number + 2])
            new += [x, c]
        out = (x @ weights["readout.weight"].T + weights["readout.bias"])[:, 0]
        out = -config["step_size"] * jnp.tanh(out) if rnnprop else config["output_scale"] * out
        return out, (taken + 1, new)

    return update


class Jitted:
    """A rule's step under ``jax.jit``, parameters and state donated."""

    def __init__(self, rule: Rule, grads: Sequence[Tensor]) -> None:
        import jax
        from jax import numpy as jnp

        update = _update(rule)

        def apply(param: Any, grad: Any, state: State) -> tuple[Any, State]:
            change, state = update(grad, state)
            return param + change, state

        self.rule, self.sizes = rule, [grad.numel() for grad in grads]
        self._array: Callable[[Tensor], Any] = lambda values: jnp.array(values.cpu().numpy())
        self._device = grads[0].device  # where the gate compares; JAX may be elsewhere
        self._drawn = self._array(torch.cat(list(grads)))
        self._grad = self._drawn
        self._held: Any = None  # parameters, state; from begin on
        self._compiled, self._wait = jax.jit(apply, donate_argnums=(0, 2)), jax.block_until_ready

    def run(self) -> None:
        param, state = self._held
        self._held = self._compiled(param, self._grad, state)
        self._wait(self._held)

    def begin(self, start: Start) -> None:
        whole = start.repeated(self.sizes)
        planes = [self._array(p) for p in eager_state(self.rule, torch.cat(whole.planes, dim=1))]
        taken = self._array(torch.ones(()))
        self._held = self._array(torch.cat(whole.params)), (taken, planes)

    def scale(self, factor: float) -> None:
        self._grad = self._drawn * factor

    def parameters(self) -> list[Tensor]:
        import numpy

        values = torch.tensor(numpy.asarray(self._held[0]), device=self._device)
        return list(values.split(self.sizes))

    def state_bytes(self) -> int:
        """Bytes of optimizer state, all of it."""
        taken, planes = self._held[1]
        return sum(int(part.nbytes) for part in (taken, *planes))
