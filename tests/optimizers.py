"""The table the optimizer tests run over: rules with what they must equal, options and backends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

import fastl2o
from fastl2o import HierarchicalRule, LearnedOptimizer, LSTMRule, RNNPropRule, Rule

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# A rule that is SGD or Adam works each tanh in its linear part: relative error below
# 4/3 (1e-4 |g|)^2 (gradients here stay below 10), plus float32 roundings over a few dozen steps.
ORACLE = {"rtol": 1e-4, "atol": 1e-6}

# The torch tests that are mirrored, and by what; test_contract.py checks that none is forgotten.
MIRRORED: dict[str, list[str]] = {}

_Test = TypeVar("_Test", bound=Callable[..., Any])


def mirrors(*names: str) -> Callable[[_Test], _Test]:
    """Note which tests of torch (without ``test_``) the decorated one retells."""

    def note(test: _Test) -> _Test:
        for name in names:
            MIRRORED.setdefault(name, []).append(test.__name__)
        return test

    return note


class OptimizerCase(NamedTuple):
    """A rule, and the torch optimizer it equals at learning rate ``lr`` (None: it equals none)."""

    name: str
    rule: Callable[[float], Rule]
    oracle: Callable[[Iterable[Tensor], float], torch.optim.Optimizer] | None
    # torch's expectations that the rule breaks, each with the reason
    exempt: Mapping[str, str] = MappingProxyType({})

    def __repr__(self) -> str:
        return self.name


def _fresh(rule: Rule) -> Rule:
    rule.reset_parameters(torch.Generator().manual_seed(7))
    return rule


# What a rule is exempt from, a row each: the only two expectations of torch's that rules may break.
_DIRECTION = {"forloop_goes_right_direction": "fresh meta-parameters need not lower the loss"}
_ZERO_GRADIENTS = {
    "step_is_noop_for_zero_grads": "biases and recurrent state give an update at g = 0"
}

RULES = (
    OptimizerCase(
        "sgd-linear",
        lambda lr: LSTMRule.as_sgd(lr, num_layers=0),
        lambda params, lr: torch.optim.SGD(params, lr),
    ),
    OptimizerCase(
        "sgd",
        lambda lr: LSTMRule.as_sgd(lr, hidden_size=4),
        lambda params, lr: torch.optim.SGD(params, lr),
    ),
    OptimizerCase(
        "momentum",
        lambda lr: LSTMRule.as_sgd(lr, momentum=0.9, hidden_size=4),
        lambda params, lr: torch.optim.SGD(params, lr, momentum=0.9),
    ),
    OptimizerCase(
        "adam",
        lambda lr: RNNPropRule.as_adam(lr, hidden_size=4),
        lambda params, lr: torch.optim.Adam(params, lr, betas=(0.95, 0.95), eps=1e-8),
    ),
    OptimizerCase("lstm", lambda lr: _fresh(LSTMRule(5)), None, {**_DIRECTION, **_ZERO_GRADIENTS}),
    # its fresh biases are zeros, so it stays where it is without a gradient
    OptimizerCase("rnnprop", lambda lr: _fresh(RNNPropRule(6, num_layers=1)), None, _DIRECTION),
    OptimizerCase(
        "hierarchical",
        lambda lr: _fresh(HierarchicalRule(4, 5, 6, 3)),
        None,
        {**_DIRECTION, **_ZERO_GRADIENTS},
    ),
    OptimizerCase(
        "lstm-identity",
        lambda lr: _fresh(LSTMRule(4, num_layers=1, preprocess="identity")),
        None,
        {**_DIRECTION, **_ZERO_GRADIENTS},
    ),
)
ORACLES = tuple(case for case in RULES if case.oracle is not None)
RANDOM = tuple(case for case in RULES if case.oracle is None)
# Those whose parameters do not talk to each other.
COORDINATE_WISE = tuple(case for case in RANDOM if case.name != "hierarchical")

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"lr": 0.5},
    {"lr": torch.tensor(0.5)},
    {"lr": torch.tensor([0.5])},
    {"weight_decay": 0.1},
    {"maximize": True},
    {"lr": 0.5, "weight_decay": 0.1, "maximize": True},
    {"foreach": True},
    {"foreach": False},
    {"fused": True},
    {"fused": False},
)


def option_id(options: dict[str, Any]) -> str:
    """Readable test id of a row of OPTIONS."""
    return "-".join(f"{k}={v}" for k, v in options.items()).replace(" ", "") or "default"


class Oracle:
    """The torch optimizer of a case at learning rate ``rate``, with fastl2o's ``options``.

    There ``lr`` is a factor on the rate, and weight decay is decoupled.
    """

    def __init__(
        self, case: OptimizerCase, params: Iterable[Tensor], rate: float, **options: Any
    ) -> None:
        assert case.oracle is not None
        self.factor = float(options.get("lr", 1.0))
        self.decay = self.factor * options.get("weight_decay", 0.0)
        self.params = list(params)
        self.inner = case.oracle(self.params, rate * self.factor)
        for group in self.inner.param_groups:
            group["maximize"] = options.get("maximize", False)

    @torch.no_grad()
    def step(self) -> None:
        """Decay, then step."""
        for p in self.params:
            if p.grad is not None:
                p.mul_(1 - self.decay)
        self.inner.step()


@contextmanager
def on_backend(name: str) -> Iterator[str]:
    """Force a backend, and one thread: many small steps lose time to waking others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with fastl2o.backend(name):
            yield name
    finally:
        torch.set_num_threads(threads)


def make_params(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    """Parameters of every awkward shape: 0-dim, empty, a prime length, ranks 1 to 5."""
    shapes = [(), (0,), (1,), (63,), (5, 3), (2, 0, 3), (2, 3, 4), (2, 3, 2, 2), (1, 2, 1, 3, 2)]
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(s, generator=generator, dtype=torch.float32) for s in shapes]
    return [torch.nn.Parameter(tensor.to(dtype)) for tensor in drawn]


def set_grads(params: Iterable[Tensor], seed: int, rounded_to: torch.dtype = torch.float32) -> None:
    """Give every parameter a new gradient, the same for the same seed whatever its dtype."""
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        # dtype given: the default dtype would draw other numbers
        drawn = torch.randn(p.shape, generator=generator, dtype=torch.float32)
        p.grad = drawn.to(rounded_to).to(p.dtype)


def clone_params(params: Iterable[Tensor]) -> list[torch.nn.Parameter]:
    """Return independent copies with the same memory layout."""
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def snapshot(optimizer: LearnedOptimizer) -> list[Tensor]:
    """Copies of all parameters, gradients and state tensors, to compare bit for bit."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = [*params, *(p.grad for p in params if p.grad is not None)]
    shared = [key for key in optimizer.state if isinstance(key, str)]
    for key in [*params, *shared]:
        entry = optimizer.state.get(key, {})
        tensors += [entry[key] for key in sorted(entry) if isinstance(entry[key], Tensor)]
    return [t.detach().clone() for t in tensors]


def assert_same_bits(first: Iterable[Tensor], second: Iterable[Tensor]) -> None:
    """Assert that two lists of tensors are equal bit for bit, NaNs included."""
    for a, b in zip(first, second, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        if a.is_complex():
            a, b = torch.view_as_real(a.detach()), torch.view_as_real(b.detach())
        size = a.element_size()
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
        assert torch.equal(a.detach().contiguous().view(bits), b.detach().contiguous().view(bits))


@contextmanager
def unchanged(optimizer: LearnedOptimizer) -> Iterator[None]:
    """Assert that the block leaves parameters, gradients and state as they are, bit for bit."""
    before, keys = snapshot(optimizer), list(map(id, optimizer.state))
    yield
    assert list(map(id, optimizer.state)) == keys
    assert_same_bits(before, snapshot(optimizer))


def run_steps(
    optimizer: LearnedOptimizer, steps: int, seed: int = 100, backend: str | None = None
) -> None:
    """Take steps with fresh gradients, the same for the same seed."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(steps):
        set_grads(params, seed + step)
        if backend is None:
            optimizer.step()
        else:
            with fastl2o.backend(backend):
                optimizer.step()


def two_groups() -> tuple[list[torch.nn.Parameter], LearnedOptimizer]:
    """Two parameters with gradients, each in a group of its own, before their first step."""
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = LearnedOptimizer(
        [{"params": params[:1]}, {"params": params[1:], "lr": 0.5}], LSTMRule(hidden_size=2)
    )
    for p in params:
        p.grad = torch.ones_like(p)
    return params, optimizer
