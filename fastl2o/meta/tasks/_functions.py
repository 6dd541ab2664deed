"""Functions of two coordinates, bowls and norms, from the ensemble of Wichrowska et al. 2017."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import check_choice, check_num_runs, check_number
from ._base import Batch, BatchedRun, Task, TaskRun, fork_generator

__all__ = ["FUNCTION_NAMES", "BenchmarkFunction", "Bowl", "Norm"]


def _ackley(x: Tensor, y: Tensor) -> Tensor:
    # The small term keeps the gradient of the square root finite at the minimum.
    radius = torch.sqrt(0.5 * (x * x + y * y) + 1e-12)
    waves = 0.5 * (torch.cos(2 * math.pi * x) + torch.cos(2 * math.pi * y))
    return -20 * torch.exp(-0.2 * radius) - torch.exp(waves) + math.e + 20


def _beale(x: Tensor, y: Tensor) -> Tensor:
    return (
        (1.5 - x + x * y).square()
        + (2.25 - x + x * y**2).square()
        + (2.625 - x + x * y**3).square()
    )


def _booth(x: Tensor, y: Tensor) -> Tensor:
    return (x + 2 * y - 7).square() + (2 * x + y - 5).square()


def _branin(x: Tensor, y: Tensor) -> Tensor:
    quadratic = y - 5.1 / (4 * math.pi**2) * x * x + 5 / math.pi * x - 6
    return quadratic.square() + 10 * (1 - 1 / (8 * math.pi)) * torch.cos(x) + 10


def _log_sum_exp(x: Tensor, y: Tensor) -> Tensor:
    # Boyd and Vandenberghe's example of a smooth convex function, section 9.3.2.
    terms = torch.stack((x + 3 * y - 0.1, x - 3 * y - 0.1, -x - 0.1))
    return torch.logsumexp(terms, dim=0)


def _matyas(x: Tensor, y: Tensor) -> Tensor:
    return 0.26 * (x * x + y * y) - 0.48 * x * y


def _michalewicz(x: Tensor, y: Tensor) -> Tensor:
    steepness = 10  # 2 m with m = 5
    first = torch.sin(x) * torch.sin(x * x / math.pi) ** steepness
    second = torch.sin(y) * torch.sin(2 * y * y / math.pi) ** steepness
    # Moved up by its range, because objectives under a logarithm must not be negative.
    return 2 - first - second


def _rosenbrock(x: Tensor, y: Tensor) -> Tensor:
    return (1 - x).square() + 100 * (y - x * x).square()


def _styblinski_tang(x: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (x**4 - 16 * x * x + 5 * x + y**4 - 16 * y * y + 5 * y) + 80


class _Function(NamedTuple):
    formula: Callable[[Tensor, Tensor], Tensor]
    low: tuple[float, float]  # of the box that starts are drawn from
    high: tuple[float, float]


_FUNCTIONS = {
    "ackley": _Function(_ackley, (-5.0, -5.0), (5.0, 5.0)),
    "beale": _Function(_beale, (-2.0, -2.0), (2.0, 2.0)),
    "booth": _Function(_booth, (-10.0, -10.0), (10.0, 10.0)),
    "branin": _Function(_branin, (-5.0, 0.0), (10.0, 15.0)),
    "log_sum_exp": _Function(_log_sum_exp, (-2.0, -2.0), (2.0, 2.0)),
    "matyas": _Function(_matyas, (-10.0, -10.0), (10.0, 10.0)),
    "michalewicz": _Function(_michalewicz, (0.0, 0.0), (math.pi, math.pi)),
    "rosenbrock": _Function(_rosenbrock, (-2.0, -1.0), (2.0, 3.0)),
    "styblinski_tang": _Function(_styblinski_tang, (-5.0, -5.0), (5.0, 5.0)),
}


FUNCTION_NAMES = tuple(_FUNCTIONS)


class _FunctionRun(BatchedRun):
    def __init__(
        self, formula: Callable[[Tensor, Tensor], Tensor], params: Tensor, rng: torch.Generator
    ) -> None:
        super().__init__({"params": params}, rng)
        self.formula = formula

    def batched(self, params: Tensor, *inputs: Tensor) -> Tensor:
        return self.formula(params[:, 0], params[:, 1])


class BenchmarkFunction(Task):
    """A well-known function of two coordinates, from a random start in its customary box.

    Values are never negative: "michalewicz" is moved up by 2 and "styblinski_tang" by 80, as in the
    paper's code for the latter ("log_sum_exp" is positive by itself).

    Args:
        name: "ackley", "beale", "booth", "branin", "log_sum_exp", "matyas", "michalewicz",
            "rosenbrock" or "styblinski_tang".

    Example:
        >>> run = BenchmarkFunction("booth").sample(3, torch.Generator().manual_seed(0))
        >>> run.losses(torch.tensor([[1.0, 3.0]] * 3), ()).tolist()
        [0.0, 0.0, 0.0]
    """

    def __init__(self, name: str) -> None:
        check_choice("name", name, FUNCTION_NAMES)
        self.name = name

    def config(self) -> dict[str, Any]:
        return {"name": self.name}

    def sample(
        self, num_runs: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> TaskRun:
        check_num_runs(num_runs)
        function = _FUNCTIONS[self.name]
        low, high = (torch.tensor(edge, dtype=dtype) for edge in function[1:])
        start = low + (high - low) * torch.rand(num_runs, 2, generator=generator, dtype=dtype)
        return _FunctionRun(function.formula, start, fork_generator(generator))


class _BowlRun(BatchedRun):
    def context(self) -> Batch:
        return (self.tensors["hessian"],)

    def batched(self, params: Tensor, *inputs: Tensor) -> Tensor:
        (hessian,) = inputs
        return 0.5 * torch.einsum("ri,rij,rj->r", params, hessian, params)


class Bowl(Task):
    """f(x) = 1/2 x^T H x in two coordinates, H with eigenvalues ``condition`` and 1.

    Args:
        condition: the eigenvalue along the first axis, above 0.
        angle: by which the axes are turned, degrees.

    Starts are drawn from N(0, 1).

    Example:
        >>> Bowl(condition=5.0, angle=45.0)
        Bowl(condition=5.0, angle=45.0)
    """

    def __init__(self, condition: float = 5.0, angle: float = 0.0) -> None:
        check_number("condition", condition, minimum=0, exclusive=True)
        check_number("angle", angle, minimum=0)
        self.condition, self.angle = condition, angle

    def config(self) -> dict[str, Any]:
        return {"condition": self.condition, "angle": self.angle}

    def sample(
        self, num_runs: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> TaskRun:
        check_num_runs(num_runs)
        cos, sin = (f(math.radians(self.angle)) for f in (math.cos, math.sin))
        turn = torch.tensor([[cos, -sin], [sin, cos]], dtype=dtype)
        hessian = turn @ torch.diag(torch.tensor([self.condition, 1.0], dtype=dtype)) @ turn.T
        tensors = {
            "params": torch.randn(num_runs, 2, generator=generator, dtype=dtype),
            "hessian": hessian.expand(num_runs, 2, 2).clone(),
        }
        return _BowlRun(tensors, fork_generator(generator))


class _NormRun(BatchedRun):
    def __init__(self, p: float, tensors: dict[str, Tensor], rng: torch.Generator) -> None:
        super().__init__(tensors, rng)
        self.p = p

    def context(self) -> Batch:
        return (self.tensors["matrix"], self.tensors["target"])

    def batched(self, params: Tensor, *inputs: Tensor) -> Tensor:
        matrix, target = inputs
        residual = torch.einsum("rij,rj->ri", matrix, params) - target
        total = residual.abs().pow(self.p).sum(dim=1)
        # The p-th root has an infinite slope at 0.
        return (total + 1e-12).pow(1 / self.p)


class Norm(Task):
    """f(x) = ||A x - b||_p with A and b of N(0, 1), drawn per run; starts at N(0, 1).

    Args:
        dim: number of coordinates and of rows.
        p: of the norm, at least 1.

    Example:
        >>> Norm(dim=27, p=1.0).sample(2, torch.Generator().manual_seed(0)).dim
        27
    """

    def __init__(self, dim: int = 18, p: float = 2.0) -> None:
        check_number("dim", dim, minimum=1, integer=True)
        check_number("p", p, minimum=1)
        self.dim, self.p = dim, p

    def config(self) -> dict[str, Any]:
        return {"dim": self.dim, "p": self.p}

    def sample(
        self, num_runs: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> TaskRun:
        check_num_runs(num_runs)
        shape = (num_runs, self.dim)
        tensors = {
            "matrix": torch.randn(*shape, self.dim, generator=generator, dtype=dtype),
            "target": torch.randn(shape, generator=generator, dtype=dtype),
            "params": torch.randn(shape, generator=generator, dtype=dtype),
        }
        return _NormRun(self.p, tensors, fork_generator(generator))
