"""Runs the PTX of csrc/cuda/hierarchical_unroll.cu, and of the step that the window backward does
again, through ptxemu, in the order in which the host code would launch it."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastl2o.rules import HierarchicalRule
from tests import cuda_hierarchical, cuda_step

KERNELS = ("enter", "ahead", "tensors", "sweep", "injected", "reduce_sweep", "reduce_levels")
COPY, ZERO, SEND, REPLAY, LAUNCH = range(5)
LEVEL_THREADS, SWEEP_THREADS = 256, 64


class _Call(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_uint64)
            for name in (
                *("meta", "grads", "state", "weights", "d_updates"),
                *("d_meta", "d_state", "sizes"),
            )
        ),
        *(
            (name, ctypes.c_int64)
            for name in ("tensors", "steps", "rows", "runs", "coordinates", "width")
        ),
        *((name, ctypes.c_double) for name in ("step", "lr", "weight_decay")),
    ]


class Limits(ctypes.Structure):
    """What the host keeps a window within; without values, as it does by itself."""

    _fields_ = [(name, ctypes.c_int64) for name in ("record_bytes", "sweep_rows", "level_rows")]

    @classmethod
    def make(cls, **values: int) -> Limits:
        """The host's own but for these."""
        made = host().limits()
        for name, value in values.items():
            setattr(made, name, value)
        return made


class _Command(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_int64),
        ("to", ctypes.c_uint64),
        ("source", ctypes.c_uint64),
        ("count", ctypes.c_int64),
    ]


class Result(NamedTuple):
    """What the window backward returns, and the counts of every launch by the kernel's name."""

    d_meta: Tensor
    d_state: Tensor
    launches: list[tuple[str, Any]]
    segments: int


@functools.cache
def module(architecture: int = 80) -> Any:
    """The kernels, compiled for a compute capability times ten."""
    return cuda_step.compile_kernels("hierarchical_unroll.cu", architecture)


@functools.cache
def host() -> ctypes.CDLL:
    """The host's planning of a window."""
    library = cuda_step.compile_host("cuda_hierarchical_window_plan.cpp")
    library.run.restype = ctypes.c_int64
    library.limits.restype = Limits
    return library


class Memory:
    """Tensors by their device addresses."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = [(cuda_step.address(each), each.view(-1)) for each in tensors]

    def __call__(self, address: int, size: int) -> Tensor:
        """The numbers in the `size` bytes from an address on; they must be one tensor's."""
        for start, tensor in self.tensors:
            first = (address - start) // 4
            if first >= 0 and first + size // 4 <= len(tensor):
                return tensor[first : first + size // 4]
        raise AssertionError(f"{size} bytes at {address:#x} are no tensor's")


def describe(call: _Call, limits: Limits) -> tuple[int, int, bool]:
    """Bytes of the workspace, segments, and whether the step's tensors go to a list."""
    out = (ctypes.c_int64 * 3)()
    host().describe(ctypes.byref(call), ctypes.byref(limits), out)
    return out[0], out[1], bool(out[2])


def make_call(
    steps: int, rows: int, runs: int, sizes: Sequence[int], width: int, **values: float
) -> tuple[_Call, Any]:
    """A call without addresses but that of its sizes, which must be kept."""
    numbers = (ctypes.c_int64 * max(1, len(sizes)))(*sizes)
    call = _Call(tensors=len(sizes), steps=steps, rows=rows, runs=runs, width=width, **values)
    call.coordinates, call.sizes = sum(sizes), ctypes.addressof(numbers)
    return call, numbers


def unroll_backward(
    rule: HierarchicalRule,
    window: Any,
    *,
    lr: float = 0.7,
    weight_decay: float = 0.1,
    limits: dict[str, int] | None = None,
    architecture: int = 80,
    **options: Any,
) -> Result:
    """The gradients of a window (tests.test_hierarchical_cpu_unroll); all memory starts as NaN."""
    meta = rule.flat_parameters().detach().float().contiguous()
    d_meta, d_state = (torch.full_like(each, torch.nan) for each in (meta, window.state))
    rows, runs, _ = window.grads.shape
    call, _numbers = make_call(
        window.steps, rows, runs, window.sizes, window.state.shape[1],
        step=window.taken, lr=lr, weight_decay=weight_decay,
    )  # fmt: skip
    within = Limits.make(**limits or {})
    size, segments, listed = describe(call, within)
    workspace = torch.full((size // 4,), torch.nan)
    tensors = [meta, window.grads, window.state, window.weights, d_meta, d_state]
    names = ["meta", "grads", "state", "weights", "d_meta", "d_state"]
    if window.d_updates is not None:
        tensors.append(window.d_updates)
        names.append("d_updates")
    for name, tensor in zip(names, tensors, strict=True):
        setattr(call, name, cuda_step.address(tensor))
    memory = Memory([*tensors, workspace])
    arguments = (ctypes.byref(call), ctypes.c_uint64(cuda_step.address(workspace)))
    arguments += (ctypes.byref(within),)
    count = host().run(*arguments, None, ctypes.c_int64(0))
    length = host().command_bytes()
    out = ctypes.create_string_buffer(count * length)
    assert host().run(*arguments, out, ctypes.c_int64(count)) == count
    launches: list[tuple[str, Any]] = []

    def launch(kernels: Any, kernel: str, blocks: int, threads: int, args: bytes) -> None:
        counts = kernels.launch(kernel, grid=blocks, block=threads, args=[args], **options)
        launches.append((kernel, counts))

    step_kernels = cuda_hierarchical.module(architecture)
    for place in range(0, count * length, length):
        command = _Command.from_buffer(out, place)
        start = place + ctypes.sizeof(_Command)
        step_args = out.raw[start : start + host().args_bytes()]
        blocks = command.count
        if command.kind == COPY:
            memory(command.to, blocks).copy_(memory(command.source, blocks))
        elif command.kind == ZERO:
            memory(command.to, blocks).zero_()
        elif command.kind == SEND:
            launch(step_kernels, "hierarchical_send_kernel", 1, LEVEL_THREADS, step_args)
        elif command.kind == REPLAY:
            if listed:
                name = "hierarchical_problems_kernel"
                launch(step_kernels, name, blocks, LEVEL_THREADS, step_args)
            sweep = cuda_hierarchical.SWEEPS[torch.float32]
            launch(step_kernels, sweep, 2, cuda_hierarchical.SWEEP_THREADS, step_args)
            for name, grid in (("tensors", 2), ("apply", blocks)):
                launch(step_kernels, f"hierarchical_{name}_kernel", grid, LEVEL_THREADS, step_args)
        else:
            name = KERNELS[command.kind - LAUNCH]
            threads = SWEEP_THREADS if name == "sweep" else LEVEL_THREADS
            args = out.raw[start : start + host().window_args_bytes()]
            launch(module(architecture), f"window_{name}_kernel", blocks, threads, args)
    cuda_step.emulator().free_all()
    return Result(d_meta, d_state, launches, segments)
