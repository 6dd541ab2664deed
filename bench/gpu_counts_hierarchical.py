"""The hierarchical rule's kernels for ``bench/gpu_counts.py``."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any
from unittest import mock

import torch

from bench.gpu_kernel import Kernel, assembled, find, number
from fastl2o import HierarchicalRule
from tests import cuda_hierarchical, gpu_common, test_cuda_hierarchical
from tests import cuda_hierarchical_unroll as unroll
from tests import test_cuda_hierarchical_unroll as window

PLANES = 19
DTYPES = (torch.float32, torch.bfloat16)
PASSES = ("sweep", "apply")  # that over tensors adds next to nothing
COORDINATES = 10**6  # whose launch parameters the Triton kernels are counted with


# Bytes of a coordinate and step that the launches of a window's way back cannot avoid: adjoint both
# ways, gradient and raw step; planes, their gradients both ways, gradient and adjoint.
BACKWARD = {"ahead": 16, "sweep": 3 * 4 * PLANES + 8}


def cuda_kernels() -> list[Kernel]:
    """The passes of the CUDA step over the parameters, and of its window backward."""
    steps = [_cuda_pass(name, planes) for planes in DTYPES for name in PASSES]
    return steps + [_cuda_backward(name) for name in BACKWARD]


def triton_kernels() -> list[Kernel]:
    """The same of the Triton step."""
    return [_triton_pass(name, planes) for planes in DTYPES for name in PASSES]


def _kernel(language: str, name: str, planes: torch.dtype, *counts: Any) -> Kernel:
    least = 2 * PLANES * planes.itemsize + 8 if name == "sweep" else 12
    dtype = str(planes).removeprefix("torch.")
    return Kernel(f"{language} hierarchical {name} {dtype} planes", least, *counts)


def _cuda_pass(name: str, planes: torch.dtype) -> Kernel:
    part = cuda_hierarchical.SWEEPS[planes] if name == "sweep" else f"hierarchical_{name}_kernel"

    def launches() -> tuple[Any, Any]:
        small, large = test_cuda_hierarchical.counted(planes)
        return small.counts(part), large.counts(part)

    return _kernel(
        "cuda",
        name,
        planes,
        test_cuda_hierarchical.COUNTED,
        launches,
        lambda arch: find(assembled(cuda_hierarchical.module(number(arch)), arch), part),
        "3 a step with the tensors' pass; beyond 48 tensors 4 + ceil(tensors / 48)",
    )


def _cuda_backward(name: str) -> Kernel:
    part = f"window_{name}_kernel"

    def launches() -> tuple[Any, Any]:
        small, large = map(window.counted, (window.COUNTED, 2 * window.COUNTED))
        return small[part], large[part]

    return Kernel(
        f"cuda hierarchical window {name}",
        BACKWARD[name],
        window.COUNTED,
        launches,
        lambda arch: find(assembled(unroll.module(number(arch)), arch), part),
        "4 a step back, 3 to replay it; 2 copies a step",
    )


@functools.cache
def _triton_counted(planes: torch.dtype) -> list[list[Any]]:
    """The counts of the launches of a step of one chunk, and of one of two by one program."""
    from kernels.hierarchical import step
    from kernels.hierarchical.config import step_config
    from tests.test_triton_hierarchical import Lists

    config = dataclasses.replace(step_config(COORDINATES), max_programs=1)
    found = []
    for chunks in (1, 2):
        lists = Lists(HierarchicalRule(), [[chunks * config.chunk]], taken=3)
        lists.planes = [tensor.to(planes) for tensor in lists.planes]
        with mock.patch.object(step, "step_config", return_value=config):
            found.append(lists.execute(90))
    return found


def _triton_pass(name: str, planes: torch.dtype) -> Kernel:
    from kernels.hierarchical.config import step_config
    from tests import test_triton_hierarchical as triton

    def launches() -> tuple[Any, Any]:
        small, large = _triton_counted(planes)
        place = ("sweep", "tensor_level", "apply").index(name)
        return small[place], large[place]

    def resources(arch: str) -> Any:
        compiled = triton.compiled(name, triton.DEFAULT, number(arch), planes)
        return gpu_common.resources(compiled, number(arch))

    return _kernel(
        "triton",
        name,
        planes,
        step_config(COORDINATES).chunk,
        launches,
        resources,
        "3 a step with the tensors' pass; 2 more for each further dtype",
    )
