"""The hierarchical rule on the CPU: ``python -m bench.hierarchical``, about three minutes.

The step against eager torch, torch.compile and our own LSTM step, its scaling, and the window's
gradient against eager autograd, in time and in extra memory (each in a process of its own). Prints
a table and writes it to ``bench/reports/hierarchical.md``.
"""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import fastl2o
from fastl2o import HierarchicalRule
from fastl2o import _ops_hierarchical as hierarchical
from fastl2o.rules.hierarchical import ProblemState

from .common import REPORTS, Contest, Figure, Target, machine, require, set_threads, table
from .memory import in_own_process, peak_growth
from .step import Buffers, make_rule

MILLION = 1_000_000
SIZES = (10_000, 100_000, MILLION, 10_000_000)
WINDOW, WINDOW_SIZES = 50, (2_000, 100) * 10


class Problem:
    """Parameters, gradients and state of ``count`` tensors of ``size``."""

    def __init__(self, rule: HierarchicalRule, size: int, count: int, device: str = "cpu") -> None:
        generator = torch.Generator().manual_seed(1)
        self.rule = rule
        self.params = [torch.randn(size, generator=generator).to(device) for _ in range(count)]
        grads = [torch.randn(size, generator=generator).mul_(1e-2) for _ in range(count)]
        self.grads = [grad.to(device) for grad in grads]
        self.state = rule.init_problem(self.params, 0)
        self.steps = [torch.zeros((), device=device) for _ in range(count)]
        self.hidden = self.state.hidden.unsqueeze(0).clone()

    def step(self, nonfinite: str = "raise") -> None:
        """One step by the list op."""
        count = len(self.params)
        hierarchical.step_(
            self.rule, self.params, self.grads, self.state.planes, self.state.tensors, self.steps,
            self.hidden, lr=[1.0] * count, weight_decay=[0.0] * count, nonfinite=nonfinite,
        )  # fmt: skip

    @torch.no_grad()
    def eager(self) -> None:
        """One step by the reference in eager torch."""
        updates, self.state = self.rule.reference_step(self.grads, self.state)
        for param, update in zip(self.params, updates, strict=True):
            assert update is not None
            param.add_(update)


class CompiledRule(HierarchicalRule):
    """The rule with both halves of a tensor's step under ``torch.compile``."""

    reference_sweep = torch.compile(HierarchicalRule.reference_sweep, fullgraph=True)
    reference_finish = torch.compile(HierarchicalRule.reference_finish, fullgraph=True)


def compiled_ungated(rule: HierarchicalRule, size: int, count: int) -> Problem:
    """The eager contender with a compiled rule, already compiled, three steps on."""
    twin = CompiledRule()
    twin.load_state_dict(rule.state_dict())
    problem = Problem(twin, size, count)
    with warnings.catch_warnings():
        # torch's own warnings while it compiles are none of this benchmark's.
        warnings.simplefilter("ignore")
        for _ in range(3):
            problem.eager()
    return problem


def compiled(rule: HierarchicalRule, size: int = 20_000, count: int = 50) -> Problem:
    """The same, compared with eager torch."""
    problem, plain = compiled_ungated(rule, size, count), Problem(rule, size, count)
    for _ in range(3):
        plain.eager()
    error = max(
        float((a - b).abs().max()) for a, b in zip(problem.params, plain.params, strict=True)
    )
    require(error < 1e-5, f"compiled: parameters differ from eager torch by {error:.1e}")
    return problem


def fresh_rule() -> HierarchicalRule:
    """The default rule, the same in every process."""
    rule = HierarchicalRule()
    rule.reset_parameters(torch.Generator().manual_seed(0))
    return rule


def gate(rule: HierarchicalRule) -> None:
    """Kernel and eager baseline against float64, three steps."""
    kernel, eager = Problem(rule, 3_001, 3), Problem(rule, 3_001, 3)
    exact = copy.deepcopy(rule).double()
    planes, tensors = ([t.double() for t in part] for part in kernel.state[:2])
    state = ProblemState(planes, tensors, [0] * 3, kernel.state.hidden.double())
    params = [param.double() for param in kernel.params]
    for _ in range(3):
        kernel.step()
        eager.eager()
        with torch.no_grad():
            updates, state = exact.reference_step([g.double() for g in kernel.grads], state)
        params = [p + u for p, u in zip(params, updates, strict=True) if u is not None]
    for name, found in (("kernel", kernel.params), ("eager", eager.params)):
        error = max(float((a.double() - b).abs().max()) for a, b in zip(found, params, strict=True))
        require(error < 1e-6, f"{name}: parameters differ from float64 by {error:.1e}")


class Window:
    """A window of ``steps`` on tensors of ``sizes``, and its gradient of the meta-parameters."""

    def __init__(
        self, rule: HierarchicalRule, steps: int = WINDOW, sizes: Sequence[int] = WINDOW_SIZES
    ) -> None:
        generator = torch.Generator().manual_seed(2)
        params = torch.randn(1, sum(sizes), generator=generator)
        self.rule, self.steps, self.sizes = rule, steps, sizes
        self.grads = torch.randn(steps + 1, *params.shape, generator=generator)
        self.weights = torch.ones(steps + 1, 1)
        self.state = rule.init_runs(params, sizes, generator)
        self.meta = rule.flat_parameters().detach().requires_grad_()

    def kernel(self) -> Tensor:
        """By the op."""
        found = fastl2o.ops.unroll_backward(
            self.rule, self.grads, self.state, self.weights, steps=self.steps, sizes=self.sizes
        )
        return found[0]

    def eager(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """By autograd through the reference in eager torch; comes back in float32."""
        leaf, inner, gradients = (t.to(dtype) for t in (self.meta, self.state, self.grads))
        moved, total = torch.zeros_like(gradients[0]), torch.zeros((), dtype=dtype)
        for t in range(self.steps):
            update, inner = self.rule.reference_runs_step(gradients[t], inner, t, self.sizes, leaf)
            moved = moved + update
            total = total + (gradients[t + 1] * moved).sum()
        return torch.autograd.grad(total, self.meta)[0]

    def gate(self) -> None:
        """Both against float64, whose error in float32 is far below the limit."""
        exact = self.eager(torch.float64).double()
        for name, found in (("kernel", self.kernel()), ("eager", self.eager())):
            error = float((found.double() - exact).norm() / exact.norm())
            require(error < 1e-5, f"window: {name} differs from float64 by {error:.1e}")


def measure_memory(contender: str) -> dict[str, Any]:
    """Peak growth of the resident memory in the window's gradient, for this process alone."""
    recorded = Window(fresh_rule())
    extra, gradient = peak_growth(recorded.kernel if contender == "kernel" else recorded.eager)
    return {"extra_kib": extra, "finite": bool(gradient.isfinite().all())}


def memory(title: str) -> list[Figure]:
    """Extra memory of the window's gradient by the kernel and by eager autograd."""
    names = {"kernel": "extra memory", "eager": "extra memory of eager autograd"}
    figures = []
    for contender, name in names.items():
        found = in_own_process(
            "bench.hierarchical", "--memory-of", contender, "--threads", torch.get_num_threads()
        )
        require(found["finite"], f"window: the gradient by {contender} is not finite")
        figures.append(Figure(f"{title}: {name}", found["extra_kib"] * 1024 / 1e6, "MB"))
    times = figures[1].value / figures[0].value
    return [*figures, Figure("window: memory of eager autograd over ours", times, "x")]


def measure(seconds: float) -> list[Figure]:
    """All figures, each contest of about ``seconds``."""
    rule = fresh_rule()
    gate(rule)
    ours, lstm = Problem(rule, 20_000, 50), Buffers(make_rule("lstm"), 20_000, 50)
    one, many = Problem(rule, MILLION, 1), Problem(rule, 1_000, 1_000)
    contest = Contest(
        {
            "ours": ours.step, "eager": Problem(rule, 20_000, 50).eager, "lstm": lstm.step,
            "one": one.step, "many": many.step, "compiled": compiled(rule).eager,
        },
        seconds,
    )  # fmt: skip
    contest.run()
    figures = [
        contest.time("ours", "step, 1e6 parameters in 50 tensors", "ns/parameter", MILLION),
        contest.ratio("eager", "ours", "against eager torch", Target(10.0)),
        contest.ratio("compiled", "ours", "against torch.compile", Target(5.0)),
        contest.ratio("lstm", "ours", "against our LSTM step, per parameter", Target(4.0)),
        contest.ratio("many", "one", "1,000 x 1,000 over 1 x 1,000,000", Target(1.5, False)),
    ]
    sizes = Contest({str(n): Problem(rule, n, 1).step for n in SIZES}, seconds)
    sizes.run()
    figures += [
        sizes.time(str(n), f"step, one tensor of {n:.0e}", "ns/parameter", n) for n in SIZES
    ]
    window = Window(rule)
    window.gate()
    windows = Contest({"kernel": window.kernel, "eager": window.eager}, seconds)
    windows.run()
    count = len(WINDOW_SIZES)
    title = f"window of {WINDOW} steps, {sum(WINDOW_SIZES):,} parameters in {count} tensors"
    figures += [
        windows.time("kernel", title, "ms"),
        windows.ratio("eager", "kernel", "window against eager autograd", Target(8.0)),
        *memory(title),
    ]
    return figures


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m bench.hierarchical", description=__doc__)
    parser.add_argument("--threads", type=int, default=2, help="threads of every contender")
    parser.add_argument("--seconds", type=float, default=25.0, help="of each of three contests")
    parser.add_argument(
        "--memory-of", choices=("kernel", "eager"), help="print the memory of one window as JSON"
    )
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    if arguments.memory_of is not None:
        print(json.dumps(measure_memory(arguments.memory_of)))
        return
    described = ", ".join(f"{key} {value}" for key, value in machine().items())
    text = "\n".join(["# The hierarchical rule on the CPU", "", described, ""])
    text += "\n" + "\n".join(table(measure(arguments.seconds))) + "\n"
    (REPORTS / "hierarchical.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
