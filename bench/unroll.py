"""The fused unroll backward: error, speed against eager autograd, and memory.

``python -m bench.unroll STEPS`` measures the memory of one call in its own process and prints JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastl2o
from fastl2o.rules import Rule
from tests.common import Window as Recorded
from tests.common import autograd_unroll, random_window

from .common import (
    Contest,
    Figure,
    Suite,
    Target,
    available_gib,
    relative_errors,
    require,
    set_threads,
)
from .eager import EagerRule, eager_state, unroll_gradient
from .memory import in_own_process, peak_growth
from .step import make_rule

STEPS, RUNS, DIM = 20, 4, 4_000  # 16,000 coordinates
MAX_ERROR = 1e-5
OURS, EAGER = "ops.unroll_backward", "eager autograd"
# Eager autograd keeps about 1,000 numbers a coordinate and step.
EAGER_NEEDS_GIB = 4.0
# Coordinates differentiated together in float64, where the graph is twice as large.
_BLOCK = 500


class Accuracy(NamedTuple):
    """Relative errors against float64 autograd: in the 2-norm and in the largest element."""

    d_meta: tuple[float, float]
    d_state: tuple[float, float]
    eager: tuple[float, float]  # float32 eager autograd's d_meta, for comparison


def window(rule: Rule) -> Recorded:
    """A window of 16,000 coordinates: random gradients, state and loss weights."""
    return random_window(rule, steps=STEPS, runs=RUNS, dim=DIM, step=0)


def exact_gradient(family: str, recorded: Recorded) -> tuple[Tensor, Tensor]:
    """d_meta and d_state in float64 by autograd through the reference, block by block.

    Coordinates do not interact, so d_meta is the sum over blocks of them, and the graph of all
    16,000 need not be held at once.
    """
    rule, wide = make_rule(family).double(), recorded.to(torch.float64)
    d_meta = torch.zeros(rule.num_meta_parameters, dtype=torch.float64)
    d_state = torch.zeros_like(wide.state)
    for start in range(0, recorded.grads.shape[2], _BLOCK):
        block = slice(start, start + _BLOCK)
        part = wide._replace(grads=wide.grads[:, :, block], state=wide.state[:, :, block])
        d_block, d_state[:, :, block] = autograd_unroll(rule, part)
        d_meta += d_block
    return d_meta, d_state


def fused(rule: Rule, recorded: Recorded) -> tuple[Tensor, Tensor]:
    """One call of the op."""
    return fastl2o.ops.unroll_backward(
        rule, recorded.grads, recorded.state, recorded.loss_weights, steps=recorded.steps
    )


def eager(net: EagerRule, rule: Rule, recorded: Recorded) -> Tensor:
    """The same gradient of the meta-parameters by eager autograd in float32."""
    state = eager_state(rule, recorded.state)
    return unroll_gradient(net, recorded.grads, state, recorded.loss_weights, recorded.steps)


def accuracy(family: str = "lstm") -> Accuracy:
    """The gate: fused and eager gradients against float64 autograd through the reference.

    Raises:
        AssertionError: if the fused one is off by more than 1e-5, or the eager one is not the same
            computation.
    """
    rule = make_rule(family)
    recorded = window(rule)
    d_meta, d_state = fused(rule, recorded)
    exact_meta, exact_state = exact_gradient(family, recorded)
    result = Accuracy(
        relative_errors(d_meta, exact_meta),
        relative_errors(d_state, exact_state),
        relative_errors(eager(EagerRule(rule), rule, recorded), exact_meta),
    )
    for name, errors in (("d_meta", result.d_meta), ("d_state", result.d_state)):
        require(
            max(errors) <= MAX_ERROR,
            f"unroll backward of {family}: {name} is off by {errors[0]:.2g} in the 2-norm and "
            f"{errors[1]:.2g} in the largest element; at most {MAX_ERROR} is allowed",
        )
    require(max(result.eager) <= 1e-3, f"the eager baseline of {family} is off: {result.eager}")
    return result


def accuracy_figures(result: Accuracy, family: str = "lstm") -> list[Figure]:
    """The errors as rows."""
    limit = Target(MAX_ERROR, at_least=False)
    start = f"{family} unroll gradient, T={STEPS}, {RUNS * DIM:,} coordinates, relative error of"
    rows = []
    for name, errors, target in (
        ("d_meta", result.d_meta, limit),
        ("d_state", result.d_state, limit),
        (f"d_meta by float32 {EAGER}", result.eager, None),
    ):
        for kind, error in zip(("2-norm", "largest element"), errors, strict=True):
            rows.append(Figure(f"{start} {name}, {kind}", error, "", target=target))
    return rows


def against_eager(family: str = "lstm", seconds: float = 45.0) -> tuple[Suite, list[str]]:
    """Fused against eager autograd; ``accuracy`` is the gate and comes first."""
    rule, notes = make_rule(family), []
    recorded, net = window(rule), EagerRule(rule)
    contenders: dict[str, Any] = {OURS: lambda: fused(rule, recorded)}
    if available_gib() < EAGER_NEEDS_GIB:
        notes.append(f"no row for {EAGER}: less than {EAGER_NEEDS_GIB:.0f} GiB of memory")
    else:
        contenders[EAGER] = lambda: eager(net, rule, recorded)
    title = f"{family} unroll gradient, T={STEPS}, {RUNS * DIM:,} coordinates"

    def figures(contest: Contest) -> list[Figure]:
        rows = [contest.time(name, f"{title}: {name}") for name in contenders]
        if EAGER in contenders:
            label = f"{title}: times faster than float32 {EAGER}"
            target = Target(10) if family == "lstm" else None
            rows.append(contest.ratio(EAGER, OURS, label, target))
        return rows

    return Suite(title, OURS, Contest(contenders, seconds, max_rounds=20), figures), notes


def measure_memory(steps: int) -> dict[str, Any]:
    """Peak growth of the resident memory in the op's first call, for this process alone."""
    rule = make_rule("lstm")
    recorded = random_window(rule, steps=steps, runs=RUNS, dim=DIM, step=0)
    extra, outputs = peak_growth(lambda: fused(rule, recorded))
    finite = all(bool(torch.isfinite(output).all()) for output in outputs)
    return {"steps": steps, "coordinates": RUNS * DIM, "extra_kib": extra, "finite": finite}


def memory(steps: int) -> list[Figure]:
    """Extra memory of one call, in a process of its own.

    The limit is (T + 100) floats a coordinate and 16 MB.

    Raises:
        RuntimeError: if that process fails.
    """
    measured = in_own_process("bench.unroll", steps, torch.get_num_threads())
    require(measured["finite"], f"the unroll gradient of {steps} steps is not finite")
    coordinates, extra = measured["coordinates"], measured["extra_kib"] * 1024
    limit = ((steps + 100) * 4 * coordinates + 16e6) / 1e6
    planes = make_rule("lstm").state_planes
    recorded = (steps + 1 + planes) * 4 * coordinates
    title = f"lstm unroll gradient, T={steps}, {coordinates:,} coordinates"
    at_most = Target(limit, at_least=False)
    return [
        Figure(f"{title}: extra memory, d_state included", extra / 1e6, "MB", target=at_most),
        Figure(
            f"{title}: the same and the recorded gradients and first state",
            (extra + recorded) / 1e6,
            "MB",
            target=at_most,
        ),
    ]


if __name__ == "__main__":
    set_threads(int(sys.argv[2]) if len(sys.argv) > 2 else 2)
    print(json.dumps(measure_memory(int(sys.argv[1]))))
