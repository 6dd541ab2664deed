"""A generated data set of one-dimensional signals in ten classes, in the spirit of MNIST-1D.

Every class has a template, a smooth bump of random shape. A signal is its template at a random
place, width and height, on a random slope, under smooth and white noise: what a classifier has to
see is the shape, wherever it lies.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["CLASSES", "LENGTH", "draw_signals"]

CLASSES = 10
LENGTH = 40  # samples of a signal
_KNOTS = 8  # of a template; the outer two are 0
_SMOOTHNESS = 2.0  # standard deviation of the smooth noise's kernel, in samples


def _uniform(low: float, high: float, count: int, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(count, 1, generator=generator)


def draw_signals(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Signals ``(count, LENGTH)`` float32 and labels ``(count,)`` int64, from ``seed`` alone.

    The label of signal i is i mod 10. Over a place x in [0, 1] with 40 samples, signal i is

        h * template((x - a) / w) + s * (x - 1/2) + 0.25 * smooth noise + 0.05 * white noise

    with w ~ U(0.4, 0.8), a ~ U(0, 1 - w), h ~ U(0.6, 1.4), s ~ U(-0.75, 0.75), and both noises of
    standard deviation 1. A template goes linearly through eight equidistant heights, of which the
    first and last are 0 and the others of U(-1, 1), scaled to a largest height of 1.

    Example:
        >>> signals, labels = draw_signals(30)
        >>> signals.shape, labels[:12].tolist()
        (torch.Size([30, 40]), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1])
    """
    generator = torch.Generator().manual_seed(seed)
    heights = torch.zeros(CLASSES, _KNOTS)
    heights[:, 1:-1] = 2 * torch.rand(CLASSES, _KNOTS - 2, generator=generator) - 1
    heights /= heights.abs().amax(dim=1, keepdim=True)
    labels = torch.arange(count) % CLASSES
    place = torch.linspace(0, 1, LENGTH)
    width = _uniform(0.4, 0.8, count, generator)
    start = _uniform(0.0, 1.0, count, generator) * (1 - width)
    at = ((place - start) / width).clamp(0, 1) * (_KNOTS - 1)
    left = at.long().clamp(max=_KNOTS - 2)
    knots = heights[labels]
    low, high = knots.gather(1, left), knots.gather(1, left + 1)
    signals = torch.lerp(low, high, at - left) * _uniform(0.6, 1.4, count, generator)
    signals += _uniform(-0.75, 0.75, count, generator) * (place - 0.5)
    signals += 0.25 * _smooth_noise(count, generator)
    signals += 0.05 * torch.randn(count, LENGTH, generator=generator)
    return signals, labels


def _smooth_noise(count: int, generator: torch.Generator) -> Tensor:
    reach = round(3 * _SMOOTHNESS)
    offsets = torch.arange(-reach, reach + 1)
    kernel = torch.exp(-0.5 * (offsets / _SMOOTHNESS).square())
    kernel /= torch.linalg.vector_norm(kernel)
    white = torch.randn(count, LENGTH + 2 * reach, generator=generator)
    return white.unfold(1, len(kernel), 1) @ kernel
