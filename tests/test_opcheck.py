"""Every op that fastl2o registers, through torch.library.opcheck: schema, fake, autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastl2o import HierarchicalRule
from fastl2o._ops_families import FAMILIES
from tests.common import SMALL_RULE_CASES, RuleCase, random_state

OPS = torch.ops.fastl2o
Samples = Iterator[tuple[Any, tuple[Any, ...]]]


def _of_family(case: RuleCase) -> Samples:
    rule = case.make()
    family = FAMILIES[rule.family]
    config = family.arguments(rule)
    generator = torch.Generator().manual_seed(1)
    grad, state = torch.randn(2, 3), random_state(rule, (2, 3), generator)
    meta = rule.flat_parameters().detach()
    taken = (2,) if rule.needs_step else ()
    needing = [tensor.clone().requires_grad_() for tensor in (grad, state, meta)]
    yield family.step, (*needing[:2], *taken, needing[2], *config)
    upstream = (torch.randn(2, 3), torch.randn_like(state))
    yield family.step_backward, (*upstream, grad, state, *taken, meta, *config)
    window = (torch.randn(4, 2, 3), state, *taken, meta, torch.rand(4, 2), 3, *config, 0.7, 0.1)
    yield family.unroll_backward, window
    yield family.unroll_backward, (*window, torch.randn(3, 2, 3))
    yield family.unroll_backward, (*window, None, torch.randn_like(state))
    runs = (torch.randn(2, 3), torch.randn(2, 3), random_state(rule, (2, 3), generator))
    each = (*runs[:2], runs[2].transpose(0, 1).contiguous(), *taken, meta.repeat(2, 1))
    yield family.runs_step_, (*each, *config, 0.5, 0.1)
    lists: list[list[Tensor]] = [
        [torch.randn(2), torch.randn(3)],
        [torch.randn(2), torch.randn(3)],
        [random_state(rule, (2,), generator), random_state(rule, (3,), generator)],
    ]
    if rule.needs_step:
        lists.append([torch.tensor(0.0), torch.tensor(5.0)])
    yield family.step_, (*lists, meta, *config, 0.5, 0.1, True, 2)
    amp = (torch.tensor([4.0]), torch.tensor([0.0]))
    yield family.step_, (*lists, meta, *config, 0.5, 0.1, False, 1, *amp)


def _hierarchical() -> Samples:
    config = (3, 4, 5, 2)
    rule = HierarchicalRule(*config)
    flat = rule.flat_buffer(torch.device("cpu"), torch.float32)
    params, grads = ([torch.randn(9), torch.randn(4, 2)] for _ in range(2))
    planes = [0.1 * torch.randn(rule.state_planes, *p.shape) for p in params]
    tensors = [0.1 * torch.randn(rule.tensor_size + 1) for _ in params]
    levels = (tensors, [torch.tensor(0.0), torch.tensor(3.0)], torch.randn(1, 5), [])
    rates = ([1.0, 0.5], [0.0, 0.1])
    lists = (params, grads, planes, *levels, flat, *config)
    yield OPS.hierarchical_step_, (*lists, *rates, False, 2)
    sums, raw = torch.zeros((2, rule.num_sums), dtype=torch.float64), torch.zeros(17)
    shared = (*levels, [9, 8], flat, *config)
    yield OPS.hierarchical_sweep_, (grads, planes, *shared, False, None, sums, raw)
    sums[:, -2] = 1.0
    yield OPS.hierarchical_finish_, (params, *shared, *rates, sums, raw)
    state = rule.init_runs(torch.zeros(2, 17), [9, 8])
    window = (torch.randn(4, 2, 17), state, 0, flat, torch.ones(4, 2), 3, [9, 8], *config)
    yield OPS.hierarchical_unroll_backward, (*window, 1.0, 0.1)


def _nonfinite() -> Samples:
    found = torch.zeros((), dtype=torch.int64)
    yield OPS.first_nonfinite_, ([torch.zeros(2), torch.tensor([1.0, torch.inf])], found)


SAMPLES: dict[str, Callable[[], Samples]] = {
    **{str(case): lambda case=case: _of_family(case) for case in SMALL_RULE_CASES[:4]},
    "hierarchical": _hierarchical,
    "nonfinite": _nonfinite,
}


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name: str) -> None:
    for op, arguments in SAMPLES[name]():
        torch.library.opcheck(op, arguments)


def test_no_op_is_forgotten() -> None:
    checked = {
        op._schema.name if isinstance(op, torch._ops.OpOverload) else op._qualified_op_name
        for samples in SAMPLES.values()
        for op, _ in samples()
    }
    registered = {
        schema.name
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("fastl2o::")
    }
    takes_no_tensor = {"fastl2o::cpu_capability"}  # says which kernels run; nothing to fake
    assert checked == registered - takes_no_tensor
