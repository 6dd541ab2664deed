"""The command line: each command on a tiny case, and its errors."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
from rich.text import Text
from typer.testing import CliRunner

import fastl2o
from fastl2o import _cli_train, cli

RECIPE = """
name = "tiny"
description = "two outer steps, for tests"
outer_steps = 2
seed = 3

[rule]
family = "lstm"
hidden_size = 3
num_layers = 1
preprocess = "identity"

[[tasks]]
kind = "quadratic"
dim = 3

[estimator]
unroll = 2

[trainer]
horizon = 4
runs = 2
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


@pytest.fixture
def rule_file(tmp_path: Path) -> Path:
    path = tmp_path / "adam-like.safetensors"
    fastl2o.RNNPropRule.as_adam(0.01).save(path)
    return path


@pytest.fixture
def main_error(monkeypatch, capsys) -> Callable[..., str]:
    """Run the command line to its failure and return the one line that it prints."""

    def fail(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["fastl2o", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("fastl2o: ")
        return line

    return fail


def run(*arguments: object) -> str:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_info_names_version_and_backends() -> None:
    text = run("info")
    assert fastl2o.__version__ in text
    assert "reference" in text


def test_train_saves_a_rule_with_its_recipe(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "last rule" in run("train", recipe, "--out", out)
    assert {path.name for path in out.iterdir()} == {"tiny.safetensors", "checkpoint.pt", "log.csv"}
    rule = fastl2o.load(out / "tiny.safetensors")
    assert rule.config()["hidden_size"] == 3
    assert rule.card["recipe"]["seed"] == 3
    assert str(tmp_path) not in json.dumps(rule.card)  # where the recipe lay is not told on
    assert rule.card["trained"]["outer_steps"] == 2


def test_train_resumes_to_the_same_rule_as_without_a_break(recipe: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run("train", recipe, "--out", whole, "--outer-steps", 4)
    run("train", recipe, "--out", broken)
    with pytest.raises(RuntimeError, match="--resume"):
        run("train", recipe, "--out", broken)
    text = run("train", recipe, "--out", broken, "--resume", "--outer-steps", 4)
    assert "4 outer steps, continued after 2" in text
    assert "nothing is left" not in text
    text = run("train", recipe, "--out", broken, "--resume", "--outer-steps", 3)
    assert "nothing is left to do: 4 of 3 outer steps are done; give more by --outer-steps" in text
    rules = [fastl2o.load(folder / "tiny.safetensors") for folder in (whole, broken)]
    assert torch.equal(*(rule.flat_parameters() for rule in rules))


def test_train_says_which_rule_was_best(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(RECIPE + "[validation]\nevery = 1\nruns = 2\n", encoding="utf-8")
    text = run("train", recipe, "--out", tmp_path / "out")
    assert re.search(r"best rule: .*\(outer step [12], validation ", text)


def test_a_recipes_schedule_fixes_the_outer_steps(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(RECIPE + '[schedule]\nkind = "cosine"\n', encoding="utf-8")
    run("train", recipe, "--out", tmp_path)
    with pytest.raises(ValueError, match="--outer-steps must stay as it was"):
        run("train", recipe, "--out", tmp_path, "--resume", "--outer-steps", 4)


def test_train_refuses_what_it_would_ignore(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="recipe 'tiny' has no task on MNIST; leave --data out"):
        run("train", recipe, "--out", out, "--data", "mnist.npz")
    with pytest.raises(RuntimeError, match=r"there is no checkpoint in .*leave --resume out"):
        run("train", recipe, "--out", out, "--resume")
    assert not out.exists()


def test_a_damaged_checkpoint_is_an_error_on_one_line(
    main_error: Callable[..., str], recipe: Path, tmp_path: Path
) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"no checkpoint")
    message = main_error("train", recipe, "--out", tmp_path, "--resume")
    assert "no checkpoint in" in message
    assert "delete the directory to start over" in message


@pytest.mark.parametrize("command", ["eval", "train"])
@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seeds_have_the_same_range_in_every_command(command: str, seed: int, recipe: Path) -> None:
    result = CliRunner().invoke(cli.app, [command, str(recipe), "--seed", str(seed)])
    assert result.exit_code == 2
    assert "--seed" in result.output


def test_the_largest_seed_works_everywhere(recipe: Path, rule_file: Path, tmp_path: Path) -> None:
    recipe.write_text(RECIPE + "[validation]\nevery = 1\nruns = 2\n", encoding="utf-8")
    largest = ("--seed", 2**63 - 1)
    run("train", recipe, "--out", tmp_path / "out", *largest)
    run("eval", rule_file, "--horizon", 2, "--seeds", 2, "--dim", 2, *largest)


def test_version() -> None:
    assert run("--version") == f"fastl2o {fastl2o.__version__}\n"


def test_train_seed_changes_the_rule(recipe: Path, tmp_path: Path) -> None:
    run("train", recipe, "--out", tmp_path / "a", "--seed", 1)
    run("train", recipe, "--out", tmp_path / "b", "--seed", 2)
    rules = [fastl2o.load(tmp_path / name / "tiny.safetensors") for name in "ab"]
    assert not torch.equal(*(rule.flat_parameters() for rule in rules))


def test_eval_prints_json_and_writes_the_same(rule_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "result.json"
    text = run(
        "eval", rule_file, "--horizon", 6, "--seeds", 2, "--tuning-seeds", 2, "--dim", 3, "--step",
        3, "--json", "--out", out,
    )  # fmt: skip
    assert json.loads(text) == json.loads(out.read_text("utf-8"))
    (result,) = json.loads(text)["comparisons"]
    assert result["task"].startswith("Quadratic(dim=3")
    assert len(result["learning_rates"]) == 13
    names = [row["name"] for row in result["rows"]]
    assert names == ["adam-like", "SGD", "Nesterov", "RMSprop", "Adam"]
    assert list(result["rows"][0]["values"]) == ["step 3", "sum of 6", "last 1"]
    assert result["rows"][0]["ratios"]["step 3"] > 0


@pytest.mark.parametrize(("out", "named"), [("a.json", "a.json"), ("all", "all/curves.png")])
def test_eval_names_what_a_full_disk_had_no_room_for(
    out: str, named: str, main_error: Callable[..., str], rule_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    message = main_error(
        "eval", rule_file, "--no-baselines", "--horizon", 2, "--seeds", 1, "--out", tmp_path / out
    )
    assert f"cannot write '{tmp_path / named}': No space left on device; free some" in message
    assert not (tmp_path / named).exists()


def test_eval_prints_a_table_on_digits(rule_file: Path) -> None:
    text = run(
        "eval", rule_file, "--task", "digits", "--horizon", 2, "--seeds", 2, "--hidden", "4,3",
        "--activation", "relu", "--init-scale", "torch", "--no-baselines",
    )  # fmt: skip
    assert "hidden=[4, 3]" in text
    assert "split='meta_valid'" in text
    assert "adam-like" in text
    assert "SGD" not in text
    assert "rates" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "cifar"], "there is no task 'cifar'; give one of quadratic, digits, mnist,"),
        (["--threads", "100000"], "threads must be from 1 to"),
        (["--init-scale", "foo"], "init_scale must be a finite number"),
        (["--task", "digits", "--init-scale", "foo"], "at least 0, or 'torch'"),
        (["--out", "/dev/null/x.json"], "--out: there is no folder /dev/null and none can be made"),
        (["--hidden", "20"], "--task quadratic has no use for --hidden"),
        (["--task", "digits", "--data", "x.npz", "--dim", "3"], "--data, --dim"),
        (["--task", "digits", "--hidden", "many"], "--hidden takes widths"),
        (["--task", "digits", "--hidden", ","], "--hidden takes widths"),
        (["--criterion", "best"], "criterion must be 'sum' or 'final'"),
        (["--step", "101"], r"steps must lie in 0\.\.100"),
        (["--task", "mnist", "--data", "/nowhere/mnist.npz"], "/nowhere/mnist.npz"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_eval_refuses(arguments: list[str], message: str, rule_file: Path) -> None:
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        run("eval", rule_file, *arguments)


def test_eval_takes_each_rule_once(rule_file: Path) -> None:
    with pytest.raises(ValueError, match="given more than once; give each rule once"):
        run("eval", rule_file, rule_file)


def test_demo_prints_a_table_and_saves_the_picture(rule_file: Path, tmp_path: Path) -> None:
    picture = tmp_path / "pictures" / "demo.png"
    text = run("demo", "--rule", rule_file, "--steps", 3, "--seeds", 2, "--out", picture)
    for name in ("adam-like", "SGD", "Nesterov", "RMSprop", "Adam", "test accuracy"):
        assert name in text
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_demo_without_shipped_rules_says_what_to_do(monkeypatch) -> None:
    monkeypatch.setattr("fastl2o.zoo.names", list)
    with pytest.raises(RuntimeError, match="fastl2o train"):
        run("demo")


def test_bench_outside_a_source_tree_says_where_it_is(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "fastl2o" / "cli.py"))
    with pytest.raises(RuntimeError, match="make bench"):
        run("bench")


@pytest.mark.parametrize("package", ["pytest", "pytest_benchmark"])
def test_bench_without_its_packages_names_the_extra(
    package: str, monkeypatch, main_error: Callable[..., str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, package, None)
        message = main_error("bench")
    assert f"the benchmarks need {package}; " in message
    assert "pip install 'fastl2o[bench]'" in message


def test_main_prints_expected_errors_on_one_line(main_error: Callable[..., str]) -> None:
    assert "no-such-recipe" in main_error("train", "no-such-recipe")
    assert "sizes=" in main_error("eval", "lstm-mnist", "--dim", 10**12)


def test_bad_rule_files_are_named_on_one_line(
    main_error: Callable[..., str], rule_file: Path
) -> None:
    whole = rule_file.read_bytes()
    for content in (b"", b"junk\n" * 9, whole[:100], whole[:-100]):
        rule_file.write_bytes(content)
        assert str(rule_file) in main_error("eval", rule_file)
    rule_file.unlink()
    assert f"there is no rule file {rule_file}" in main_error("eval", rule_file)


def test_two_trainings_do_not_share_a_folder(tmp_path: Path) -> None:
    with (
        _cli_train._alone_in(tmp_path),
        pytest.raises(RuntimeError, match="another training is running"),
        _cli_train._alone_in(tmp_path),
    ):
        pass
    with _cli_train._alone_in(tmp_path):  # free again
        pass


def test_no_help_holds_brackets_that_rich_takes_for_markup_and_drops() -> None:
    for command in typer.main.get_group(cli.app).commands.values():
        for text in (command.help, *(getattr(each, "help", None) for each in command.params)):
            assert Text.from_markup(text or "").plain == (text or "")


def test_python_m_fastl2o_is_the_command_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastl2o", "info"], capture_output=True, text=True, check=True
    )
    assert "default_backend" in done.stdout
