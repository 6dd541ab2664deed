"""``fastl2o eval``: tasks and optimizers by name, the report, and an error for each mistake."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import fastl2o
from fastl2o import cli, meta
from fastl2o._cli_eval import _make_entrants
from fastl2o._cli_tasks import make_tasks
from fastl2o.evaluate import Entrant, Setting, compare, document, summary_cells, write_report

TASKS = """
[[tasks]]
kind = "quadratic"
dim = 3
[[tasks]]
kind = "mlp"
data = "digits"
hidden = [4]
"""
SMALL = ("--horizon", 4, "--seeds", 2, "--tuning-seeds", 1, "--learning-rate", 0.1)


@pytest.fixture
def tasks_file(tmp_path: Path) -> Path:
    path = tmp_path / "two.toml"
    path.write_text(TASKS, encoding="utf-8")
    return path


def evaluate(*arguments: object) -> str:
    result = CliRunner().invoke(cli.app, ["eval", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_report_has_tables_numbers_and_pictures(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "report"
    task = tmp_path / "digits.toml"
    task.write_text(TASKS[TASKS.rindex("[[tasks]]") :], encoding="utf-8")
    text = evaluate(
        "lstm-quadratic", "adam:1e-3", "adam", "--no-baselines", "--task", task, "--task", "digits",
        "--hidden", 3, "--generalisation", "--out", out, *SMALL,
    )  # fmt: skip
    assert f"report: {out / 'report.md'}" in text
    files = {"report.md", "report.json", "curves.png", "generalisation.png"}
    assert {path.name for path in out.iterdir()} == files
    for name in ("curves.png", "generalisation.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    report = json.loads((out / "report.json").read_text("utf-8"))
    assert [found["name"] for found in report["comparisons"]] == ["digits.toml", "digits"]
    for found in report["comparisons"]:
        assert found["baseline"] == "Adam"
        assert found["points"] == [0, 1, 2, 3, 4]
        names = [row["name"] for row in found["rows"]]
        assert names == ["lstm-quadratic", "Adam, lr 0.001", "Adam"]
        for row in found["rows"]:
            assert [len(run) for run in row["curves"]] == [5, 5]
        assert [row["name"] for row in found["generalisation"]["rows"]] == names
    markdown = (out / "report.md").read_text("utf-8")
    for line in (
        "## All tasks",
        "## digits",
        "### Generalisation: digits",
        "![losses](curves.png)",
    ):
        assert f"\n{line}\n" in markdown
    tables = [block for block in markdown.split("\n\n") if block.startswith("|")]
    assert len(tables) == 1 + 2 * 2
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_without_a_picture_there_is_a_json_file(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr("fastl2o.evaluate.compare", None)  # nothing is trained before the error
    with pytest.raises(RuntimeError, match=r"pip install 'fastl2o\[plot\]', or .*ends in \.json"):
        evaluate("adam", "--out", tmp_path / "report", *SMALL)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("fastl2o.evaluate.compare", compare)
    evaluate("adam", "--no-baselines", "--out", tmp_path / "found.json", *SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]


def test_diverged_runs_leave_gaps_in_the_report(tmp_path: Path) -> None:
    hopeless = Entrant.learned("hopeless", fastl2o.LSTMRule.as_sgd(1e18))
    setting = Setting(horizon=30, runs=2, tuning_runs=1, learning_rates=(0.01,))
    entrants = [hopeless, Entrant.tuned("SGD")]
    result = compare(meta.tasks.Quadratic(dim=3), entrants, setting, name="quadratic")
    write_report([result], tmp_path)
    report = json.loads((tmp_path / "report.json").read_text("utf-8"))
    lost = report["comparisons"][0]["rows"][0]
    assert lost["diverged"] == 2
    assert lost["seconds"] is None
    assert lost["to_baseline"]["steps"] is None
    assert lost["curves"][0][-1] is None
    assert "## All tasks" not in (tmp_path / "report.md").read_text("utf-8")


def test_the_summary_counts_over_tasks() -> None:
    setting = Setting(horizon=20, runs=2, tuning_runs=1, learning_rates=(0.01,))
    entrants = [Entrant.fixed("SGD", 1e-5), Entrant.tuned("SGD"), Entrant.fixed("SGD", 1e6)]
    found = [compare(meta.tasks.Quadratic(dim=dim), entrants, setting) for dim in (2, 3)]
    assert summary_cells(found) == (
        ["optimizer", "lowest last loss", "got to the baseline's loss", "diverged runs"],
        [
            ["SGD, lr 1e-05", "0/2", "0/2", "0/4"],
            ["SGD", "2/2", "2/2", "0/4"],
            ["SGD, lr 1e+06", "0/2", "0/2", "4/4"],
        ],
    )
    assert json.dumps(document(found), allow_nan=False)


def test_tasks_by_name(tasks_file: Path) -> None:
    tasks = make_tasks(
        ["quadratic", "digits", "ensemble/norm", str(tasks_file), "lstm-quadratic"],
        {"dim": 2, "hidden": (3,)},
    )
    norms = [f"ensemble/norm/{number}" for number in range(1, 7)]
    assert list(tasks) == [
        "quadratic", "digits", *norms, "two.toml/1", "two.toml/2", "lstm-quadratic",
    ]  # fmt: skip
    assert tasks["quadratic"].config()["dim"] == 2
    assert tasks["digits"].config()["hidden"] == [3]
    assert tasks["two.toml/1"].config()["dim"] == 3
    assert tasks["two.toml/2"].config()["split"] == "meta_valid"  # held out of meta-training
    assert tasks["lstm-quadratic"].config()["dim"] == 10
    assert isinstance(tasks["ensemble/norm/1"], meta.tasks.Norm)
    every = meta.tasks.ensemble(held_out=True).values()
    assert len(make_tasks(["ensemble"], {})) == sum(map(len, every))
    convolutions = make_tasks(["families/conv", "held_out/signal_conv"], {})
    assert list(convolutions) == [
        *(f"families/conv/{number}" for number in (1, 2, 3)),
        *(f"held_out/signal_conv/{number}" for number in (1, 2)),
    ]
    assert {task.config()["split"] for task in convolutions.values()} == {"meta_valid"}


def test_a_list_of_tasks_may_hold_families_that_no_rule_is_trained_on(tmp_path: Path) -> None:
    path = tmp_path / "held.toml"
    table = "[[tasks]]\nkind = 'families'\nheld_out = true\nfamilies = ['char_gru']\n"
    path.write_text(table, encoding="utf-8")
    assert list(make_tasks([str(path)], {})) == ["held.toml/1", "held.toml/2"]
    rule = "name = 'rule'\nouter_steps = 1\nrule = { family = 'lstm' }\n"
    path.write_text(rule + table, encoding="utf-8")
    with pytest.raises(ValueError, match="asks for held-out families"):
        make_tasks([str(path)], {})


def test_optimizers_by_name() -> None:
    entrants = _make_entrants(["Nesterov", "lstm-quadratic", "momentum", "adam:3e-4"], True)
    assert [(entrant.name, entrant.is_tuned) for entrant in entrants] == [
        ("Nesterov", True),
        ("lstm-quadratic", False),
        ("Momentum", True),
        ("Adam, lr 0.0003", False),
        ("SGD", True),
        ("RMSprop", True),
        ("Adam", True),
    ]
    (optimizer,) = (
        entrant.at(0.5)(torch.zeros(2, 3), None) for entrant in entrants if entrant.name == "SGD"
    )
    assert (type(optimizer), optimizer.defaults["lr"]) == (torch.optim.SGD, 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "minst"], "no task 'minst'; did you mean 'mnist'. give one of quadratic"),
        (
            ["--task", "ensemble/bow"],
            "ensemble has no family 'bow'; did you mean 'bowl'. give one of",
        ),
        (["--task", "nowhere.toml"], "there is no recipe 'nowhere.toml'"),
        (["--task", "digits", "--task", "digits"], "--task digits given more than once"),
        (["--task", "ensemble/bowl", "--dim", "3"], "--task ensemble/bowl has no use for --dim"),
        (["--horizon", "10", "--step", "11"], r"steps must lie in 0\.\.10 \(the horizon\)"),
        (["adamm"], "no rule or optimizer 'adamm'; did you mean 'adam'.*shipped rule"),
        (["adam", "Adam"], "Adam given more than once"),
        (["adam:fast"], "'adam:fast': behind the colon stands a learning rate"),
        (["adam:-1"], "the learning rate of Adam must be finite and above 0, got -1.0"),
        (["--baseline", "momentum"], r"\(SGD, .*Adam\), got 'Momentum'"),
        (["--learning-rate", "0"], "learning_rates must be finite and above 0"),
        (["--generalisation"], "Quadratic.* has no training and test data"),
        (["--out", "pyproject.toml"], "--out pyproject.toml is a file; give a folder"),
        (["--out", "/dev/null/report"], "--out: there is no folder /dev/null/report"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_named_before_anything_is_trained(
    arguments: list[str], message: str, monkeypatch
) -> None:
    monkeypatch.setattr("fastl2o.evaluate.compare", None)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evaluate("lstm-quadratic", *arguments)


def test_a_file_without_tasks_is_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty.toml"
    empty.write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match=r"empty\.toml has no tasks; give at least one \[\[tasks"):
        evaluate("adam", "--task", empty)
    empty.write_text("[[tasks]]\nkind = 'quadratik'\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"tasks\[0\].kind must be one of quadratic"):
        evaluate("adam", "--task", empty)
    empty.write_text("tasks = 3\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"tasks must be tables, written \[\[tasks\]\]"):
        evaluate("adam", "--task", empty)
