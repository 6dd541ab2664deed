"""Optimizers over drawn tensors, as the suite's sections time them, and their gates."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastl2o
from fastl2o.rules import HierarchicalRule, LSTMRule, RNNPropRule, Rule

from .. import hierarchical, step
from ..common import require
from ..eager import EagerOptimizer, compiled_optimizer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Multiply-adds of a coordinate's step, counted; the levels above the hierarchical rule's
# parameters are not in it.
MACS = {"lstm": 4_980, "rnnprop": 6_460, "hierarchical": 704}
RULES: dict[str, type[Rule]] = {
    "lstm": LSTMRule,
    "rnnprop": RNNPropRule,
    "hierarchical": HierarchicalRule,
}
ADAMS: dict[str, dict[str, bool]] = {
    "Adam, for-loop": {"foreach": False, "fused": False},
    "Adam, foreach": {"foreach": True},
    "Adam, fused": {"fused": True},
}
EAGER, COMPILED = "eager reference", "compiled reference"


def make_rule(family: str) -> Rule:
    """The rule of a family at its published size, with its random initialisation."""
    rule = RULES[family]()
    rule.reset_parameters(torch.Generator().manual_seed(0))
    return rule.to(DEVICE)


def kernels() -> tuple[str, ...]:
    """The backends with kernels that are there for this device."""
    names = ("cuda", "triton") if DEVICE == "cuda" else ("cpu",)
    return tuple(name for name in names if not fastl2o.backends.available()[name])


def parameters(sizes: Sequence[int]) -> list[torch.nn.Parameter]:
    """Parameters of these sizes, with gradients."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for size in sizes:
        param = torch.nn.Parameter(torch.randn(size, generator=generator).to(DEVICE))
        param.grad = torch.randn(size, generator=generator).mul_(1e-2).to(DEVICE)
        made.append(param)
    return made


def synchronised(call: Callable[[], object]) -> Callable[[], object]:
    """A call that returns when a GPU has done it."""
    if DEVICE == "cpu":
        return call

    def run() -> None:
        call()
        torch.cuda.synchronize()

    return run


def learned(family: str, sizes: Sequence[int], backend: str | None = None) -> Callable[[], object]:
    """A step of ``LearnedOptimizer``, forced to a backend or not."""
    optimizer = fastl2o.LearnedOptimizer(parameters(sizes), make_rule(family))

    def run() -> None:
        with fastl2o.backend(backend) if backend else nullcontext():
            optimizer.step()

    return synchronised(run)


def adam(sizes: Sequence[int], options: dict[str, bool]) -> Callable[[], object]:
    """A step of torch's Adam."""
    return synchronised(torch.optim.Adam(parameters(sizes), **options).step)


def compiled(family: str, sizes: Sequence[int]) -> Callable[[], object] | str:
    """A step of the rule in plain torch under ``torch.compile``, or why there is none."""
    if DEVICE != "cpu":
        return "the compiled reference is timed on the CPU only"
    if family == "hierarchical":
        try:
            problem = hierarchical.compiled(hierarchical.fresh_rule(), sizes[0], len(sizes))
        except Exception as error:  # whatever the tool chain lacks
            return f"torch.compile does not work here: {type(error).__name__}"
        return problem.eager
    start, check = (step.Buffers(step.make_rule(family), sum(sizes)) for _ in range(2))
    made = compiled_optimizer(start.rule, start.params[0], start.grads[0])
    if isinstance(made, str):
        return made
    eager = EagerOptimizer(check.rule, check.params[0], check.grads[0])
    for _ in range(3):
        eager.step()
    error = float((made.param - eager.param).abs().max())
    require(error < 1e-4, f"{family}: the compiled step differs from eager torch by {error:.1e}")
    return made.step


def gate(family: str, sizes: Sequence[int] = (1, 3_001, 70)) -> None:
    """Every backend's three steps against the reference in float64.

    Raises:
        AssertionError: one is off; nothing is to be timed then.
    """
    exact_rule = make_rule(family).double()
    exact = [torch.nn.Parameter(p.detach().double()) for p in parameters(sizes)]
    for p, like in zip(exact, parameters(sizes), strict=True):
        assert like.grad is not None
        p.grad = like.grad.double()
    reference = fastl2o.LearnedOptimizer(exact, exact_rule, state_dtype=torch.float64)
    with fastl2o.backend("reference"):
        for _ in range(3):
            reference.step()
    for backend in ("reference", *kernels()):
        params = parameters(sizes)
        optimizer = fastl2o.LearnedOptimizer(params, make_rule(family))
        with fastl2o.backend(backend):
            for _ in range(3):
                optimizer.step()
        error = max(
            float((p.detach().double() - q.detach()).abs().max())
            for p, q in zip(params, exact, strict=True)
        )
        require(error < 2e-5, f"{family} on {backend}: off by {error:.1e} from float64")


def state_bytes(family: str, sizes: Sequence[int]) -> float:
    """Bytes of optimizer state for each parameter, all of it."""
    optimizer = fastl2o.LearnedOptimizer(parameters(sizes), make_rule(family))
    optimizer.step()
    held: dict[int, int] = {}
    for entry in optimizer.state.values():
        for tensor in entry.values():
            held[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    return sum(held.values()) / sum(sizes)


def allocations(call: Callable[[], object]) -> int:
    """Allocations of tensor memory in a call after the first."""
    call()
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    return sum(event.name() == "[memory]" and event.nbytes() > 0 for event in events)


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def launches(call: Callable[[], object]) -> int:
    """Kernel launches of a call on a GPU; on the CPU, the ops that it calls."""
    call()
    if DEVICE == "cuda":
        with torch.profiler.profile() as profile:
            call()
        on_device = torch.autograd.DeviceType.CUDA
        events = profile.profiler.kineto_results.events()
        return sum(event.device_type() == on_device for event in events)
    with _Counter() as counter, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call()
    return counter.calls
