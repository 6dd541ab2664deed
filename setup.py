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
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

from setuptools import Command, Extension, setup

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
# Machine code for 7.5 to 12.x, as 8.0's also runs on 8.6 and 8.9; PTX for 11.0 and what comes.
CUDA_ARCHITECTURES = "7.5;8.0;9.0;10.0+PTX;12.0+PTX"


def switch(name: str, default: str) -> bool:
    """Read an on/off environment variable; docs/environment.md lists them all."""
    value = os.environ.get(name, default)
    if value not in ("0", "1"):
        raise SystemExit(f"{name} is {value!r}; accepted are 0 and 1")
    return value == "1"


def find_nvcc() -> str | None:
    """The nvcc to build with, None to leave the CUDA library out."""
    value = os.environ.get("FASTL2O_CUDA", "auto")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"FASTL2O_CUDA is {value!r}; accepted are auto, 0 and 1")
    nvcc = None if value == "0" else shutil.which("nvcc")
    if value == "1" and nvcc is None:
        raise SystemExit(
            "FASTL2O_CUDA=1 but nvcc is not on PATH. Install the CUDA toolkit >= 12.8 and add its "
            "bin folder to PATH, or set FASTL2O_CUDA=0 (GPUs then use Triton)"
        )
    return nvcc


def architecture_flags() -> list[str]:
    """nvcc's -gencode flags for TORCH_CUDA_ARCH_LIST, as "8.0;9.0+PTX"."""
    flags = []
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES
    for name in listed.replace(" ", ";").split(";"):
        number = name.removesuffix("+PTX").replace(".", "")
        codes = [f"sm_{number}", *([f"compute_{number}"] if name.endswith("+PTX") else [])]
        flags += [f"-gencode=arch=compute_{number},code={code}" for code in codes]
    return flags


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
        sources("csrc/ops.cpp", "csrc/cpu/*.cpp"),
        include_dirs=list(INCLUDES),
        depends=headers(),
        extra_compile_args=[*cpu_flags(), *DEFINES[: 1 + LIMITED_API], *system],
        py_limited_api=LIMITED_API,
    )


def build_cuda(nvcc: str, library: Path, temporary: Path) -> None:
    """Compile csrc/cuda one process a file and link ``library``; what is up to date stays."""
    from torch.utils.cpp_extension import include_paths

    newest = max((ROOT / name).stat().st_mtime for name in [*headers(), "setup.py"])
    common = [nvcc, *architecture_flags(), "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    flags = ["-std=c++20", "-O3", "-DUSE_CUDA", DEFINES[0], *(f"-I{path}" for path in INCLUDES)]
    flags += [f"-isystem={path}" for path in include_paths()]
    flags += ["-Xcompiler", f"-ffile-prefix-map={ROOT}/="]
    flags += ["-Werror", "all-warnings"] if switch("FASTL2O_WERROR", "0") else []
    temporary.mkdir(parents=True, exist_ok=True)

    def compiled(source: str) -> str:
        target = temporary / f"{Path(source).name}.o"
        command = [*common, *flags, "-c", source, "-o", str(target)]
        record = target.with_suffix(".command")
        current = target.exists() and record.exists() and record.read_text() == " ".join(command)
        if not current or target.stat().st_mtime < max(newest, (ROOT / source).stat().st_mtime):
            subprocess.run(command, check=True, cwd=ROOT)
            record.write_text(" ".join(command))
        return str(target)

    jobs = int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(compiled, sources("csrc/cuda/*.cpp", "csrc/cuda/*.cu")))
    library.parent.mkdir(parents=True, exist_ok=True)
    # cudart is linked statically; torch's symbols come from the torch that loads the library.
    subprocess.run([*common, "-shared", *objects, "-o", str(library)], check=True, cwd=ROOT)


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
            build_cuda(nvcc, beside.with_name("_C_cuda.abi3.so"), Path(self.build_temp, "cuda"))

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
                sources("csrc/bindings/core.cpp", "csrc/cpu/*.cpp"),
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
    if not switch("FASTL2O_CPP", "1"):
        return {"cmdclass": commands}
    commands["build_ext"] = ops_command()
    find_nvcc()  # a wrong setting is told before anything is compiled
    options = {"bdist_wheel": {"py_limited_api": "cp310"}} if LIMITED_API else {}
    return {"cmdclass": commands, "ext_modules": [ops_extension()], "options": options}


setup(**configuration())
