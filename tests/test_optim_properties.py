"""Properties of LearnedOptimizer on drawn parameter lists: a list is stepped as its parts are."""

from __future__ import annotations

from typing import NamedTuple

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from fastl2o import LearnedOptimizer
from tests.common import present_backends
from tests.optimizers import (
    COORDINATE_WISE,
    DTYPES,
    RANDOM,
    OptimizerCase,
    assert_same_bits,
    make_params,
    on_backend,
    run_steps,
    set_grads,
    snapshot,
)


class Drawn(NamedTuple):
    """One parameter: its shape, dtype, order of dimensions in memory, lr, and when it has grads."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    reverse: bool
    lr: float
    present: tuple[bool, ...]

    def make(self, seed: int) -> torch.nn.Parameter:
        """The parameter, the same for the same seed."""
        value = self.tensor(seed)
        return torch.nn.Parameter(value)

    def tensor(self, seed: int) -> torch.Tensor:
        """Values shaped and laid out like the parameter."""
        generator = torch.Generator().manual_seed(seed)
        value = torch.randn(self.shape, generator=generator).to(self.dtype)
        order = tuple(reversed(range(value.dim())))
        return value.permute(order).contiguous().permute(order) if self.reverse else value


drawn = st.builds(
    Drawn,
    st.lists(st.integers(0, 4), max_size=4).map(tuple),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.sampled_from([1.0, 0.5]),
    st.tuples(st.booleans(), st.booleans(), st.booleans()),
)


@pytest.mark.parametrize("backend", present_backends())
@pytest.mark.parametrize("case", COORDINATE_WISE, ids=repr)
@hypothesis.settings(max_examples=25)
@hypothesis.given(parts=st.lists(drawn, min_size=1, max_size=6), policy=st.sampled_from("rs"))
def test_a_list_is_stepped_as_its_parts_are(
    case: OptimizerCase, backend: str, parts: list[Drawn], policy: str
) -> None:
    """Whatever the mix of shapes, dtypes, layouts, groups and missing gradients, bit for bit."""
    rule = case.rule(0)
    together = [part.make(seed) for seed, part in enumerate(parts)]
    apart = [part.make(seed) for seed, part in enumerate(parts)]
    options = {"weight_decay": 0.1, "nonfinite": {"r": "raise", "s": "skip"}[policy]}
    joint = LearnedOptimizer(
        [{"params": [p], "lr": part.lr} for p, part in zip(together, parts, strict=True)],
        rule,
        **options,
    )
    alone = [
        LearnedOptimizer([p], rule, lr=part.lr, **options)
        for p, part in zip(apart, parts, strict=True)
    ]
    with on_backend(backend):
        for step in range(3):
            for params in (together, apart):
                for seed, (p, part) in enumerate(zip(params, parts, strict=True)):
                    p.grad = part.tensor(100 * step + seed) if part.present[step] else None
            joint.step()
            for optimizer in alone:
                optimizer.step()
    assert_same_bits(together, apart)
    for p, twin, optimizer in zip(together, apart, alone, strict=True):
        assert joint.state.get(p, {}).keys() == optimizer.state.get(twin, {}).keys()
        for key, value in joint.state.get(p, {}).items():
            assert_same_bits([value], [optimizer.state[twin][key]])


@pytest.mark.parametrize("backend", present_backends())
@pytest.mark.parametrize("scale", [None, 4.0], ids=["plain", "scaled"])
@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("case", RANDOM, ids=repr)
def test_gradients_that_are_negated_views_step_as_their_values(
    case: OptimizerCase, steps_before: int, scale: float | None, backend: str
) -> None:
    """The imaginary part of a conjugate is such a view, which torch keeps from kernels."""
    rule, snapshots = case.rule(0), []
    for negated in (False, True):
        params = [p for dtype in (*DTYPES, torch.complex64) for p in make_params(dtype=dtype)[3:6]]
        optimizer = LearnedOptimizer(params, rule)
        with on_backend(backend):
            run_steps(optimizer, steps_before)
            set_grads(params, 7)
            for p in params[::2] if negated else ():
                p.grad = torch._neg_view(-p.grad)
                assert p.grad.is_neg()
            if scale is not None:
                optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
            optimizer.step()
        snapshots.append([t.resolve_neg() for t in snapshot(optimizer)])
    assert_same_bits(*snapshots)
