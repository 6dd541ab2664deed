"""Steps whose tensors are laid out otherwise than those of the step before."""

from __future__ import annotations

import pytest
import torch

from fastl2o import LearnedOptimizer, LSTMRule
from tests.common import needs_cpu_kernels, present_backends
from tests.optimizers import (
    RANDOM,
    OptimizerCase,
    assert_same_bits,
    clone_params,
    make_params,
    on_backend,
    set_grads,
    unchanged,
)


def _strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers, with a gap after each."""
    return tensor.unsqueeze(-1).repeat_interleave(2, dim=-1)[..., 0]


def _pair(case: OptimizerCase) -> tuple[list[list[torch.nn.Parameter]], list[LearnedOptimizer]]:
    params = make_params()
    both = [params, clone_params(params)]
    return both, [LearnedOptimizer(each, case.rule(0)) for each in both]


@pytest.mark.parametrize("backend", present_backends())
@pytest.mark.parametrize("case", RANDOM, ids=repr)
def test_gradients_may_change_their_layout_at_every_step(case: OptimizerCase, backend: str) -> None:
    (params, twins), optimizers = _pair(case)
    with on_backend(backend):
        for step, changed in enumerate(([], [4], [], [3, 7], [7], [])):
            for each in (params, twins):
                set_grads(each, step)
            for i in changed:
                params[i].grad = _strided(params[i].grad)
            for optimizer in optimizers:
                optimizer.step()
    assert_same_bits(params, twins)


@needs_cpu_kernels
@pytest.mark.parametrize("case", RANDOM, ids=repr)
def test_a_gradient_of_a_new_layout_is_unscaled_once(case: OptimizerCase) -> None:
    (params, twins), optimizers = _pair(case)
    for step in range(3):
        for each in (params, twins):
            set_grads(each, step)
        if step == 2:
            params[4].grad = _strided(params[4].grad)
        for optimizer in optimizers:
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
            optimizer.step()
    assert_same_bits(params, twins)
    assert_same_bits([p.grad for p in params], [p.grad for p in twins])


@pytest.mark.parametrize("backend", present_backends())
def test_a_step_that_is_planned_anew_may_still_be_refused(backend: str) -> None:
    params = make_params()
    optimizer = LearnedOptimizer(params, LSTMRule(2))
    with on_backend(backend):
        for step in range(2):
            set_grads(params, step)
            optimizer.step()
        params[4].grad = _strided(params[4].grad)
        params[6].grad[0] = float("nan")
        with unchanged(optimizer), pytest.raises(RuntimeError, match=r"parameter 6 .*NaN or Inf"):
            optimizer.step()
        set_grads(params, 2)
        optimizer.step()
