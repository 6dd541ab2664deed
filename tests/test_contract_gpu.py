"""What torch tests of every optimizer on a GPU, retold; skipped where there is none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastl2o import LearnedOptimizer
from tests.common import assert_as_accurate
from tests.optimizers import (
    COORDINATE_WISE,
    DTYPES,
    RANDOM,
    OptimizerCase,
    assert_same_bits,
    make_params,
    mirrors,
    set_grads,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU, CPU = torch.device("cuda"), torch.device("cpu")
LR = 0.02


def _params(device: torch.device, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(p.detach().to(device)) for p in make_params(dtype=dtype)]


def _set_grads(params: list[torch.nn.Parameter], seed: int, rounded_to: torch.dtype) -> None:
    """The same numbers on every device."""
    drawn = make_params()
    set_grads(drawn, seed, rounded_to=rounded_to)
    for p, source in zip(params, drawn, strict=True):
        p.grad = source.grad.to(p.device, p.dtype)


@mirrors("fused_cpu_matches_cuda")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", RANDOM, ids=repr)
def test_gpu_kernels_match_the_cpus(case: OptimizerCase, dtype: torch.dtype) -> None:
    rule, results = case.rule(LR), []
    for device, options in (
        (GPU, {"fused": True}),
        (CPU, {"fused": True}),
        (CPU, {"foreach": False, "state_dtype": torch.float64}),
    ):
        params = _params(device, dtype)
        if "state_dtype" in options:
            params = [torch.nn.Parameter(p.detach().double()) for p in params]
        optimizer = LearnedOptimizer(params, rule, lr=0.7, weight_decay=0.1, **options)
        for step in range(7):
            _set_grads(params, step, dtype)
            optimizer.step()
        states = [optimizer.state[p]["planes"] for p in params]
        results.append([_flat(params), _flat(states)])
    for on_gpu, on_cpu, exact in zip(*results, strict=True):
        if on_gpu.dtype == torch.float64:  # the maths is float32 all the same
            on_gpu, on_cpu = on_gpu.float(), on_cpu.float()
        assert_as_accurate(on_gpu, on_cpu, exact)


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten().cpu() for t in tensors])


@mirrors("state_dict_with_cuda_params")
@pytest.mark.parametrize(("source", "target"), [(CPU, GPU), (GPU, CPU)], ids=str)
@pytest.mark.parametrize("case", RANDOM, ids=repr)
def test_checkpoints_move_between_devices(
    case: OptimizerCase, source: torch.device, target: torch.device
) -> None:
    rule = case.rule(LR)
    params = _params(source)
    optimizer = LearnedOptimizer(params, rule)
    for step in range(2):
        _set_grads(params, step, torch.float32)
        optimizer.step()
    moved = [torch.nn.Parameter(p.detach().to(target)) for p in params]
    other = LearnedOptimizer(moved, rule)
    other.load_state_dict(optimizer.state_dict())
    for p, twin in zip(params, moved, strict=True):
        for name, value in optimizer.state[p].items():
            loaded = other.state[twin][name]
            assert loaded.device.type == twin.device.type
            assert_same_bits([loaded.cpu()], [value.cpu()])
    _set_grads(moved, 9, torch.float32)
    other.step()


@mirrors("mixed_device_dtype")
@pytest.mark.parametrize("case", COORDINATE_WISE, ids=repr)
def test_parameters_on_two_devices_step_in_one_optimizer(case: OptimizerCase) -> None:
    rule = case.rule(LR)
    together = [*_params(CPU), *_params(GPU)]
    apart = [_params(CPU), _params(GPU)]
    mixed = LearnedOptimizer(together, rule)
    alone = [LearnedOptimizer(params, rule) for params in apart]
    for step in range(2):
        _set_grads(together[:9], step, torch.float32)
        _set_grads(together[9:], step, torch.float32)
        mixed.step()
        for params, optimizer in zip(apart, alone, strict=True):
            _set_grads(params, step, torch.float32)
            optimizer.step()
    assert_same_bits([p.cpu() for p in together], [p.cpu() for params in apart for p in params])
