"""Builds the library of CUDA kernels with plain nvcc commands; setup.py calls it. Needs no GPU."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Machine code for 7.5 to 12.x, as 8.0's also runs on 8.6 and 8.9; PTX for 11.0 and what comes.
CUDA_ARCHITECTURES = "7.5;8.0;9.0;10.0+PTX;12.0+PTX"
TORCH_LIBRARIES = ("c10", "torch_cpu", "torch_cuda")


def find_nvcc() -> str | None:
    """The nvcc to build with, None to leave the CUDA library out."""
    value = os.environ.get("FASTL2O_CUDA") or "auto"
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


def build_library(
    nvcc: str, library: Path, temporary: Path, extra_flags: list[str], newest: float
) -> None:
    """Compile this folder one process a file and link; what is up to date stays.

    Args:
        nvcc: path of the compiler.
        library: what to make.
        temporary: folder of the object files.
        extra_flags: defines, include folders and warnings.
        newest: when the last of the headers changed, seconds; older objects are compiled again.
    """
    from torch.utils.cpp_extension import include_paths

    common = [nvcc, *architecture_flags(), "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    flags = ["-std=c++20", "-O3", "-DUSE_CUDA", *extra_flags]
    flags += [f"-isystem={path}" for path in include_paths()]
    flags += ["-Xcompiler", f"-ffile-prefix-map={ROOT}/="]
    found = (path for kind in ("*.cpp", "*.cu") for path in Path(__file__).parent.glob(kind))
    sources = sorted(str(path.resolve().relative_to(ROOT)) for path in found)
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
        objects = list(pool.map(compiled, sources))
    library.parent.mkdir(parents=True, exist_ok=True)
    # cudart is linked statically.
    torch_libraries = stand_ins(common, temporary / "stand_ins")
    subprocess.run(
        [*common, "-shared", *objects, *torch_libraries, "-o", str(library)], check=True, cwd=ROOT
    )


def stand_ins(compiler: list[str], folder: Path) -> list[str]:
    """Linker flags that bind a library to torch's libraries by their names.

    The loader then finds those of the torch that is already loaded; without them it looks in none.
    Torch's CPU builds, against which this can be built, have no libtorch_cuda: empty libraries
    stand in for all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    empty = folder / "empty.cpp"
    empty.write_text("")
    flags = [f"-L{folder.resolve()}", "-Xlinker", "--no-as-needed"]
    for name in TORCH_LIBRARIES:
        file = f"lib{name}.so"
        soname = ["-Xlinker", f"-soname={file}"]
        command = [*compiler, "-shared", *soname, str(empty), "-o", str(folder / file)]
        subprocess.run(command, check=True, cwd=ROOT)
        flags.append(f"-l{name}")
    return flags
