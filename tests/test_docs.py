"""What the documentation says is so: examples run, commands exist, every variable is listed."""

from __future__ import annotations

import doctest
import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from typer.main import get_command

import fastl2o
from fastl2o import cli
from fastl2o.meta.recipe import recipe_names
from fastl2o.rules import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
MODULES = [
    info.name
    for info in pkgutil.walk_packages(fastl2o.__path__, "fastl2o.")
    if not info.name.startswith("fastl2o._C")  # a library of ops, not a Python module
]


PAGES = [
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md")))
]
PUBLIC = [
    *("fastl2o", "fastl2o.meta", "fastl2o.meta.tasks", "fastl2o.evaluate"),
    *("fastl2o.zoo", "fastl2o.convert"),
]


def text_of(page: str) -> str:
    return (ROOT / page).read_text("utf-8")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text_of(page), flags=re.DOTALL)


def examples(module: ModuleType) -> list[doctest.DocTest]:
    """The module's doctests, those of decorated functions too, which doctest passes over."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = {test.name: test for test in finder.find(module)}
    for name, value in vars(module).items():
        if inspect.isfunction(value) and value.__module__ == module.__name__:
            name = f"{module.__name__}.{name}"
            for test in finder.find(inspect.unwrap(value), name, module):
                found[test.name] = test
    return [test for test in found.values() if test.examples]


@pytest.mark.parametrize("name", ["fastl2o", *MODULES])
def test_docstring_examples_run(name: str) -> None:
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    runner = doctest.DocTestRunner(optionflags=flags)
    for test in examples(importlib.import_module(name)):
        runner.run(test)
    result = runner.summarize()
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples of {name} failed"


def public_names(module_name: str) -> dict[str, Any]:
    module = importlib.import_module(module_name)
    return {name: getattr(module, name) for name in module.__all__}


@pytest.mark.parametrize("module_name", PUBLIC)
def test_every_public_name_is_in_the_api_reference(module_name: str) -> None:
    pages = "\n".join(text_of(page) for page in PAGES if page.startswith("docs/api/"))
    listed = set(re.findall(r"^::: (\S+)$", pages, flags=re.MULTILINE))
    for name, value in public_names(module_name).items():
        whole = f"{module_name}.{name}"
        if inspect.ismodule(value):
            assert any(entry.startswith(f"{whole}.") for entry in listed), whole
        else:
            assert whole in listed


@pytest.mark.parametrize("module_name", PUBLIC)
def test_every_public_class_and_function_has_an_example(module_name: str) -> None:
    for name, value in public_names(module_name).items():
        if inspect.isclass(value) or inspect.isfunction(value):
            module = importlib.import_module(value.__module__)
            whole = f"{value.__module__}.{value.__qualname__}"
            assert whole in {test.name for test in examples(module)}, f"{name}: no example"


@pytest.fixture
def as_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty folder, one thread, a fixed seed; families that a page adds go away again."""
    monkeypatch.chdir(tmp_path)
    families, threads = dict(FAMILIES), torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
    torch.set_num_threads(threads)
    FAMILIES.clear()
    FAMILIES.update(families)


@pytest.mark.usefixtures("as_a_reader")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_python_blocks_of_a_page_run_one_after_the_other(page: str) -> None:
    namespace: dict[str, Any] = {"__name__": "page"}
    for index, block in enumerate(blocks(page, "python")):
        exec(compile(block, f"{page}, block {index}", "exec"), namespace)


def commands(page: str) -> list[str]:
    """The lines of a page's shell blocks, and what it names as code."""
    lines = [line for block in blocks(page, "sh") for line in block.splitlines()]
    prose = re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)
    return [re.sub(r"\s+#.*", "", line) for line in lines] + re.findall(r"`([^`\n]+)`", prose)


def test_fastl2o_commands_and_their_options_exist() -> None:
    known = get_command(cli.app).commands
    checked = 0
    for page in PAGES:
        for line in commands(page):
            match = re.match(r"(?:torchrun .*-m )?fastl2o (\w+)(.*)$", line)
            if match is None:
                continue
            name, rest = match[1], match[2].split()
            assert name in known, (page, line)
            options = {option for parameter in known[name].params for option in parameter.opts}
            options |= {o for parameter in known[name].params for o in parameter.secondary_opts}
            assert {word for word in rest if word.startswith("--")} <= options, (page, line)
            if name == "train" and rest and not rest[0].endswith(".toml"):
                assert rest[0] in recipe_names(), (page, line)
            if name == "eval" and rest and rest[0].islower() and "/" not in rest[0]:
                assert rest[0] in fastl2o.zoo.names(), (page, line)
            checked += 1
    assert checked > 20


def test_options_named_in_prose_exist() -> None:
    parameters = [p for command in get_command(cli.app).commands.values() for p in command.params]
    options = {option for p in parameters for option in (*p.opts, *p.secondary_opts)}
    for page in PAGES:
        for line in commands(page):
            if line.startswith("--"):
                assert line.split()[0] in options | {"--version"}, (page, line)


def test_make_targets_and_benchmark_modules_exist() -> None:
    makefile = text_of("Makefile")
    targets = set(re.findall(r"^([\w-]+):", makefile, flags=re.MULTILINE))
    checked = 0
    for page in PAGES:
        for line in commands(page):
            if match := re.match(r"make((?: [a-z-]+)+)(?= |$)", line):
                assert set(match[1].split()) <= targets, (page, line)
                checked += 1
            if match := re.match(r"python -m (bench\.\w+)", line):
                module = ROOT / match[1].replace(".", "/")
                names = (module.with_suffix(".py"), module / "__main__.py")
                assert any(name.is_file() for name in names), (page, line)
                checked += 1
    assert checked > 10


def test_files_and_folders_named_in_the_pages_exist() -> None:
    tops = "fastl2o|csrc|kernels|tests|bench|docs"
    named = {
        (page, name)
        for page in PAGES
        for name in re.findall(rf"`((?:{tops})/[\w./]*)`", text_of(page))
    }
    assert len(named) > 20
    missing = sorted((page, name) for page, name in named if not (ROOT / name).exists())
    assert not missing


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="the site needs the extra docs")
    folder = tmp_path_factory.mktemp("site")
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return folder


def test_site_builds_without_a_warning(site: Path) -> None:
    assert (site / "index.html").is_file()
    assert (site / "api" / "meta.html").is_file()


def test_site_needs_no_network(site: Path) -> None:
    for path in site.rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|link|img|iframe)[^>]*https?://[^>]*>", path.read_text("utf-8")
        )
        assert not loaded, (path.name, loaded)


def test_formulas_are_mathml(site: Path) -> None:
    page = (site / "rules" / "lstm.html").read_text("utf-8")
    assert page.count('<math xmlns="http://www.w3.org/1998/Math/MathML" display="block"') >= 5
    assert "arithmatex" not in page


def test_lists_are_not_swallowed_by_the_paragraph_before_them(site: Path) -> None:
    for path in site.rglob("*.html"):
        for paragraph in re.findall(r"<p>(.*?)</p>", path.read_text("utf-8"), flags=re.DOTALL):
            assert not re.search(r"^(-|\*|\d+\.) ", paragraph, flags=re.MULTILINE), path.name


def test_examples_are_shown_as_code(site: Path) -> None:
    page = (site / "api" / "fastl2o.html").read_text("utf-8")
    assert "<blockquote>" not in page


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
