"""The benchmark suite runs and writes its report; no time that it takes is looked at."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench.suite import __main__ as suite
from bench.suite import contenders, report, scaling, steps, training
from tests.common import needs_cpu_kernels


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "SIZES", (50, 50))
    monkeypatch.setattr(scaling, "TOTAL", 100)
    monkeypatch.setattr(scaling, "COUNTS", (1, 10))
    monkeypatch.setattr(scaling, "SIZES", (100, 1000))
    monkeypatch.setattr(scaling, "LENGTHS", (1, 2))
    monkeypatch.setattr(scaling, "DIM", 5)
    monkeypatch.setattr(scaling, "TENSORS", (10, 3))
    monkeypatch.setattr(training, "BATCH_SIZES", (4,))
    monkeypatch.setattr(suite.common, "_TURN_SECONDS", 0.0)  # one call a turn
    # compiling takes a minute
    monkeypatch.setattr(contenders, "compiled", lambda family, sizes: "not compiled here")


@needs_cpu_kernels
def test_the_suite_measures_every_section_and_writes_its_report(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    result = suite.measure(quick=True)
    assert torch.get_num_threads() == threads
    assert {(row["rule"], row["backend"]) for row in result["steps"]} >= {
        (family, backend)
        for family in ("lstm", "rnnprop", "hierarchical")
        for backend in ("cpu", "eager reference")
    }
    for row in result["steps"]:
        if row["backend"] == "cpu":
            assert row["allocations a step"] == 0
            assert row["share of the limit"] > 0
    assert {curve["over"] for curve in result["curves"]} == set(report.CURVES)
    assert len(result["training"]) == len(training.MODELS) * 6
    assert all(row["gate"] for part in ("steps", "curves", "training") for row in result[part])
    text = report.markdown(json.loads(json.dumps(result)))
    assert "| lstm | cpu |" in text
    report.plots(result, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"suite_scaling.png", "suite_training.png"}


def test_a_row_without_a_gate_makes_no_report() -> None:
    row = {"rule": "lstm", "backend": "cpu", "gate": "passed"}
    result = {"machine": {}, "steps": [row], "curves": [], "training": [], "notes": []}
    assert "passed" not in report.markdown(result).partition("## A step")[2]
    result["training"] = [{"model": "m", "parameters": 1, "batch": 1, "optimizer": "lstm"}]
    with pytest.raises(ValueError, match="rows of training have no gate"):
        report.markdown(result)
