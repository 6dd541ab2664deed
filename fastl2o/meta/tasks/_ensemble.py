"""The ensemble of small problems of Wichrowska et al. 2017 (arXiv 1703.04813, released code)."""

from __future__ import annotations

from ._base import Task
from ._functions import FUNCTION_NAMES, BenchmarkFunction, Bowl, Norm
from ._objectives import GradientNoise, LogObjective, Rescaled, SparseGradients, SumOf
from ._quadratic import Quadratic
from ._synthetic import RandomMLP, SoftmaxRegression

__all__ = ["ensemble"]

# features, hidden widths, batch size
_MLPS = (
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
)
# features, separation, batch size, noise of the noisy version
_SOFTMAX = ((10, 2.0, 100, 0.5), (100, 1.0, 50, 0.1), (200, 1.5, 20, 0.1), (256, 1.5, 100, 0.5))


def quadratic(dim: int) -> Task:
    """1/2 ||W x - y||^2, from the origin."""
    return Rescaled(Quadratic(dim=dim), 0.5)


def ensemble(networks: bool = True) -> dict[str, list[Task]]:
    """Task families by name: the released code's, but for its largest quadratics and tensors.

    Args:
        networks: include the small sigmoid networks ("mlp", "sparse_mlp"); the paper's abstract
            speaks of none, the released code has them on.

    Returns:
        For each family a list of tasks; a trainer takes one list of all of them.

    Example:
        >>> families = ensemble(networks=False)
        >>> len(families["bowl"]), families["bowl"][0]
        (8, Bowl(condition=0.1, angle=0.0))
    """
    bowls: list[Task] = [Bowl(0.1), Bowl(1.0), Bowl(5.0), Bowl(5.0, 45.0)]
    functions: list[Task] = [BenchmarkFunction(name) for name in FUNCTION_NAMES]
    softmax: list[tuple[Task, float]] = [
        (SoftmaxRegression(features, separation, batch), noise)
        for features, separation, batch, noise in _SOFTMAX
    ]
    families: dict[str, list[Task]] = {
        "quadratic": [
            GradientNoise(quadratic(dim), sd)
            for dim, sd in ((20, 0.5), (25, 0.0), (50, 1.0), (100, 2.0))
        ],
        "bowl": [*bowls, *(GradientNoise(bowl, 0.1) for bowl in bowls)],
        "softmax": [
            *(task for task, _ in softmax),
            *(GradientNoise(task, noise) for task, noise in softmax),
        ],
        "function": [*functions, *(GradientNoise(task, 1.0) for task in functions)],
        "log": [
            *(LogObjective(quadratic(dim)) for dim in (20, 50, 100)),
            *(LogObjective(Bowl(condition)) for condition in (0.1, 1.0, 5.0)),
        ],
        "rescaled": [
            *(
                Rescaled(Norm(18, p), scale)
                for p, scale in ((2.5, 0.123), (1.5, 8.0), (2.0, 50.0), (3.0, 200.0), (1.0, 1e3))
            ),
            *(
                Rescaled(quadratic(dim), scale)
                for dim, scale in ((20, 0.1), (25, 10.0), (50, 350.0), (100, 132.0))
            ),
        ],
        "norm": [
            *(Norm(dim, p) for dim, p in ((27, 1.0), (25, 2.0), (22, 3.0))),
            *(GradientNoise(Norm(dim, p), 0.1) for dim, p in ((19, 1.0), (23, 2.0), (26, 3.0))),
        ],
        "sum": [
            SumOf([quadratic(3), BenchmarkFunction("booth")]),
            SumOf([quadratic(5), BenchmarkFunction("beale")]),
            SumOf([quadratic(8), BenchmarkFunction("matyas"), Bowl(5.0)]),
            SumOf([quadratic(13), Norm(5, 2.0)]),
            SumOf([BenchmarkFunction("ackley"), BenchmarkFunction("branin")]),
            SumOf([BenchmarkFunction("rosenbrock"), BenchmarkFunction("log_sum_exp")]),
            GradientNoise(SumOf([quadratic(7), BenchmarkFunction("styblinski_tang")]), 0.1),
            GradientNoise(SumOf([quadratic(10), Norm(4, 1.0)]), 0.5),
        ],
        "sparse": [
            *(SparseGradients(quadratic(dim)) for dim in (20, 50, 100)),
            *(SparseGradients(Bowl(condition)) for condition in (0.1, 1.0, 5.0)),
        ],
    }
    if networks:
        families["mlp"] = [RandomMLP(*arguments) for arguments in _MLPS]
        families["sparse_mlp"] = [SparseGradients(RandomMLP(*a)) for a in _MLPS[:3]]
    return families
