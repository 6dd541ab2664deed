"""Runs the PTX of csrc/cuda/hierarchical.cu through ptxemu as the host code would launch it."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastl2o.rules.hierarchical import HierarchicalRule
from tests import cuda_step
from tests.hierarchical_cpu import Problem

SWEEP_THREADS, LEVEL_THREADS = 128, 256
MOST_LAUNCHES = 8
SWEEPS = {torch.float32: "sweep_kernelIfLb0EE", torch.bfloat16: "sweep_kernelItLb0EE"}
ROUNDING_SWEEP = "sweep_kernelItLb1EE"
KERNELS = (
    *SWEEPS.values(),
    ROUNDING_SWEEP,
    *(f"hierarchical_{name}_kernel" for name in ("tensors", "apply", "scan", "send", "problems")),
)


class _Tensor(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("param", "grad", "planes", "state", "step")),
        ("numel", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
        ("problem", ctypes.c_int64),
        ("lr", ctypes.c_double),
        ("weight_decay", ctypes.c_double),
    ]


class _Options(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("maximize", "nonfinite")] + [
        (name, ctypes.c_uint64) for name in ("grad_scale", "found_inf", "flags", "seed")
    ]


class Plan(NamedTuple):
    """What the host made of a step's tensors; `kept` are the tensors that it holds addresses of."""

    arguments: list[bytes]
    entries: int
    chunks: int
    listed: bool
    workspace_bytes: int
    kept: tuple[Tensor | None, ...]


class Result(NamedTuple):
    """The nonfinite flags, and the counts of every launch by the kernel's name."""

    flags: list[int]
    launches: list[tuple[str, Any]]

    def counts(self, part: str) -> Any:
        """Of the one launch whose kernel's name holds `part`."""
        (found,) = (counts for name, counts in self.launches if part in name)
        return found


@functools.cache
def module(architecture: int = 80) -> Any:
    """The kernels, compiled for a compute capability times ten."""
    return cuda_step.compile_kernels("hierarchical.cu", architecture)


@functools.cache
def host() -> ctypes.CDLL:
    """The host's planning of a step."""
    library = cuda_step.compile_host("cuda_hierarchical_plan.cpp")
    for name in ("workspace_bytes", "chunks_of", "chunk_of"):
        getattr(library, name).restype = ctypes.c_int64
    return library


def table(
    problem: Problem, problems: Sequence[int], lr: Sequence[float], weight_decay: Sequence[float]
) -> Any:
    """The tensors of a call as the host API takes them."""
    entries = (_Tensor * max(1, len(problem.params)))()
    lists = (problem.params, problem.grads, problem.planes, problem.states, problem.steps)
    for i, (entry, *parts) in enumerate(zip(entries, *lists, strict=False)):
        addresses = map(cuda_step.address, parts)
        entry.param, entry.grad, entry.planes, entry.state, entry.step = addresses
        entry.numel, entry.problem = parts[0].numel(), problems[i] if problems else 0
        entry.dtype = cuda_step.DTYPES[parts[0].dtype]
        entry.lr, entry.weight_decay = lr[i], weight_decay[i]
    return entries


def plan(
    rule: HierarchicalRule,
    problem: Problem,
    tensors: Any,
    *,
    options: _Options | None = None,
    workspace: Tensor | None = None,
    capacity: int = MOST_LAUNCHES,
) -> Plan:
    """The host's plan of a step; its workspace, unless given, is all NaN."""
    count = (ctypes.c_int64(len(problem.params)), ctypes.c_int64(problem.hidden.shape[0]))
    bytes_needed = host().workspace_bytes(tensors, *count)
    meta = rule.flat_parameters().detach().float().contiguous()
    if workspace is None and capacity > 1:
        workspace = torch.full((bytes_needed // 4,), torch.nan)
    size = host().args_bytes()
    out, sizes = ctypes.create_string_buffer(size * capacity), (ctypes.c_int64 * 3)()
    made = host().plan(
        tensors,
        *count,
        ctypes.c_uint64(cuda_step.address(meta)),
        ctypes.c_uint64(cuda_step.address(problem.hidden)),
        ctypes.byref(options or _Options()),
        ctypes.c_uint64(cuda_step.address(workspace)),
        capacity,
        out,
        sizes,
    )
    assert made < MOST_LAUNCHES
    each = [out.raw[size * i : size * (i + 1)] for i in range(made)]
    return Plan(each, sizes[0], sizes[1], bool(sizes[2]), bytes_needed, (meta, workspace))


def step_(
    rule: HierarchicalRule,
    problem: Problem,
    *,
    problems: Sequence[int] = (),
    lr: Sequence[float] | None = None,
    weight_decay: Sequence[float] | None = None,
    maximize: bool = False,
    nonfinite: int = 0,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    rounding_seed: int | None = None,
    grid: int = 2,
    architecture: int = 80,
    **options: Any,
) -> Result:
    """The in-place step, launched as `hierarchical_step` does; its workspace starts as NaN."""
    count = len(problem.params)
    tensors = table(problem, problems, lr or [1.0] * count, weight_decay or [0.0] * count)
    flags = torch.zeros(count + 1, dtype=torch.int32)
    made = plan(
        rule,
        problem,
        tensors,
        options=_Options(
            maximize,
            nonfinite,
            cuda_step.address(grad_scale),
            cuda_step.address(found_inf),
            cuda_step.address(flags),
            (rounding_seed or 0) & 0xFFFFFFFFFFFFFFFF,
        ),
    )
    rows = problem.hidden.shape[0]
    launches: list[tuple[str, Any]] = []

    def launch(kernel: str, blocks: int, threads: int, *arguments: Any) -> None:
        counts = module(architecture).launch(
            kernel, grid=blocks, block=threads, args=[*arguments], **options
        )
        launches.append((kernel, counts))

    if made.entries > 0:
        for raw in made.arguments[1:]:
            launch("hierarchical_send_kernel", 1, LEVEL_THREADS, raw)
        args = made.arguments[-1]
        if nonfinite:
            launch("hierarchical_scan_kernel", grid, LEVEL_THREADS, args, flags, flags[count:])
        if made.listed:
            launch("hierarchical_problems_kernel", rows, LEVEL_THREADS, args)
        sweep = SWEEPS[problem.planes[0].dtype] if rounding_seed is None else ROUNDING_SWEEP
        launch(sweep, grid, SWEEP_THREADS, args)
        launch("hierarchical_tensors_kernel", grid, LEVEL_THREADS, args)
        launch("hierarchical_apply_kernel", rows + grid, LEVEL_THREADS, args)
    cuda_step.emulator().free_all()
    return Result(flags.tolist(), launches)
