"""The optimizer step: against eager torch, torch.compile, the machine's FLOP rate, and itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastl2o
from fastl2o.rules import LSTMRule, RNNPropRule, Rule
from tests.common import assert_as_accurate

from .common import (
    MATMUL,
    MATMUL_MACS,
    Contest,
    Figure,
    Suite,
    Target,
    available_gib,
    matmul,
    require,
    summary,
)
from .eager import EagerOptimizer, compiled_optimizer

COORDINATES = 100_000
OURS, OPTIMIZER = "ops.step_", "LearnedOptimizer.step"
EAGER, COMPILED, ADAM, MANY = "eager torch", "torch.compile", "torch's fused Adam", "1,000 tensors"
# Multiply-adds a coordinate of a 2x20 rule, counted: 80*22 + 80*40 + 20, and RNNprop's 80*40 twice,
# 2*20 and 20.
MACS = {"lstm": 4_980, "rnnprop": 6_460}
SIZES = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)
LARGEST_NEEDS_GIB = 8.0
# What we call linear: the cost of a coordinate varies by at most this factor over all sizes.
LINEAR = 1.5


def make_rule(family: str) -> Rule:
    """A 2x20 rule with the family's random initialisation."""
    rule: Rule = LSTMRule() if family == "lstm" else RNNPropRule()
    rule.reset_parameters(torch.Generator().manual_seed(0))
    return rule


class Buffers:
    """Parameters, gradients and states of ``count`` tensors of ``size`` coordinates."""

    def __init__(self, rule: Rule, size: int, count: int = 1) -> None:
        generator = torch.Generator().manual_seed(1)
        self.rule = rule
        self.params = [torch.randn(size, generator=generator) for _ in range(count)]
        self.grads = [torch.randn(size, generator=generator).mul_(1e-2) for _ in range(count)]
        self.states = [rule.init_state(param) for param in self.params]
        self.steps = [torch.zeros(()) for _ in range(count)]

    def step(self) -> None:
        """One ``ops.step_`` on all of them."""
        fastl2o.ops.step_(self.rule, self.params, self.grads, self.states, self.steps)


def _with_grads(buffers: Buffers) -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter(param.clone()) for param in buffers.params]
    for param, grad in zip(params, buffers.grads, strict=True):
        param.grad = grad.clone()
    return params


def learned(rule: Rule, size: int, count: int = 1) -> fastl2o.LearnedOptimizer:
    """A LearnedOptimizer whose parameters have gradients."""
    return fastl2o.LearnedOptimizer(_with_grads(Buffers(rule, size, count)), rule)


def gate(family: str, steps: int = 3, size: int = 3_001) -> None:
    """Kernel, optimizer and eager baseline against the reference in float64, on a few steps."""
    rule = make_rule(family)
    exact_rule = make_rule(family).double()

    def reference(rule: Rule, dtype: torch.dtype) -> Tensor:
        start = Buffers(rule, size)
        param, grad = start.params[0].to(dtype), start.grads[0].to(dtype)
        state = rule.init_state(param, dtype)
        for step in range(steps):
            update, state = rule.reference_step(grad, state, step)
            param = param + update
        return param.detach()

    plain, exact = reference(rule, torch.float32), reference(exact_rule, torch.float64)
    ours, optimizer, start = Buffers(rule, size), learned(rule, size), Buffers(rule, size)
    eager = EagerOptimizer(rule, start.params[0], start.grads[0])
    for _ in range(steps):
        ours.step()
        optimizer.step()
        eager.step()
    assert_as_accurate(ours.params[0], plain, exact, OURS)
    through_optimizer = optimizer.param_groups[0]["params"][0].detach()
    require(torch.equal(through_optimizer, ours.params[0]), f"{OPTIMIZER} and {OURS} differ")
    torch.testing.assert_close(eager.param.double(), exact, rtol=1e-5, atol=1e-5)


def against_baselines(family: str, seconds: float = 40.0) -> tuple[Suite, list[str]]:
    """100,000 coordinates, all contenders, after the gate; with notes on what was left out."""
    gate(family)
    rule, notes = make_rule(family), []
    one, many = Buffers(rule, COORDINATES), Buffers(rule, 100, 1_000)
    optimizer = learned(rule, COORDINATES)
    optimizer_of_many = learned(rule, 100, 1_000)
    eager_start, adam_start = Buffers(rule, COORDINATES), Buffers(rule, COORDINATES)
    adam = torch.optim.Adam(_with_grads(adam_start), fused=True)
    contenders: dict[str, Any] = {
        MATMUL: matmul(),
        OURS: one.step,
        OPTIMIZER: optimizer.step,
        f"{OURS}, {MANY}": many.step,
        f"{OPTIMIZER}, {MANY}": optimizer_of_many.step,
        EAGER: EagerOptimizer(rule, eager_start.params[0], eager_start.grads[0]).step,
        ADAM: adam.step,
    }
    compile_start = Buffers(rule, COORDINATES)
    compiled = compiled_optimizer(rule, compile_start.params[0], compile_start.grads[0])
    if isinstance(compiled, str):
        notes.append(f"{family}: no row for {COMPILED}: {compiled}")
    else:
        check = EagerOptimizer(rule, Buffers(rule, COORDINATES).params[0], compiled.grad)
        for _ in range(3):
            check.step()
        torch.testing.assert_close(compiled.param, check.param, rtol=1e-4, atol=1e-5)
        contenders[COMPILED] = compiled.step
    title = f"{family} 2x20, {COORDINATES:,} coordinates"
    suite = Suite(
        title, OURS, Contest(contenders, seconds), lambda contest: _figures(title, family, contest)
    )
    return suite, notes


def _figures(title: str, family: str, contest: Contest) -> list[Figure]:
    lstm = family == "lstm"  # the rule that has targets
    rows = [contest.time(name, f"{title}: {name}") for name in contest.contenders]
    share = MACS[family] * COORDINATES / MATMUL_MACS
    for ours in (OURS, OPTIMIZER):
        start = f"{title}: {ours}"
        rows.append(
            contest.ratio(EAGER, ours, f"{start}, times faster than {EAGER}", _at_least(10, lstm))
        )
        if COMPILED in contest.contenders:
            label = f"{start}, times faster than {COMPILED}"
            rows.append(contest.ratio(COMPILED, ours, label, _at_least(6, lstm)))
        label = f"{start}, share of the matrix product's FLOP rate"
        rows.append(contest.ratio(MATMUL, ours, label, _at_least(0.6, lstm), factor=share, unit=""))
        label = f"{start}, 1,000 tensors of 100 over one of 100,000"
        at_most = Target(1.3, at_least=False) if lstm else None
        rows.append(contest.ratio(f"{ours}, {MANY}", ours, label, at_most))
    rows.append(contest.ratio(OURS, ADAM, f"{title}: {OURS} over {ADAM}"))
    return rows


def _at_least(limit: float, applies: bool) -> Target | None:
    return Target(limit) if applies else None


def linearity(seconds: float = 30.0) -> tuple[Suite, list[str]]:
    """Time a coordinate from 1e3 to 1e7 coordinates in one tensor, LSTM 2x20."""
    gate("lstm")
    rule, notes = make_rule("lstm"), []
    sizes: tuple[int, ...] = SIZES
    if available_gib() < LARGEST_NEEDS_GIB:
        sizes = SIZES[:-1]
        notes.append(f"no row for 1e7 coordinates: less than {LARGEST_NEEDS_GIB:.0f} GiB of memory")
    contenders: dict[str, Any] = {f"{size:,}": Buffers(rule, size).step for size in sizes}

    def figures(contest: Contest) -> list[Figure]:
        rows = [
            contest.time(f"{size:,}", f"lstm 2x20, {size:,} coordinates", "ns/coordinate", size)
            for size in sizes
        ]
        costs = [[t / size for t in contest.times[f"{size:,}"]] for size in sizes]
        spread = [max(each) / min(each) for each in zip(*costs, strict=True)]
        label = f"lstm 2x20: dearest coordinate over cheapest, 1e3 to {sizes[-1]:.0e}"
        rows.append(summary(label, "x", spread, Target(LINEAR, at_least=False)))
        return rows

    contest = Contest(contenders, seconds, max_rounds=20)
    return Suite("linearity", f"{COORDINATES:,}", contest, figures), notes
