"""The package as others get it: sdist, one abi3 wheel, the pure-Python install, and its licence."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import metadata
from pathlib import Path

import pytest

import fastl2o
from fastl2o import _load

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
SETUP = (ROOT / "setup.py").read_text("utf-8")

STEP = """
import torch, fastl2o
parameter = torch.nn.Parameter(torch.ones(3))
parameter.grad = torch.ones(3)
rule = fastl2o.LSTMRule.as_sgd(0.1)
fastl2o.LearnedOptimizer([parameter], rule).step()
assert (parameter < 1).all(), parameter
print(fastl2o.__file__, fastl2o.info()["extension"])
"""


def run(*command: object, cwd: Path, **environment: str) -> str:
    """Run a command, show its output if it fails, return its standard output."""
    base = {key: value for key, value in os.environ.items() if not key.startswith("FASTL2O_")}
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**base, **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def pip(*arguments: object, cwd: Path, **environment: str) -> str:
    return run(sys.executable, "-m", "pip", *arguments, "--no-deps", cwd=cwd, **environment)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    # A pure-Python configuration: making an sdist compiles nothing and needs no compiler.
    run(
        sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", folder, ROOT,
        cwd=folder, FASTL2O_CPP="0",
    )  # fmt: skip
    (path,) = folder.iterdir()
    return path


def make_wheel(sdist: Path, folder: Path, **environment: str) -> Path:
    pip("wheel", "--no-build-isolation", "-w", folder, sdist, cwd=folder, **environment)
    (wheel,) = folder.iterdir()
    return wheel


def installed_step(wheel: Path, folder: Path) -> tuple[str, str]:
    """Install into ``folder`` and take a step there: where the package and its extension lie."""
    pip("install", "--target", folder / "site", wheel, cwd=folder)
    # From a foreign folder, and PYTHONPATH comes before an editable install of this source tree.
    output = run(sys.executable, "-c", STEP, cwd=folder, PYTHONPATH=str(folder / "site"))
    package, extension = output.split()
    return package, extension


def test_sdist_holds_every_source_file(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    tops = ("csrc", "kernels", "fastl2o", "tests", "bench", "docs")
    folders = [ROOT / top for top in tops]
    unwanted = {".pyc", ".so", ".tmp"}
    files = {
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in unwanted and "__pycache__" not in path.parts
    }
    files |= {"LICENSE", "Makefile", "README.md", "pyproject.toml", "setup.py", ".ci/run"}
    assert files <= held, files - held
    assert not [name for name in held if Path(name).suffix in unwanted]


@pytest.mark.slow
def test_wheel_from_the_sdist_is_abi3_and_steps(sdist: Path, tmp_path: Path) -> None:
    (tmp_path / "wheel").mkdir()
    wheel = make_wheel(sdist, tmp_path / "wheel", FASTL2O_WERROR="1", FASTL2O_CUDA="0")
    assert re.fullmatch(r"fastl2o-[\d.]+-cp310-abi3-\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    info = f"fastl2o-{PROJECT['version']}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"fastl2o", info}
    libraries = [name for name in names if name.endswith(".so")]
    assert libraries == ["fastl2o/_C.abi3.so"]
    expected = {"fastl2o/py.typed", "fastl2o/kernels/__init__.py", f"{info}/licenses/LICENSE"}
    recipes = [path.name for path in (ROOT / "fastl2o" / "recipes").glob("*.toml")]
    zoo = [path.name for path in (ROOT / "fastl2o" / "zoo").glob("*.*") if path.suffix != ".py"]
    expected |= {f"fastl2o/recipes/{name}" for name in recipes}
    expected |= {f"fastl2o/zoo/{name}" for name in zoo}
    kernels = [path.relative_to(ROOT).as_posix() for path in (ROOT / "kernels").rglob("*.py")]
    expected |= {f"fastl2o/{name}" for name in kernels}
    expected |= {p.relative_to(ROOT).as_posix() for p in (ROOT / "fastl2o").rglob("*.py")}
    assert expected <= set(names), expected - set(names)
    package, extension = installed_step(wheel, tmp_path)
    assert package.startswith(str(tmp_path))
    assert extension == str(tmp_path / "site" / "fastl2o" / "_C.abi3.so")


@pytest.mark.slow
def test_pure_python_wheel_steps(sdist: Path, tmp_path: Path) -> None:
    (tmp_path / "wheel").mkdir()
    wheel = make_wheel(sdist, tmp_path / "wheel", FASTL2O_CPP="0", CXX="/no/such/compiler")
    assert wheel.name.endswith("-py3-none-any.whl")
    package, extension = installed_step(wheel, tmp_path)
    assert package.startswith(str(tmp_path))
    assert extension == "None"


def test_import_with_cpp_0_does_not_load_the_extension(tmp_path: Path) -> None:
    program = (
        STEP
        + """
assert fastl2o.info()["extension"] is None
try:
    with fastl2o.backend("cpu"):
        pass
except RuntimeError as error:
    assert "FASTL2O_CPP" in str(error), error
else:
    raise AssertionError("a forced absent backend must be refused")
"""
    )
    run(sys.executable, "-c", program, cwd=tmp_path, FASTL2O_CPP="0", PYTHONPATH=str(ROOT))


@pytest.mark.parametrize(
    ("name", "accepted"),
    [("FASTL2O_CPP", "0 and 1"), ("FASTL2O_WERROR", "0 and 1"), ("FASTL2O_CUDA", "auto, 0 and 1")],
)
def test_setup_refuses_a_switch_it_does_not_know(name: str, accepted: str) -> None:
    environment = {**os.environ, "FASTL2O_CPP": "0", name: "yes"}
    result = subprocess.run(
        [sys.executable, str(ROOT / "setup.py"), "--version"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert f"{name} is 'yes'; accepted are {accepted}" in result.stderr


def libraries() -> list[Path]:
    return sorted(Path(fastl2o.__file__).parent.glob("_C*.so"))


def test_extension_is_built_and_loaded() -> None:
    if os.environ.get("FASTL2O_CPP") == "0":
        pytest.skip("FASTL2O_CPP=0: a pure-Python run")
    assert _load.find_library() is not None
    assert fastl2o.info()["extension"] == str(_load.find_library())


def test_libraries_use_only_the_stable_abi() -> None:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm (binutils) on this machine")
    assert libraries() or os.environ.get("FASTL2O_CPP") == "0"
    for library in libraries():
        listing = run(nm, "-D", "-C", "--undefined-only", library, cwd=ROOT)
        symbols = [line.split(maxsplit=1)[1] for line in listing.splitlines() if line.strip()]
        unstable = [s for s in symbols if re.search(r"\b(at|c10|torch|caffe2)::", s)]
        assert not unstable, f"{library.name} depends on torch's C++ ABI: {unstable}"
        # torch.ops.load_library needs no Python symbol, so none outside the limited API either.
        python = [s for s in symbols if re.match(r"_?Py[A-Z_]", s)]
        assert not python, f"{library.name} depends on Python's C API: {python}"


def test_licence_expression_and_text_agree() -> None:
    assert PROJECT["license"] == "Apache-2.0"
    assert PROJECT["license-files"] == ["LICENSE"]
    text = (ROOT / "LICENSE").read_text("utf-8")
    assert re.match(r"\s*Apache License\s+Version 2\.0, January 2004", text)
    assert "END OF TERMS AND CONDITIONS" in text
    assert "Apache-2.0" in (ROOT / "README.md").read_text("utf-8")
    assert not [line for line in PROJECT["classifiers"] if line.startswith("License")]


def test_installed_metadata_is_of_this_tree() -> None:
    assert fastl2o.__version__ == PROJECT["version"]
    assert metadata("fastl2o")["Requires-Python"] == PROJECT["requires-python"]


def test_run_time_requirements_have_no_upper_bounds() -> None:
    for requirement in PROJECT["dependencies"]:
        specifier = requirement.partition(";")[0]
        assert not re.search(r"==|<|~=", specifier), requirement


def test_setup_is_short_and_portable() -> None:
    assert len(SETUP.splitlines()) <= 140
    code = re.sub(r"#.*", "", SETUP)
    for flag in ("-march", "-ffast-math", "-mavx", "-Ofast"):
        assert flag not in code, f"{flag} breaks portability or the numerical contract"
    required = (
        "-std=c++20 -O3 -fno-math-errno -fno-trapping-math -ffp-contract=off -fvisibility=hidden "
        "-DTORCH_TARGET_VERSION=0x020b000000000000 -DPy_LIMITED_API=0x030A0000"
    )
    for flag in required.split():
        assert f'"{flag}"' in code, flag


def test_makefile_pins_torch_and_ci_calls_it() -> None:
    assert "TORCH_VERSION := 2.13.0" in MAKEFILE
    targets = set(re.findall(r"^([a-z]+):", MAKEFILE, flags=re.MULTILINE))
    assert {"demo", "test", "bench", "lint", "format", "wheel", "clean", "build"} <= targets
    ci = ROOT / ".ci" / "run"
    assert os.access(ci, os.X_OK)
    assert "make test" in ci.read_text("utf-8")
    assert "://" not in MAKEFILE, "package indexes are the user's to name"


@pytest.mark.parametrize("target", ["demo", "test", "bench", "wheel"])
def test_makefile_targets_plan_without_error(target: str, tmp_path: Path) -> None:
    if shutil.which("make") is None:
        pytest.skip("no make on this machine")
    plan = run("make", "-n", target, f"VENV={tmp_path}/venv", cwd=ROOT)
    assert "torch==2.13.0" in plan
