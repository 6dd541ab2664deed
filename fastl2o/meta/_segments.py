"""Long windows in segments: of all but the last only the beginnings are kept, and replayed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import ops
from .._ops_reference import adjoints_
from .unroll import Progress, Window, roll, run_window

if TYPE_CHECKING:
    from ..rules import Rule

__all__ = ["SegmentedWindow", "least_memory"]


def least_memory(progress: Progress, steps: int) -> int:
    """The number of segments at which a window's beginnings and one segment's record are smallest.

    A beginning is the state, parameters and gradients, P + 2 numbers a coordinate; a step's record
    is a gradient, or two where f's are others. S (P + 2) + T / S is least at S^2 = T / (P + 2).
    """
    planes = progress.state.numel() / max(1, progress.params.numel())
    records = 2 if progress.two_gradients else 1
    return max(1, round(math.sqrt(records * steps / (planes + 2))))


@dataclass(frozen=True)
class _Mark:
    """Where a segment began, with tensors of its own, and its generators' states."""

    progress: Progress
    randomness: Sequence[Tensor]

    @classmethod
    def of(cls, progress: Progress) -> _Mark:
        # Losses and gradients are replaced by steps, not changed.
        own = replace(progress, params=progress.params.clone(), state=progress.state.clone())
        return cls(own, [generator.get_state() for generator in progress.generators()])


@dataclass(frozen=True)
class _Upstream:
    """What the backward pass of a segment hands to the segment before."""

    d_state: Tensor  # of the state where the segment began
    adjoint: Tensor  # (R, D): of its first parameters, or of the next if f has own gradients
    grads: Tensor  # (R, D): that the rule saw first, which the replay must end with


class SegmentedWindow:
    """A window of inner steps whose gradients are recorded one segment at a time.

    ``forward`` advances the runs; ``backward`` then goes through the last segment, and through the
    others, last to first, each replayed from its beginning.

    Args:
        rule: the rule that takes the steps.
        progress: where the runs stand; ``forward`` advances it.
        steps: T.
        segments: S, from 1 to T; 1 records all and replays nothing.
        lr, weight_decay: theta' = (1 - lr * weight_decay) * theta + lr * u.
    """

    def __init__(
        self,
        rule: Rule,
        progress: Progress,
        steps: int,
        segments: int,
        lr: float,
        weight_decay: float,
    ) -> None:
        self._rule, self._progress = rule, progress
        self._bounds = [steps * i // segments for i in range(segments + 1)]
        self._lr, self._weight_decay = lr, weight_decay
        self._marks: list[_Mark] = []
        self._last: Window | None = None

    def forward(self) -> Tensor:
        """Take the steps; the losses ``(T + 1, R)``."""
        progress, losses = self._progress, [self._progress.losses.unsqueeze(0)]
        lengths = [end - start for start, end in pairwise(self._bounds)]
        for length in lengths[:-1]:
            self._marks.append(_Mark.of(progress))
            losses.append(
                roll(self._rule, progress, length, lr=self._lr, weight_decay=self._weight_decay)[1:]
            )
        self._last = run_window(
            self._rule, progress, lengths[-1], lr=self._lr, weight_decay=self._weight_decay
        )
        return torch.cat([*losses, self._last.losses[1:]])

    def backward(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the meta-parameters ``(M,)`` and of the window's first state.

        Once only: the records are used up.

        Args:
            weights: ``(T + 1, R)``, the derivatives of the meta-loss by f_0 .. f_T.
        """
        assert self._last is not None
        window, self._last = self._last, None
        spans = list(pairwise(self._bounds))
        start, end = spans.pop()
        d_meta, upstream = self._segment(window, weights[start : end + 1], None)
        with _kept(self._progress):
            while spans:
                del window
                start, end = spans.pop()
                window = self._replay(end - start, upstream)
                d_segment, upstream = self._segment(window, weights[start : end + 1], upstream)
                d_meta = d_meta + d_segment
        return d_meta, upstream.d_state

    def _replay(self, steps: int, upstream: _Upstream) -> Window:
        mark = self._marks.pop()
        for generator, state in zip(mark.progress.generators(), mark.randomness, strict=True):
            generator.set_state(state)
        window = run_window(
            self._rule, mark.progress, steps, lr=self._lr, weight_decay=self._weight_decay
        )
        if not torch.allclose(window.grads[-1], upstream.grads, rtol=0, atol=0, equal_nan=True):
            raise RuntimeError(
                f"a {type(mark.progress.run).__name__} did not give the same gradients when its "
                "steps were replayed; it must be deterministic and list in generators() all that "
                "it draws from, or be trained with segments=1"
            )
        return window

    def _segment(
        self, window: Window, weights: Tensor, later: _Upstream | None
    ) -> tuple[Tensor, _Upstream]:
        """Gradient of the meta-parameters through one segment, whose record is used up."""
        run, grads, measured = self._progress.run, window.grads, window.loss_grads
        keep = 1.0 - self._lr * self._weight_decay
        seen = grads[0].clone()
        upstream: dict[str, Tensor] = {}
        if measured is not None:
            after = None if later is None else later.adjoint
            adjoints = adjoints_(measured, weights[1:], keep, after)
            first = adjoints[0].clone()
            upstream["d_updates"] = adjoints.mul_(self._lr)
        else:
            if later is not None:
                # In the place of the last gradient, which the later segment counted.
                weights = weights.clone()
                grads[-1], weights[-1] = later.adjoint, 1.0
            upstream["loss_weights"] = weights
        if later is not None:
            upstream["d_last_state"] = later.d_state
        d_meta, d_state = ops.unroll_backward(
            self._rule,
            grads,
            window.state,
            **upstream,
            steps=len(grads) - 1,
            step=window.step,
            sizes=run.tensor_sizes,
            lr=self._lr,
            weight_decay=self._weight_decay,
        )
        if measured is None:
            first = adjoints_(grads, weights, keep)[0] if self._marks else grads[0]
        return d_meta, _Upstream(d_state, first.clone(), seen)


@contextmanager
def _kept(progress: Progress) -> Iterator[None]:
    """Leave the generators as they are before the block."""
    states = [generator.get_state() for generator in progress.generators()]
    try:
        yield
    finally:
        for generator, state in zip(progress.generators(), states, strict=True):
            generator.set_state(state)
