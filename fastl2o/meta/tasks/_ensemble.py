"""The ensemble of small problems of Wichrowska et al. 2017 (arXiv 1703.04813, released code)."""

from __future__ import annotations

from dataclasses import dataclass

from ._base import Task
from ._functions import FUNCTION_NAMES, BenchmarkFunction, Bowl, Norm
from ._objectives import GradientNoise, LogObjective, Rescaled, SparseGradients, SumOf
from ._quadratic import Quadratic
from ._synthetic import RandomMLP, SoftmaxRegression

__all__ = ["ensemble"]


@dataclass(frozen=True)
class _Sizes:
    """What differs between the problems that rules are trained on and those held out."""

    noisy: tuple[tuple[int, float], ...]  # dimension of a quadratic, noise of its gradients
    plain: tuple[int, ...]  # dimensions of three more
    bowls: tuple[float, ...]  # conditions of three bowls; the last one also comes rotated
    softmax: tuple[tuple[int, float, int, float], ...]  # features, separation, batch, noise
    rescaled: tuple[tuple[int, float, float], ...]  # dimension, power and scale of a norm
    scales: tuple[float, ...]  # of four quadratics
    norms: tuple[int, ...]  # dimensions of six, powers 1, 2, 3 twice
    sums: tuple[int, ...]  # dimensions in the sums of problems
    networks: tuple[tuple[int, tuple[int, ...], int], ...]  # features, hidden widths, batch


_PUBLISHED = _Sizes(
    noisy=((20, 0.5), (25, 0.0), (50, 1.0), (100, 2.0)),
    plain=(20, 50, 100),
    bowls=(0.1, 1.0, 5.0),
    softmax=((10, 2.0, 100, 0.5), (100, 1.0, 50, 0.1), (200, 1.5, 20, 0.1), (256, 1.5, 100, 0.5)),
    rescaled=((18, 2.5, 0.123), (18, 1.5, 8.0), (18, 2.0, 50.0), (18, 3.0, 200.0), (18, 1.0, 1e3)),
    scales=(0.1, 10.0, 350.0, 132.0),
    norms=(27, 25, 22, 19, 23, 26),
    sums=(3, 5, 8, 13, 5, 7, 10, 4),
    networks=(
        (8, (8, 5), 10),
        (12, (8, 5, 3), 200),
        (5, (4, 4, 4, 4), 100),
        (11, (4, 5, 6), 64),
        (9, (8,), 128),
        (7, (8, 5), 16),
        (8, (32, 64), 10),
        (12, (16, 8, 3), 200),
        (5, (8, 8, 8, 8), 100),
        (11, (10, 12, 12), 64),
        (9, (32,), 128),
        (7, (32, 64), 16),
    ),
)
_HELD_OUT = _Sizes(
    noisy=((15, 0.3), (35, 0.0), (70, 0.7), (140, 1.5)),
    plain=(30, 70, 140),
    bowls=(0.3, 2.0, 8.0),
    softmax=((15, 1.8, 80, 0.3), (70, 1.2, 40, 0.2), (150, 1.3, 30, 0.2), (320, 1.4, 80, 0.4)),
    rescaled=((14, 2.2, 0.3), (21, 1.4, 20.0), (24, 2.0, 90.0), (15, 2.8, 120.0), (30, 1.0, 500.0)),
    scales=(0.3, 30.0, 200.0, 60.0),
    norms=(33, 17, 29, 14, 31, 20),
    sums=(4, 6, 10, 16, 7, 9, 12, 6),
    networks=(
        (10, (10, 4), 24),
        (6, (6, 6, 6), 150),
        (14, (5, 8, 4), 50),
        (10, (12,), 100),
        (9, (24, 48), 12),
        (13, (20, 10, 4), 160),
        (6, (10, 10, 10), 80),
        (8, (48,), 100),
    ),
)


def quadratic(dim: int) -> Task:
    """1/2 ||W x - y||^2, from the origin."""
    return Rescaled(Quadratic(dim=dim), 0.5)


def ensemble(networks: bool = True, held_out: bool = False) -> dict[str, list[Task]]:
    """Task families by name: the released code's, but for its largest quadratics and tensors.

    Args:
        networks: include the small sigmoid networks ("mlp", "sparse_mlp"); the paper's abstract
            speaks of none, the released code has them on.
        held_out: the same families at dimensions, scales, noises and widths of our own, none of
            which is in the published list: to validate rules on. The two-dimensional test
            functions, which have no size, are the same.

    Returns:
        For each family a list of tasks; a trainer takes one list of all of them.

    Example:
        >>> families = ensemble(networks=False)
        >>> len(families["bowl"]), families["bowl"][0]
        (8, Bowl(condition=0.1, angle=0.0))
    """
    sizes = _HELD_OUT if held_out else _PUBLISHED
    bowls: list[Task] = [*map(Bowl, sizes.bowls), Bowl(sizes.bowls[-1], 45.0)]
    functions: list[Task] = [BenchmarkFunction(name) for name in FUNCTION_NAMES]
    softmax: list[tuple[Task, float]] = [
        (SoftmaxRegression(features, separation, batch), noise)
        for features, separation, batch, noise in sizes.softmax
    ]
    scaled = zip([dim for dim, _ in sizes.noisy], sizes.scales, strict=True)
    norms = list(zip(sizes.norms, (1.0, 2.0, 3.0) * 2, strict=True))
    families: dict[str, list[Task]] = {
        "quadratic": [GradientNoise(quadratic(dim), sd) for dim, sd in sizes.noisy],
        "bowl": [*bowls, *(GradientNoise(bowl, 0.1) for bowl in bowls)],
        "softmax": [
            *(task for task, _ in softmax),
            *(GradientNoise(task, noise) for task, noise in softmax),
        ],
        "function": [*functions, *(GradientNoise(task, 1.0) for task in functions)],
        "log": [LogObjective(task) for task in (*map(quadratic, sizes.plain), *bowls[:3])],
        "rescaled": [
            *(Rescaled(Norm(dim, p), scale) for dim, p, scale in sizes.rescaled),
            *(Rescaled(quadratic(dim), scale) for dim, scale in scaled),
        ],
        "norm": [
            *(Norm(dim, p) for dim, p in norms[:3]),
            *(GradientNoise(Norm(dim, p), 0.1) for dim, p in norms[3:]),
        ],
        "sum": _sums(sizes.sums),
        "sparse": [SparseGradients(task) for task in (*map(quadratic, sizes.plain), *bowls[:3])],
    }
    if networks:
        families["mlp"] = [RandomMLP(*arguments) for arguments in sizes.networks]
        families["sparse_mlp"] = [SparseGradients(RandomMLP(*a)) for a in sizes.networks[:3]]
    return families


def _sums(dims: tuple[int, ...]) -> list[Task]:
    return [
        SumOf([quadratic(dims[0]), BenchmarkFunction("booth")]),
        SumOf([quadratic(dims[1]), BenchmarkFunction("beale")]),
        SumOf([quadratic(dims[2]), BenchmarkFunction("matyas"), Bowl(5.0)]),
        SumOf([quadratic(dims[3]), Norm(dims[4], 2.0)]),
        SumOf([BenchmarkFunction("ackley"), BenchmarkFunction("branin")]),
        SumOf([BenchmarkFunction("rosenbrock"), BenchmarkFunction("log_sum_exp")]),
        GradientNoise(SumOf([quadratic(dims[5]), BenchmarkFunction("styblinski_tang")]), 0.1),
        GradientNoise(SumOf([quadratic(dims[6]), Norm(dims[7], 1.0)]), 0.5),
    ]
