"""What a row of the suite passes before it is timed: a few of its own steps, in float64.

A gate takes steps of the very contender that is timed, and of the same computation in plain torch
in float32 and in float64. The contender may be as far from float64 as the tests allow a kernel to
be: twice as far as plain torch in float32, and two roundoffs. Gradients differ from step to step;
with constant ones, Adam's two averages would be right with any decay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from tests.common import assert_as_accurate

from ..common import relative_errors, require

FACTORS = (-0.5, 2.0, 0.25)
"""Of the drawn gradients, one a step; powers of two, so that multiplying them rounds nothing."""
STEPS = len(FACTORS)
FLOAT64 = f"{STEPS} steps against plain torch in float64"
# What float32 may lose in these steps. Beyond it the yardstick itself, plain torch in float32, is
# not the same computation as float64's, and says nothing about others.
PLAIN_LIMIT = 2e-5
# The same for a window's gradient, relative, in the 2-norm.
GRADIENT_LIMIT = 1e-3


class Start(NamedTuple):
    """Where the steps of a rule's gate begin: after the first, for each distinct tensor."""

    params: list[Tensor]  # (n,) each
    planes: list[Tensor]  # (S, n) each
    tensors: list[Tensor]  # of each tensor as a whole: the hierarchical rule's, else none
    hidden: Tensor | None  # of all tensors together: the hierarchical rule's

    def repeated(self, sizes: Sequence[int]) -> Start:
        """The same for tensors of ``sizes``, which repeat the distinct ones."""
        count = len(self.params)

        def along(values: list[Tensor]) -> list[Tensor]:
            own = [values[i % count] for i in range(len(sizes))]
            return [
                block.repeat(*(1,) * (block.dim() - 1), size // block.shape[-1])
                for block, size in zip(own, sizes, strict=True)
            ]

        wholes = [self.tensors[i % count].clone() for i in range(len(sizes)) if self.tensors]
        return Start(along(self.params), along(self.planes), wholes, self.hidden)


class Contender(Protocol):
    """A step of a rule that can be gated and timed."""

    def run(self) -> object:
        """One step; what is timed."""

    def begin(self, start: Start) -> None:
        """Take over parameters and state, repeated as often as there are coordinates."""

    def scale(self, factor: float) -> None:
        """Make the gradients ``factor`` times the drawn ones."""

    def parameters(self) -> list[Tensor]:
        """Of every tensor ``(n,)``, in their order."""


def as_accurate(what: str, result: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Parameters and states, by the tests' tolerance; ``plain`` must be close to ``exact``.

    Raises:
        AssertionError: one is off; nothing is to be timed then.
    """
    off = float((plain.detach().double() - exact.detach()).abs().max())
    require(off < PLAIN_LIMIT, f"{what}: plain torch is itself off by {off:.1e} from float64")
    _within_tolerance(what, result, plain, exact, norm=False)


def gradient(what: str, result: Tensor, plain: Tensor, exact: Tensor) -> None:
    """The gradient of a window, by the same in the 2-norm."""
    off, _ = relative_errors(plain, exact)
    require(off < GRADIENT_LIMIT, f"{what}: plain torch is itself off by {off:.1e} from float64")
    _within_tolerance(what, result, plain, exact, norm=True)


def _within_tolerance(
    what: str, result: Tensor, plain: Tensor, exact: Tensor, *, norm: bool
) -> None:
    try:
        assert_as_accurate(result, plain, exact, what, norm=norm)
    except AssertionError as error:
        require(False, str(error))


def _extremes(tensors: Sequence[Tensor], like: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The least and the greatest of what repeats each coordinate of ``like``; NaN where one is."""
    low, high = [], []
    for i, block in enumerate(like):
        own = [tensor.detach().view(-1, block.numel()) for tensor in tensors[i :: len(like)]]
        tiles = own[0] if len(own) == 1 else torch.cat(own)
        low.append(tiles.amin(dim=0))
        high.append(tiles.amax(dim=0))
    return torch.cat(low), torch.cat(high)


def steps(what: str, contender: Contender, plain: Contender, exact: Contender) -> str:
    """Steps of a contender whose tensors repeat those of ``plain`` and ``exact``.

    All three are to begin alike. What is compared is every coordinate: the least and the greatest
    of all repetitions of each.

    Returns:
        What the gate was, for the row.
    """
    for factor in FACTORS:
        for each in (plain, exact, contender):
            each.scale(factor)
            each.run()
    contender.scale(1.0)
    blocks = exact.parameters()
    for side in _extremes(contender.parameters(), blocks):
        as_accurate(what, side, torch.cat(plain.parameters()), torch.cat(blocks))
    return FLOAT64


class PlainAdam:
    """Adam as its paper has it (arXiv 1412.6980, algorithm 1), in the dtype of the parameters."""

    def __init__(
        self,
        params: Sequence[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.params, self.lr, self.betas, self.eps = list(params), lr, betas, eps
        self.averages = [torch.zeros_like(param) for param in self.params]
        self.squares = [torch.zeros_like(param) for param in self.params]
        self.taken = 0

    @torch.no_grad()
    def step(self) -> None:
        """One step with the gradients of the parameters."""
        self.taken += 1
        beta1, beta2 = self.betas
        for param, m, v in zip(self.params, self.averages, self.squares, strict=True):
            assert param.grad is not None
            m.copy_(beta1 * m + (1 - beta1) * param.grad)
            v.copy_(beta2 * v + (1 - beta2) * param.grad * param.grad)
            unbiased = m / (1 - beta1**self.taken)
            scale = (v / (1 - beta2**self.taken)).sqrt() + self.eps
            param.sub_(self.lr * unbiased / scale)


class Follower(NamedTuple):
    """An optimizer that takes the gradients of another's parameters."""

    params: list[nn.Parameter]
    step: Callable[[], object]
    state: Callable[[], list[Tensor]]  # what is compared besides parameters


Follow = Callable[[list[nn.Parameter]], Follower]
"""Makes a follower of parameters, which come in float32 and in float64."""


def adam_follower(params: list[nn.Parameter]) -> Follower:
    """Plain Adam, whose two averages are compared too."""
    made = PlainAdam(params)
    return Follower(params, made.step, lambda: [_joined(made.averages), _joined(made.squares)])


def adam_state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The two averages of torch's Adam."""
    entries = [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]
    return [_joined([entry[name] for entry in entries]) for name in ("exp_avg", "exp_avg_sq")]


def following(
    what: str,
    params: Sequence[nn.Parameter],
    steps: Iterable[Callable[[], Any]],
    follow: Follow,
    state: Callable[[], list[Tensor]] = list,
) -> str:
    """Steps of an optimizer, and of the same in plain torch with the gradients that it met.

    The followers' gradients are those that each step leaves in ``params``: two trainings with
    gradients of their own would part by roundoff, most where Adam divides noise by noise, and a
    tolerance that allows for that would allow for wrong optimizers too.

    Args:
        what: name for messages.
        params: what the optimizer steps.
        steps: each takes one step.
        follow: makes the same optimizer in plain torch.
        state: of the optimizer, to be compared besides the parameters.

    Returns:
        What the gate was, for the row.
    """
    plain, exact = (
        follow([nn.Parameter(p.detach().to(dtype, copy=True)) for p in params])
        for dtype in (torch.float32, torch.float64)
    )
    for step in steps:
        step()
        for follower in (plain, exact):
            for own, param in zip(follower.params, params, strict=True):
                assert param.grad is not None
                own.grad = param.grad.to(own.dtype, copy=True)
            follower.step()
    as_accurate(what, _joined(params), _joined(plain.params), _joined(exact.params))
    for ours, theirs, true in zip(state(), plain.state(), exact.state(), strict=True):
        as_accurate(f"{what}, state", ours, theirs, true)
    return FLOAT64


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def finite(what: str, loss: Tensor) -> None:
    """A loss that is neither NaN nor infinite."""
    value = float(loss)
    require(math.isfinite(value), f"{what}: the loss is {value}")
