"""Tables and helpers that every test file shares: rules, shapes, gradients, windows, tolerance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fastl2o
from fastl2o import backends
from fastl2o.rules import Rule, from_config

SetVariable = Callable[[str, str | None], None]  # the fixture set_variable


@dataclass(frozen=True)
class RuleCase:
    """A rule configuration with a readable test id."""

    name: str
    family: str
    config: dict[str, Any]

    def make(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> Rule:
        """The rule with meta-parameters none of which is zero, the same for every dtype."""
        rule = from_config(self.family, self.config).double()
        generator = torch.Generator().manual_seed(seed)
        rule.reset_parameters(generator)
        with torch.no_grad():
            for parameter in rule.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                # Rounded through float32, so that a float64 rule is exactly its float32 twin.
                parameter.copy_((parameter + 0.1 * noise).float())
        return rule.to(dtype)

    def __str__(self) -> str:
        return self.name


def _lstm(name: str, **config: Any) -> RuleCase:
    return RuleCase(f"lstm-{name}", "lstm", config)


def _rnnprop(name: str, **config: Any) -> RuleCase:
    return RuleCase(f"rnnprop-{name}", "rnnprop", config)


# The published configurations and the edges of what the constructors accept.
RULE_CASES = (
    _lstm("20x2"),
    _lstm("20x2-identity", preprocess="identity", output_scale=1.0),
    _lstm("20x2-deepmind", p=5.0, eps=2.0**-23, output_scale=0.01),
    _lstm("linear", num_layers=0),
    _lstm("linear-identity", num_layers=0, preprocess="identity"),
    _lstm("1x1", hidden_size=1, num_layers=1),
    _lstm("7x3", hidden_size=7, num_layers=3, eps=1e-8),
    _lstm("64x1", hidden_size=64, num_layers=1),
    _rnnprop("20x2"),
    _rnnprop("1x1", hidden_size=1, num_layers=1),
    _rnnprop("7x3", hidden_size=7, num_layers=3, beta1=0.9, beta2=0.999, step_size=0.01),
    _rnnprop("5x1-no-momentum", hidden_size=5, num_layers=1, beta1=0.0),
)
# Small enough for gradcheck and opcheck, and still every branch of the maths.
SMALL_RULE_CASES = (
    _lstm("3x2", hidden_size=3, num_layers=2),
    _lstm("2x1-identity", hidden_size=2, num_layers=1, preprocess="identity"),
    _lstm("linear", num_layers=0, p=5.0, eps=1e-3),
    _rnnprop("3x2", hidden_size=3, num_layers=2),
    _rnnprop("2x1", hidden_size=2, num_layers=1, beta1=0.8, beta2=0.99),
)
over_rules = pytest.mark.parametrize("case", RULE_CASES, ids=str)
over_small_rules = pytest.mark.parametrize("case", SMALL_RULE_CASES, ids=str)

# All ranks from 0 to 5, empty ones, and odd sizes.
SHAPES = (
    (),
    (0,),
    (1,),
    (63,),
    (500,),
    (3, 0, 2),
    (5, 3),
    (2, 3, 4),
    (2, 1, 3, 2),
    (1, 2, 2, 1, 3),
)
SIZES = (1, 63, 500, 1000)
GRADIENT_KINDS = ("normal", "wide", "zeros", "denormal", "mixed", "scaled-rows")


def tricky_gradients(
    kind: str,
    shape: tuple[int, ...],
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Gradients of `kind`, one of GRADIENT_KINDS or "nonfinite".

    wide: magnitudes over 10^-12..10^4 with random signs. denormal: below the smallest normal
    float32. mixed: all of these and zeros, side by side. scaled-rows: the first axis spans 10^-6 to
    10^6. nonfinite: normal with some NaN, Inf and -Inf.
    """
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    magnitudes = 10.0 ** (16 * torch.rand(shape, generator=generator, dtype=torch.float64) - 12)
    wide = normal.sign() * magnitudes
    choice = torch.randint(5, shape, generator=generator)
    if kind == "normal":
        made = normal
    elif kind == "wide":
        made = wide
    elif kind == "zeros":
        made = torch.zeros(shape, dtype=torch.float64)
    elif kind == "denormal":
        made = normal * 1e-39
    elif kind == "mixed":
        made = torch.where(choice == 0, normal, wide)
        made = torch.where(choice == 1, 0.0, torch.where(choice == 2, normal * 1e-39, made))
    elif kind == "scaled-rows":
        rows = shape[0] if shape else 1
        scale = torch.logspace(-6, 6, rows, dtype=torch.float64)
        made = normal * (scale.view(-1, *(1,) * (len(shape) - 1)) if shape else scale[0])
    elif kind == "nonfinite":
        made = torch.where(choice == 0, torch.nan, torch.where(choice == 1, torch.inf, normal))
        made = torch.where(choice == 2, -torch.inf, made)
    else:
        raise ValueError(f"unknown kind of gradient: {kind!r}")
    return made.to(dtype)


def random_state(
    rule: Rule,
    shape: tuple[int, ...],
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """A state such as steps leave behind: |h| < 1, RNNprop's second moment positive."""
    state = torch.randn((rule.state_planes, *shape), generator=generator, dtype=torch.float64)
    state = 0.9 * torch.tanh(state)
    if rule.family == "rnnprop":
        state[1] = state[1].square() + 0.01
    return state.to(dtype)


class Lists:
    """Parameters, gradients, states and steps of a rule, over all shapes."""

    def __init__(
        self, rule: Rule, kind: str = "normal", dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.params = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
        self.grads = [tricky_gradients(kind, shape, generator, dtype) for shape in SHAPES]
        self.states = [random_state(rule, shape, generator) for shape in SHAPES]
        self.steps = [torch.tensor(float(k)) for k in range(len(SHAPES))]

    def all(self) -> list[Tensor]:
        return [*self.params, *self.grads, *self.states, *self.steps]

    def copy(self) -> list[Tensor]:
        return [tensor.clone() for tensor in self.all()]

    def run(self, rule: Rule, **options: object) -> None:
        fastl2o.ops.step_(rule, self.params, self.grads, self.states, self.steps, **options)


def same_bits(left: list[Tensor], right: list[Tensor]) -> bool:
    """Equal to the last bit, NaN included."""
    return all(_bits(a) == _bits(b) for a, b in zip(left, right, strict=True))


def _bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()


class Window(NamedTuple):
    """The recorded inputs of one unroll."""

    grads: Tensor  # (K, R, D)
    state: Tensor  # (S, R, D)
    loss_weights: Tensor  # (K, R)
    steps: int
    step: int  # steps taken before

    def to(self, dtype: torch.dtype) -> Window:
        """The same numbers in another dtype."""
        return self._replace(
            grads=self.grads.to(dtype),
            state=self.state.to(dtype),
            loss_weights=self.loss_weights.to(dtype),
        )


def random_window(
    rule: Rule,
    *,
    steps: int,
    runs: int = 2,
    dim: int = 5,
    last: bool = True,
    step: int = 3,
    kind: str = "normal",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Window:
    """A window of random gradients, float32 numbers in any dtype; `last` adds g_T."""
    generator = torch.Generator().manual_seed(seed)
    rows = steps + 1 if last else steps
    return Window(
        tricky_gradients(kind, (rows, runs, dim), generator, torch.float32).to(dtype),
        random_state(rule, (runs, dim), generator, torch.float32).to(dtype),
        torch.rand((rows, runs), generator=generator, dtype=torch.float32).to(dtype),
        steps,
        step,
    )


def autograd_unroll(
    rule: Rule, window: Window, *, lr: float = 1.0, weight_decay: float = 0.0
) -> tuple[Tensor, Tensor]:
    """d_meta and d_state of a window by autograd through the reference step, in its dtype.

    The task gradients are constants, so each loss may be replaced by its linear part g_t . theta_t.
    """
    meta = rule.flat_parameters().detach().to(window.grads.dtype).requires_grad_()
    state = window.state.clone().requires_grad_()
    theta = torch.zeros_like(window.grads[0])
    planes, loss = state, (state * 0).sum() + (meta * 0).sum()
    for t in range(window.steps):
        update, planes = rule.reference_step(window.grads[t], planes, window.step + t, meta)
        theta = (1 - lr * weight_decay) * theta + lr * update
        if t + 1 < window.grads.shape[0]:
            weighted = window.loss_weights[t + 1].unsqueeze(1) * window.grads[t + 1]
            loss = loss + (weighted * theta).sum()
    d_meta, d_state = torch.autograd.grad(loss, (meta, state))
    return d_meta, d_state


def assert_as_accurate(
    result: Tensor, plain: Tensor, exact: Tensor, what: str = "result", *, norm: bool = False
) -> None:
    """The one tolerance: max |K - R| <= 2 max |P - R| + 2 roundoff of R in K's dtype.

    Args:
        result: K, what a kernel computed.
        plain: P, what plain torch computes in the same dtype.
        exact: R, the reference in float64 on the same inputs.
        what: name for the message.
        norm: measure all three in the 2-norm. For sums over a window: the worst entry alone is
            decided by its most sensitive coordinate, where plain torch may just be lucky.

    NaN and infinities must be where the exact result has them.
    """
    assert result.shape == exact.shape, f"{what}: shape {result.shape}, expected {exact.shape}"
    values, others, target = (part.detach().double() for part in (result, plain, exact))
    special = ~torch.isfinite(target)
    assert torch.equal(torch.isnan(values), torch.isnan(target)), f"{what}: NaN in other places"
    if special.any():
        same = torch.nan_to_num(values[special]) == torch.nan_to_num(target[special])
        assert bool(same.all()), f"{what}: infinities in other places"
    values, others, target = values[~special], others[~special], target[~special]
    if target.numel() == 0:
        return
    order = 2 if norm else float("inf")
    error = float(torch.linalg.vector_norm(values - target, order))
    plain_error = float(torch.linalg.vector_norm(others - target, order))
    roundoff = torch.finfo(result.dtype).eps * float(torch.linalg.vector_norm(target, order))
    limit = 2 * plain_error + 2 * roundoff
    assert error <= limit, (
        f"{what}: error {error:.3g} exceeds {limit:.3g} "
        f"(plain torch is off by {plain_error:.3g}, roundoff is {roundoff:.3g})"
    )


def relative_error(result: Tensor, exact: Tensor) -> float:
    """max |result - exact| / max |exact|, 0 for empty tensors."""
    if exact.numel() == 0:
        return 0.0
    result, exact = result.detach().double(), exact.detach().double()
    return float((result - exact).abs().max()) / (float(exact.abs().max()) or 1.0)


def present_backends() -> tuple[str, ...]:
    """The backends that this installation can run on the CPU."""
    return tuple(name for name in ("reference", "cpu") if not backends.available()[name])


over_backends = pytest.mark.parametrize("backend", present_backends())
needs_cpu_kernels = pytest.mark.skipif(
    "cpu" not in present_backends(), reason=fastl2o.backends.available()["cpu"] or "never"
)
