"""Parameters and gradients of drawn shapes, strides and types, stepped and compared."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import torch
from torch import Tensor

import fastl2o
from fastl2o.rules import HierarchicalRule, LSTMRule, RNNPropRule, Rule

_DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
_RULES: tuple[Rule, ...] = (LSTMRule(), RNNPropRule(5, 1), HierarchicalRule(4, 3, 2, 2))
for _rule in _RULES:
    _rule.reset_parameters(torch.Generator().manual_seed(0))


def _shape(rng: random.Random) -> tuple[int, ...]:
    kind = rng.randrange(8)
    if kind == 0:
        return (rng.randrange(600),)
    return tuple(rng.choice((0, 1, 1, 2, 3, 5, 9)) for _ in range(rng.randrange(5)))


def _laid_out(value: Tensor, rng: random.Random) -> Tensor:
    """The same numbers with other strides."""
    kind = rng.randrange(5)
    order = rng.sample(range(value.dim()), value.dim())
    if kind == 0:
        inverse = [order.index(d) for d in range(value.dim())]
        return value.permute(order).contiguous().permute(inverse)
    if kind == 1 and value.dim():  # every second of a larger tensor
        wide = value.new_full((*value.shape[:-1], 2 * value.shape[-1]), torch.nan)
        wide[..., ::2] = value
        return wide[..., ::2]
    if kind == 2:  # in the middle of other memory
        flat = value.new_full((value.numel() + 7,), torch.nan)
        flat[3 : 3 + value.numel()] = value.reshape(-1)
        return flat[3 : 3 + value.numel()].view(value.shape)
    return value


def step_layouts(rng: random.Random, folder: Path) -> bool:
    """Two steps on drawn tensors: the kernels against the reference on plain float64 copies."""
    rule = rng.choice(_RULES)
    dtype = rng.choice(_DTYPES)
    count = rng.choice((1, 1, 2, 5))
    shapes = [_shape(rng) for _ in range(count)]
    generator = torch.Generator().manual_seed(rng.randrange(2**31))

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    plain = [draw(shape) for shape in shapes]
    params = [_laid_out(value.clone(), rng).requires_grad_() for value in plain]
    exact = [value.double().requires_grad_() for value in plain]
    lr, weight_decay = rng.choice((1.0, 0.3)), rng.choice((0.0, 0.1))
    options = {"lr": lr, "weight_decay": weight_decay, "maximize": rng.random() < 0.3}
    ours = fastl2o.LearnedOptimizer(params, rule, **options)
    # In float64 throughout: what is left is the kernels' rounding.
    wide = copy.deepcopy(rule).double()
    theirs = fastl2o.LearnedOptimizer(exact, wide, **options, state_dtype=torch.float64)
    for _ in range(2):
        for param, twin in zip(params, exact, strict=True):
            missing = rng.random() < 0.1
            grad = draw(tuple(param.shape))
            param.grad = None if missing else _laid_out(grad, rng)
            twin.grad = None if missing else grad.double()
        ours.step()
        with fastl2o.backend("reference"):
            theirs.step()
        # A low precision's rounding is not added up over steps.
        with torch.no_grad():
            for param, twin in zip(params, exact, strict=True):
                _require_close(param, twin, dtype)
                twin.copy_(param)
    return True


def _require_close(param: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    tolerance = max(2e-5, 2 * torch.finfo(dtype).eps)
    if not torch.allclose(param.double(), exact, rtol=tolerance, atol=tolerance):
        worst = (param.double() - exact).abs().max()
        raise AssertionError(f"shape {tuple(param.shape)}, {dtype}: {float(worst):.2e} apart")
