"""What the documentation says is so: examples run, commands exist, every variable is listed."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
from typer.main import get_command

import fastl2o
from fastl2o import cli
from fastl2o.meta.recipe import recipe_names

ROOT = Path(__file__).resolve().parent.parent
MODULES = [
    info.name
    for info in pkgutil.walk_packages(fastl2o.__path__, "fastl2o.")
    if not info.name.startswith("fastl2o._C")  # a library of ops, not a Python module
]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text("utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("name", ["fastl2o", *MODULES])
def test_docstring_examples_run(name: str) -> None:
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    result = doctest.testmod(importlib.import_module(name), optionflags=flags)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples of {name} failed"


@pytest.mark.parametrize("index", range(len(blocks(ROOT / "README.md", "python"))))
def test_readme_python_blocks_run(index: int, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks(ROOT / "README.md", "python")[index], f"README block {index}", "exec"), {})


def test_readme_commands_exist() -> None:
    shell = "\n".join(blocks(ROOT / "README.md", "sh"))
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in re.findall(r"^make (\w+)", shell, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    commands = get_command(cli.app).commands
    calls = re.findall(r"^fastl2o (\w+) (\S+)(.*)$", shell, flags=re.MULTILINE)
    assert calls
    for name, argument, rest in calls:
        options = {option for parameter in commands[name].params for option in parameter.opts}
        assert set(re.findall(r"--[\w-]+", rest)) <= options, (name, rest)
        if name == "train":
            assert argument in recipe_names()


def test_every_environment_variable_is_documented_and_read() -> None:
    page = (ROOT / "docs" / "environment.md").read_text("utf-8")
    listed = set(re.findall(r"^\| `(FASTL2O_\w+)`", page, flags=re.MULTILINE))
    sources = [ROOT / "setup.py", *sorted((ROOT / "fastl2o").rglob("*.py"))]
    code = "\n".join(path.read_text("utf-8") for path in sources)
    read = set(re.findall(r"[\"'](FASTL2O_\w+)[\"']", code))
    for path in (ROOT / "csrc").rglob("*.*"):
        read |= set(re.findall(r"getenv\(\"(FASTL2O_\w+)\"", path.read_text("utf-8")))
    assert listed == read


def test_files_stay_under_400_lines() -> None:
    folders = ("fastl2o", "kernels", "csrc", "tests", "bench")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.*")]
    code = [path for path in files if path.suffix in {".py", ".cpp", ".h", ".inl", ".cu", ".cuh"}]
    long = {str(path): n for path in code if (n := len(path.read_text("utf-8").splitlines())) > 400}
    assert not long
