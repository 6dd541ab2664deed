"""Runs the compiled PTX of csrc/cuda/step.cu through ptxemu as the host code would launch it.

The host's planning (csrc/cuda/step_plan.h) is compiled too, and makes the kernels' arguments.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastl2o.rules import Rule
from tests import tensor_core

ROOT = Path(__file__).resolve().parent.parent
PTXEMU = ROOT.parent / "shared" / "ptxemu"
INCLUDES = [str(ROOT / "csrc/cuda"), str(ROOT / "csrc/include")]
SCAN_THREADS = 384
MOST_LAUNCHES = 8
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def missing() -> str | None:
    """Why the kernels cannot be tried here, or None."""
    if shutil.which("nvcc") is None:
        return "nvcc is not on PATH"
    if shutil.which("g++") is None:
        return "g++ is not on PATH"
    if not PTXEMU.is_dir():
        return "../shared/ptxemu is not there"
    return None


@functools.cache
def emulator() -> ModuleType:
    """The PTX interpreter, with tensor cores that truncate."""
    if str(PTXEMU) not in sys.path:
        sys.path.insert(0, str(PTXEMU))
    import ptxemu

    tensor_core.install()
    return ptxemu


# Compute capabilities, times ten, whose machine code is judged, and whose PTX it is made of: the
# kernels differ on 7.5, which has no TF32 tensor cores, and from 10.0 on, in threads and registers.
COMPILED = {75: 75, 80: 80, 90: 80, 100: 100, 120: 120}


def compile_kernels(source: str, architecture: int = 80) -> Any:
    """A file of csrc/cuda as PTX for a compute capability times ten; later devices run it too."""
    flags = ["-O3", "-std=c++17", "-Werror", "all-warnings"]
    with warnings.catch_warnings():
        # The emulator leaves the closing of its files to the garbage collector.
        warnings.simplefilter("ignore", ResourceWarning)
        return emulator().compile_cuda(
            str(ROOT / "csrc/cuda" / source),
            arch=f"sm_{architecture}",
            flags=flags,
            include_dirs=INCLUDES,
        )


def compile_host(source: str) -> ctypes.CDLL:
    """A file of tests, with the host's planning behind C functions."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "plan.so"
        includes = [f"-I{folder}" for folder in INCLUDES]
        flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
        command = ["g++", *flags, *includes, str(ROOT / "tests" / source), "-o", str(library)]
        subprocess.run(command, check=True)
        return ctypes.CDLL(str(library))


@functools.cache
def module(architecture: int = 80) -> Any:
    """The step kernels; from 80 on they use tensor cores."""
    return compile_kernels("step.cu", architecture)


@functools.cache
def host() -> ctypes.CDLL:
    """The host's planning of a step."""
    return compile_host("cuda_step_plan.cpp")


class _Tensor(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("param", "grad", "state", "step")] + [
        ("numel", ctypes.c_int64)
    ]


class _Launch(ctypes.Structure):
    _fields_ = [("tiles", ctypes.c_int64)] + [
        (name, ctypes.c_int32) for name in ("first_tensor", "tensors", "counters", "unused")
    ]


def address(tensor: Tensor | None) -> int:
    """A tensor's address on the emulated device; the tensor must stay alive."""
    if tensor is None or tensor.numel() == 0:
        return 0
    return int(emulator().DevicePtr(tensor))


def rule_arguments(rule: Rule) -> tuple[Any, ...]:
    """Family, preprocessing and constants as the planning takes them."""
    config = rule.config()
    names = ("p", "eps", "output_scale", "beta1", "beta2", "step_size")
    defaults = (10.0, 0.0, 0.1, 0.95, 0.95, 0.1)
    constants = [config.get(name, default) for name, default in zip(names, defaults, strict=True)]
    log_sign = config.get("preprocess", "log_sign") == "log_sign"
    return rule.family == "rnnprop", log_sign, (ctypes.c_double * 6)(*constants)


class Kernel(NamedTuple):
    """One of the compiled step kernels."""

    family: str
    precision: str = "exact"
    state_dtype: torch.dtype = torch.float32
    architecture: int = 80

    @property
    def name(self) -> str:
        """A part of the mangled name that no other kernel has."""
        rnnprop, exact = int(self.family == "rnnprop"), int(self.precision == "exact")
        state = "f" if self.state_dtype == torch.float32 else "t"
        return f"step_kernelILb{rnnprop}ELb{exact}E{state}E"

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        exact = int(self.precision == "exact")
        return host().shared_bytes(int(self.family == "rnnprop"), exact, self.architecture // 10)

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.threads_on(self.architecture)

    def threads_on(self, architecture: int) -> int:
        """Threads of a block on another compute capability, times ten."""
        exact = int(self.precision == "exact")
        return host().threads(exact, self.state_dtype.itemsize, architecture // 10)

    def launch(self, arguments: bytes, grid: int = 2) -> Any:
        """Run a launch of `grid` blocks; its counts."""
        return module(self.architecture).launch(
            self.name, grid=grid, block=self.threads, args=[arguments], smem=self.shared_bytes
        )


def functional_step(
    rule: Rule,
    grad: Tensor,
    state: Tensor,
    step: int = 0,
    precision: str = "exact",
    grid: int = 2,
    architecture: int = 80,
) -> tuple[Tensor, Tensor, Any]:
    """Update (N,), new state (S, N) and the launch's counts, from NaN-filled outputs."""
    update, new_state = torch.full_like(grad, torch.nan), torch.full_like(state, torch.nan)
    meta = rule.flat_parameters().detach().float().contiguous()
    arguments = ctypes.create_string_buffer(host().args_bytes())
    pointers = (ctypes.c_uint64(address(part)) for part in (grad, state, update, new_state))
    host().plan_functional(
        *rule_arguments(rule),
        ctypes.c_uint64(address(meta)),
        ctypes.c_int64(grad.numel()),
        ctypes.c_double(step),
        *pointers,
        arguments,
    )
    kernel = Kernel(rule.family, precision, architecture=architecture)
    counts = kernel.launch(arguments.raw, grid)
    emulator().free_all()
    return update, new_state, counts


def step_(
    rule: Rule,
    params: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    steps: list[Tensor],
    *,
    lr: float = 1.0,
    weight_decay: float = 0.0,
    maximize: bool = False,
    nonfinite: int = 0,
    precision: str = "exact",
    stochastic_rounding: bool = False,
    seed: int = 0,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    grid: int = 2,
    architecture: int = 80,
) -> tuple[list[int], list[Any]]:
    """The in-place step: the nonfinite flags and the counts of every launch but the scans."""
    meta = rule.flat_parameters().detach().float().contiguous()
    table = (_Tensor * max(1, len(params)))()
    counters = steps if rule.needs_step else [None] * len(params)
    for entry, *parts in zip(table, params, grads, states, counters, strict=False):
        entry.param, entry.grad, entry.state, entry.step = map(address, parts)
        entry.numel = parts[0].numel()
    flags = torch.zeros(len(params) + 1, dtype=torch.int32)
    size = host().args_bytes()
    arguments = ctypes.create_string_buffer(size * MOST_LAUNCHES)
    launches = (_Launch * MOST_LAUNCHES)()
    made = host().plan(
        *rule_arguments(rule),
        ctypes.c_uint64(address(meta)),
        table,
        ctypes.c_int64(len(params)),
        ctypes.c_double(lr),
        ctypes.c_double(weight_decay),
        maximize,
        nonfinite,
        DTYPES[params[0].dtype],
        stochastic_rounding,
        ctypes.c_uint64(seed),
        ctypes.c_uint64(address(grad_scale)),
        ctypes.c_uint64(address(found_inf)),
        ctypes.c_uint64(address(flags) if nonfinite else 0),
        MOST_LAUNCHES,
        arguments,
        launches,
    )
    assert made < MOST_LAUNCHES
    each = [arguments.raw[size * i : size * (i + 1)] for i in range(made)]
    if nonfinite:
        for launch, raw in zip(launches, each, strict=False):
            if launch.tensors > 0:
                pointers = [flags[launch.first_tensor :], flags[len(params) :]]
                module(architecture).launch(
                    "scan_kernel", grid=2, block=SCAN_THREADS, args=[raw, *pointers]
                )
    kernel = Kernel(rule.family, precision, states[0].dtype, architecture)
    counts = []
    for launch, raw in zip(launches, each, strict=False):
        if launch.tiles > 0:
            counts.append(kernel.launch(raw, grid))
        elif launch.counters > 0:
            counts.append(module(architecture).launch("count_kernel", grid=1, block=64, args=[raw]))
    emulator().free_all()
    return flags.tolist(), counts
