"""The GPU timing script, run on the CPU with its clock replaced: it must not rot unseen."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench import device


def test_every_row_is_checked_and_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def call_once(run: Callable[[], object], _: torch.Tensor) -> float:
        run()
        return 1.0

    report = tmp_path / "times.json"
    monkeypatch.setattr(device, "DEVICE", "cpu")
    monkeypatch.setattr(device, "FLUSH_BYTES", 16)
    monkeypatch.setattr(device, "median_ms", call_once)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    sizes = ["--coordinates", "1000", "--window-coordinates", "50"]
    monkeypatch.setattr("sys.argv", ["device.py", *sizes, "--json", str(report)])
    device.main()
    measured = json.loads(report.read_text())["measured"]
    methods = [row["method"] for row in measured]
    assert [m for m in methods if "window" in m] == [
        "lstm window auto",
        "lstm window autograd",
        "rnnprop window auto",
        "rnnprop window autograd",
    ]
    # A window of 50 coordinates and 20 steps in a millisecond.
    assert measured[-1]["ns a coordinate-step"] == 1000.0
    assert len(capsys.readouterr().out.splitlines()) == len(methods) == 11


def test_windows_are_compared_with_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    import fastl2o

    monkeypatch.setattr(device, "DEVICE", "cpu")
    exact = fastl2o.ops.unroll_backward
    calls = []

    def wrong_at_first(*arguments: object, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(arguments)
        d_meta, d_state = exact(*arguments, **options)  # type: ignore[arg-type]
        return (d_meta * 1.01 if len(calls) == 1 else d_meta), d_state

    monkeypatch.setattr(device.ops, "unroll_backward", wrong_at_first)
    with pytest.raises(AssertionError):
        device.check_window(fastl2o.LSTMRule())
