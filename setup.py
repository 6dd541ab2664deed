"""Build of the compiled parts; everything static is in pyproject.toml.

``fastl2o._C``    the ops: torch's stable ABI and Python's limited API, one abi3 wheel for every
                  torch >= 2.11 and Python >= 3.10. ``FASTL2O_CPP=0`` leaves it out (pure Python).
``fastl2o._C_cuda``  the CUDA kernels, by plain nvcc commands (no GPU is needed), loaded
                  only where torch has CUDA. ``FASTL2O_CUDA=auto`` builds it where nvcc is found.
``fastl2o_core``  the torch-free core bound with pybind11, for tests and benchmarks only:
                  ``python setup.py build_core`` puts it into build/core. Never in the wheel.
"""

import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any, ClassVar

from setuptools import Command, Extension, setup

sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc/cuda"))
from build_library import build_library, find_nvcc

ROOT = Path(__file__).resolve().parent
# Python 3.10 and torch 2.11: the lowest whose limited API and stable ABI have all that is used.
DEFINES = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DPy_LIMITED_API=0x030A0000"]
# The limited API has no free-threaded build: there the wheel is tied to one Python version.
LIMITED_API = not sysconfig.get_config_var("Py_GIL_DISABLED")
INCLUDES = [str(ROOT / "csrc/include"), str(ROOT / "csrc/cpu")]
CPU_FLAGS = ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra"]
# No -march and no -ffast-math: each ISA file selects its instructions by pragma, and these flags
# are part of the numerical contract (without contraction a replay repeats bits).
CPU_FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
# Error messages name source files; not where they lay when they were compiled.
CPU_FLAGS += [f"-ffile-prefix-map={ROOT}/="]


def switch(name: str, default: str) -> bool:
    """Read an on/off environment variable; docs/environment.md lists them all."""
    value = os.environ.get(name) or default
    if value not in ("0", "1"):
        raise SystemExit(f"{name} is {value!r}; accepted are 0 and 1")
    return value == "1"


def cpu_flags() -> list[str]:
    return CPU_FLAGS + (["-Werror"] if switch("FASTL2O_WERROR", "0") else [])


def sources(*patterns: str) -> list[str]:
    """Files matching the patterns, relative to the root, sorted so that builds are reproducible."""
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(pattern))


def headers() -> list[str]:
    return sources("csrc/**/*.h", "csrc/**/*.inl", "csrc/**/*.cuh")


def ops_extension() -> Extension:
    """``fastl2o._C``: CPU registrations of the ops; loaded by ``torch.ops.load_library``."""
    from torch.utils.cpp_extension import CppExtension, include_paths

    # -isystem: warnings are ours to mend only in our own files.
    system = [f"-isystem{path}" for path in include_paths()]
    return CppExtension(
        "fastl2o._C",
        sources("csrc/*.cpp", "csrc/cpu/*.cpp"),
        include_dirs=list(INCLUDES),
        depends=headers(),
        extra_compile_args=[*cpu_flags(), *DEFINES[: 1 + LIMITED_API], *system],
        py_limited_api=LIMITED_API,
    )


def ops_command() -> type[Command]:
    from torch.utils.cpp_extension import BuildExtension

    class BuildOps(BuildExtension):
        def run(self) -> None:
            compiler = os.environ.get("CXX", "g++").split()[0]
            if not (shutil.which(compiler) or shutil.which("c++")):
                raise SystemExit(
                    f"no C++ compiler: {compiler!r} is not on PATH. Install g++ >= 12, or set "
                    "FASTL2O_CPP=0 for a pure-Python install (slower: reference backend only)"
                )
            super().run()
            nvcc = find_nvcc()
            if nvcc is None or self.extensions[0].name != "fastl2o._C":
                return
            beside = Path(self.get_ext_fullpath("fastl2o._C"))
            flags = [DEFINES[0], *(f"-I{path}" for path in INCLUDES)]
            flags += ["-Werror", "all-warnings"] if switch("FASTL2O_WERROR", "0") else []
            newest = max((ROOT / name).stat().st_mtime for name in [*headers(), "setup.py"])
            library, objects = beside.with_name("_C_cuda.abi3.so"), Path(self.build_temp, "cuda")
            build_library(nvcc, library, objects, flags, newest)

    return BuildOps


class BuildCore(Command):
    """Build the test-only pybind11 module ``fastl2o_core`` into build/core."""

    description = "build the test-only pybind11 module fastl2o_core into build/core"
    user_options: ClassVar[list[Any]] = []

    def initialize_options(self) -> None: ...
    def finalize_options(self) -> None: ...

    def run(self) -> None:
        from pybind11.setup_helpers import Pybind11Extension

        self.distribution.ext_modules = [
            Pybind11Extension(
                "fastl2o_core",
                sources("csrc/bindings/*.cpp", "csrc/cpu/*.cpp"),
                include_dirs=list(INCLUDES),
                depends=headers(),
                extra_compile_args=cpu_flags(),
            )
        ]
        build = ops_command()(self.distribution)  # for its parallel, incremental ninja build
        build.build_lib, build.build_temp = "build/core", "build/core/temp"
        build.ensure_finalized()
        build.run()


def configuration() -> dict[str, Any]:
    commands: dict[str, type[Command]] = {"build_core": BuildCore}
    # Wrong settings are told before anything is compiled, also those that are not used.
    compiled, _, _ = switch("FASTL2O_CPP", "1"), switch("FASTL2O_WERROR", "0"), find_nvcc()
    if not compiled:
        return {"cmdclass": commands}
    commands["build_ext"] = ops_command()
    options = {"bdist_wheel": {"py_limited_api": "cp310"}} if LIMITED_API else {}
    return {"cmdclass": commands, "ext_modules": [ops_extension()], "options": options}


setup(**configuration())
