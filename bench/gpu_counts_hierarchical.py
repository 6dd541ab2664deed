"""The hierarchical rule's kernels for ``bench/gpu_counts.py``."""

from __future__ import annotations

from typing import Any

import torch

from bench.gpu_kernel import Kernel, assembled, find, number
from tests import cuda_hierarchical, test_cuda_hierarchical

PLANES = 19


def cuda_kernels() -> list[Kernel]:
    """The passes of the CUDA step over the parameters; that over tensors adds next to nothing."""
    return [
        _cuda_pass(name, planes)
        for planes in (torch.float32, torch.bfloat16)
        for name in ("sweep", "apply")
    ]


def _cuda_pass(name: str, planes: torch.dtype) -> Kernel:
    sweeps = name == "sweep"
    part = cuda_hierarchical.SWEEPS[planes] if sweeps else f"hierarchical_{name}_kernel"

    def launches() -> tuple[Any, Any]:
        small, large = test_cuda_hierarchical.counted(planes)
        return small.counts(part), large.counts(part)

    return Kernel(
        f"cuda hierarchical {name} {str(planes).removeprefix('torch.')} planes",
        2 * PLANES * planes.itemsize + 8 if sweeps else 12,
        test_cuda_hierarchical.COUNTED,
        launches,
        lambda arch: find(assembled(cuda_hierarchical.module(number(arch)), arch), part),
        "3 a step with the tensors' pass; beyond 48 tensors 4 + ceil(tensors / 48)",
    )
