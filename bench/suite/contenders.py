"""Optimizers over drawn tensors, as the suite's sections time them: each passes its gate first."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastl2o
from fastl2o.rules import HierarchicalRule, LSTMRule, RNNPropRule, Rule
from fastl2o.rules.hierarchical import ProblemState

from .. import hierarchical
from ..common import available_gib
from ..eager import EagerOptimizer, compiled_optimizer, eager_state
from . import gates, jax_step
from .gates import Contender, Start

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Multiply-adds of a coordinate's step, counted; the levels above the hierarchical rule's
# parameters are not in it.
MACS = {"lstm": 4_980, "rnnprop": 6_460, "hierarchical": 704}
RULES: dict[str, type[Rule]] = {
    "lstm": LSTMRule,
    "rnnprop": RNNPropRule,
    "hierarchical": HierarchicalRule,
}
ADAMS: dict[str, dict[str, Any]] = {
    "Adam, for-loop": {"foreach": False, "fused": False},
    "Adam, foreach": {"foreach": True},
    "Adam, fused": {"fused": True},
}
EAGER, COMPILED = "eager reference", "compiled reference"
# Tensors longer than this repeat their first coordinates, and lists of equal tensors repeat their
# first tensors, so that a gate computes in float64 what is distinct only, at every size.
PERIOD, DISTINCT = 1_000, 10


class Timed(NamedTuple):
    """A step that has passed its gate, so that it may be timed."""

    run: Callable[[], object]
    state_bytes: Callable[[], int]
    gate: str


def make_rule(family: str) -> Rule:
    """The rule of a family at its published size, with its random initialisation."""
    rule = RULES[family]()
    rule.reset_parameters(torch.Generator().manual_seed(0))
    return rule.to(DEVICE)


def kernels() -> tuple[str, ...]:
    """The backends with kernels that are there for this device."""
    names = ("cuda", "triton") if DEVICE == "cuda" else ("cpu",)
    return tuple(name for name in names if not fastl2o.backends.available()[name])


def blocks(sizes: Sequence[int]) -> list[int]:
    """The sizes of what is distinct in tensors of these sizes.

    Only equal tensors repeat: the hierarchical rule's means over all of them are then those over
    the distinct ones.
    """
    if len(set(sizes)) > 1 or (len(sizes) > DISTINCT and len(sizes) % DISTINCT):
        return list(sizes)
    block = sizes[0] if sizes[0] % PERIOD else PERIOD
    return [block] * min(len(sizes), DISTINCT)


def parameters(
    sizes: Sequence[int], dtype: torch.dtype = torch.float32
) -> list[torch.nn.Parameter]:
    """Parameters of these sizes, with gradients."""
    generator = torch.Generator().manual_seed(1)
    drawn = []
    for size in blocks(sizes):
        param = torch.randn(size, generator=generator).to(DEVICE, dtype)
        drawn.append((param, torch.randn(size, generator=generator).mul_(1e-2).to(param)))
    made = []
    for i, size in enumerate(sizes):
        param, grad = (part.repeat(size // part.numel()) for part in drawn[i % len(drawn)])
        made.append(torch.nn.Parameter(param))
        made[-1].grad = grad
    return made


def synchronise() -> None:
    """Wait until a GPU has done what it was given."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def synchronised(call: Callable[[], object]) -> Callable[[], object]:
    """A call that returns when a GPU has done it."""
    if DEVICE == "cpu":
        return call

    def run() -> None:
        call()
        synchronise()

    return run


class Learned:
    """``LearnedOptimizer``, forced to a backend or not."""

    def __init__(
        self,
        family: str,
        sizes: Sequence[int],
        backend: str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.params, self.factor, self.backend = parameters(sizes, dtype), 1.0, backend
        rule = make_rule(family).to(dtype)
        self.optimizer = fastl2o.LearnedOptimizer(self.params, rule, state_dtype=dtype)

    def run(self) -> None:
        with fastl2o.backend(self.backend) if self.backend else nullcontext():
            self.optimizer.step()
        synchronise()

    def begin(self, start: Start) -> None:
        self.run()  # makes the state
        count = len(start.params)
        for i, param in enumerate(self.params):
            entry, block = self.optimizer.state[param], start.params[i % count]
            param.data.view(-1, block.numel()).copy_(block)
            planes = start.planes[i % count]
            entry["planes"].unflatten(1, (-1, block.numel())).copy_(planes.unsqueeze(1))
            if start.hidden is not None:
                entry["tensor"].copy_(start.tensors[i % count])
        if start.hidden is not None:
            self._states()["global/0"]["hidden"].copy_(start.hidden)

    def _states(self) -> dict[Any, Any]:
        """By parameter, and by name what a hierarchical rule's parameters share."""
        return self.optimizer.state  # torch types the keys as parameters only

    def start(self) -> Start:
        """Where this is after a first step."""
        self.run()
        entries = [self.optimizer.state[param] for param in self.params]
        shared = self._states().get("global/0")
        return Start(
            [param.detach().clone() for param in self.params],
            [entry["planes"].clone() for entry in entries],
            [entry["tensor"].clone() for entry in entries if "tensor" in entry],
            None if shared is None else shared["hidden"].clone(),
        )

    def scale(self, factor: float) -> None:
        for param in self.params:
            assert param.grad is not None
            param.grad.mul_(factor / self.factor)
        self.factor = factor

    def parameters(self) -> list[Tensor]:
        return [param.detach() for param in self.params]

    def state_bytes(self) -> int:
        """Bytes of optimizer state, all of it."""
        held: dict[int, int] = {}
        for entry in self.optimizer.state.values():
            for tensor in entry.values():
                held[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return sum(held.values())


class OrdinaryTorch:
    """A coordinate-wise rule by torch's own LSTM cells: no code of fastl2o computes."""

    def __init__(self, made: EagerOptimizer, rule: Rule, sizes: Sequence[int]) -> None:
        self.made, self.rule, self.sizes, self.factor = made, rule, list(sizes), 1.0
        self.run = made.step

    def begin(self, start: Start) -> None:
        whole = start.repeated(self.sizes)
        self.made.param.copy_(torch.cat(whole.params))
        self.made.state = eager_state(self.rule, torch.cat(whole.planes, dim=1).to(self.made.param))
        self.made.taken.fill_(1.0)

    def scale(self, factor: float) -> None:
        self.made.grad.mul_(factor / self.factor)
        self.factor = factor

    def parameters(self) -> list[Tensor]:
        return list(self.made.param.split(self.sizes))

    def state_bytes(self) -> int:
        """Bytes of optimizer state, all of it."""
        parts = (*self.made.state, self.made.taken)
        return sum(part.numel() * part.element_size() for part in parts)


class CompiledProblem:
    """The hierarchical rule's reference under ``torch.compile``."""

    def __init__(self, problem: hierarchical.Problem, sizes: Sequence[int]) -> None:
        self.problem, self.sizes, self.run = problem, list(sizes), problem.eager
        self.drawn = [param.grad for param in parameters(sizes)]

    def begin(self, start: Start) -> None:
        whole = start.repeated(self.sizes)
        assert whole.hidden is not None
        self.problem.params = whole.params
        self.problem.state = ProblemState(
            whole.planes, whole.tensors, [1] * len(self.sizes), whole.hidden.clone()
        )

    def scale(self, factor: float) -> None:
        for grad, drawn in zip(self.problem.grads, self.drawn, strict=True):
            assert drawn is not None
            grad.copy_(drawn).mul_(factor)

    def parameters(self) -> list[Tensor]:
        return self.problem.params

    def state_bytes(self) -> int:
        """Bytes of optimizer state, all of it."""
        state = self.problem.state
        parts = (*state.planes, *state.tensors, state.hidden)
        return sum(part.numel() * part.element_size() for part in parts)


def gate(what: str, family: str, contender: Contender, sizes: Sequence[int]) -> str:
    """Steps of a contender on ``sizes`` against plain torch in float64.

    That is torch's own LSTM cells where the rule has such, and the reference of the hierarchical
    rule. A first step is left out: all begin in the state that the reference has after it.

    Raises:
        AssertionError: it is off; nothing is to be timed then.
    """
    own = blocks(sizes)
    plain = Learned(family, own, "reference")
    start = plain.start()
    exact: Contender
    if family == "hierarchical":
        exact = Learned(family, own, "reference", torch.float64)
    else:
        exact = _ordinary(family, own, torch.float64)
    for each in (exact, contender):
        each.begin(start)
    return gates.steps(what, contender, plain, exact)


def _ordinary(family: str, sizes: Sequence[int], dtype: torch.dtype) -> OrdinaryTorch:
    drawn, rule = parameters(sizes, dtype), make_rule(family)
    grads = [param.grad for param in drawn if param.grad is not None]
    made = EagerOptimizer(rule, torch.cat([param.detach() for param in drawn]), torch.cat(grads))
    made.net.to(DEVICE, dtype)
    made.taken = made.taken.to(DEVICE, dtype)
    return OrdinaryTorch(made, rule, sizes)


def learned(family: str, sizes: Sequence[int], backend: str | None = None) -> Timed:
    """A step of ``LearnedOptimizer``, forced to a backend or not."""
    made, on = Learned(family, sizes, backend), "" if backend is None else f" on {backend}"
    what = f"{family}{on}, {len(sizes):,} x {sizes[0]:,} coordinates"
    return Timed(made.run, made.state_bytes, gate(what, family, made, sizes))


def adam(name: str, sizes: Sequence[int]) -> Timed:
    """A step of one of torch's Adams."""
    params = parameters(sizes)
    with torch.no_grad():
        for param in params:
            param.mul_(1e-2)  # or the roundoff of parameters would hide errors of small steps
    optimizer = torch.optim.Adam(params, **ADAMS[name])
    drawn = [param.grad.clone() for param in params if param.grad is not None]

    def step_with(factor: float) -> None:
        for param, grad in zip(params, drawn, strict=True):
            param.grad = grad * factor
        optimizer.step()

    def state_bytes() -> int:
        averages = gates.adam_state(optimizer)
        return sum(average.numel() * average.element_size() for average in averages)

    steps = [partial(step_with, factor) for factor in gates.FACTORS]
    state = partial(gates.adam_state, optimizer)
    passed = gates.following(name, params, steps, gates.adam_follower, state)
    return Timed(synchronised(optimizer.step), state_bytes, passed)


def compiled(family: str, sizes: Sequence[int]) -> Timed | str:
    """A step of the rule in plain torch under ``torch.compile``, or why there is none."""
    if DEVICE != "cpu":
        return "the compiled reference is timed on the CPU only"
    made: OrdinaryTorch | CompiledProblem
    if family == "hierarchical":
        rule = hierarchical.fresh_rule()
        try:
            problem = hierarchical.compiled_ungated(rule, sizes[0], len(sizes))
        except Exception as error:  # whatever the tool chain lacks
            return f"torch.compile does not work here: {type(error).__name__}"
        made = CompiledProblem(problem, sizes)
    else:
        start = _ordinary(family, sizes, torch.float32)
        found = compiled_optimizer(start.rule, start.made.param, start.made.grad)
        if isinstance(found, str):
            return found
        made = OrdinaryTorch(found, start.rule, sizes)
    return Timed(made.run, made.state_bytes, gate(f"{family}, compiled", family, made, sizes))


def jitted(family: str, sizes: Sequence[int]) -> Timed:
    """A step of the rule under ``jax.jit``, where JAX is installed."""
    grads = [param.grad for param in parameters(sizes) if param.grad is not None]
    made = jax_step.Jitted(make_rule(family), grads)
    return Timed(made.run, made.state_bytes, gate(f"{family}, JAX", family, made, sizes))


def available_bytes() -> float:
    """Memory that tensors can take where the suite's are."""
    if DEVICE == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    return available_gib() * 2**30


def needed_bytes(family: str, size: int) -> int:
    """What a row of so many coordinates needs at its peak, counted.

    Parameter, gradient and state; a hierarchical state is drawn beside the zeros that it is put
    into. On 10,000,000 coordinates the resident memory grew by 328, 336 and 164 bytes for each of
    the three rules; these are 328, 336 and 164.
    """
    planes = make_rule(family).state_planes
    floats = planes + 2 + (planes + 1 if family == "hierarchical" else 0)
    return 4 * floats * size


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
