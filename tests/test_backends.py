"""Choosing a backend, loading the compiled extension, fastl2o.info."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastl2o
from fastl2o import _load, backends, ops
from fastl2o.rules import LSTMRule
from tests.common import (
    Lists,
    SetVariable,
    needs_cpu_kernels,
)


def test_backend_is_forced_inside_the_block_only(set_variable: SetVariable) -> None:
    assert backends.requested() == "auto"
    seen = []
    with fastl2o.backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(backends.requested()))
        thread.start()
        thread.join()
        with fastl2o.backend("auto"):
            assert backends.requested() == "auto"
        assert backends.requested() == "reference"
    assert seen == ["auto"]
    set_variable("FASTL2O_BACKEND", "reference")
    assert backends.requested() == "reference"


def test_asking_for_an_absent_backend_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, set_variable: SetVariable
) -> None:
    with pytest.raises(ValueError, match="pass one of auto, reference, cpu, triton, cuda"):
        fastl2o.backend("gpu")
    monkeypatch.setattr(backends, "_cuda_extension", _load.Extension(None, "there is no GPU"))
    with pytest.raises(RuntimeError, match=r"backend 'cuda' is not available: there is no GPU"):
        fastl2o.backend("cuda")
    monkeypatch.setattr(backends, "_extension", _load.Extension(None, "there is no library"))
    with pytest.raises(RuntimeError, match="backend 'cpu' is not available: there is no library"):
        fastl2o.backend("cpu")
    set_variable("FASTL2O_BACKEND", "cpu")
    with pytest.raises(RuntimeError, match="FASTL2O_BACKEND 'cpu' is not available"):
        Lists(LSTMRule(2, 1)).run(LSTMRule(2, 1))
    set_variable("FASTL2O_BACKEND", "fast")
    with pytest.raises(ValueError, match="Invalid FASTL2O_BACKEND: 'fast'"):
        backends.requested()


def test_an_unknown_precision_is_refused_on_every_backend(set_variable: SetVariable) -> None:
    set_variable("FASTL2O_PRECISION", "tf32")
    for forced in ("auto", "reference"):
        with (
            fastl2o.backend(forced),
            pytest.raises(ValueError, match="FASTL2O_PRECISION: 'tf32'; pass one of exact, fast"),
        ):
            Lists(LSTMRule(2, 1)).run(LSTMRule(2, 1))
    with pytest.raises(ValueError, match="FASTL2O_PRECISION"):
        fastl2o.info()


@pytest.mark.parametrize(
    ("name", "load", "accepted"),
    [
        ("FASTL2O_CPP", _load.load_extension, "1, 0"),
        ("FASTL2O_CUDA", _load.load_cuda_extension, "auto, 0, 1"),
    ],
)
def test_unknown_switches_are_refused_at_import(
    name: str, load: Callable[[], object], accepted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "yes")
    with pytest.raises(ValueError, match=f"Invalid {name}: 'yes'; pass one of {accepted}"):
        load()


@needs_cpu_kernels
def test_forced_kernels_refuse_what_they_cannot_take() -> None:
    rule = LSTMRule(3, 1)
    grad = torch.randn(4, dtype=torch.float64)
    with fastl2o.backend("cpu"):
        with pytest.raises(
            RuntimeError, match=r"functional ops take float32 tensors, not .*float64"
        ):
            ops.step(rule, grad, rule.init_state(grad))
        with pytest.raises(RuntimeError, match=r"float32 or bfloat16, not torch\.float64"):
            ops.step_(rule, [grad], [grad], [rule.init_state(grad, torch.float64)])
    update, _ = ops.step(rule, grad, rule.init_state(grad, torch.float64))
    assert update.dtype == torch.float64


def test_a_family_without_kernels_runs_on_the_reference() -> None:
    class Halved(LSTMRule):
        family = "halved"

        def _forward(self, *inputs: object) -> tuple[Tensor, Tensor]:
            update, planes = super()._forward(*inputs)  # type: ignore[arg-type]
            return 0.5 * update, planes

    rule = Halved(num_layers=0, preprocess="identity", output_scale=1.0)
    with torch.no_grad():
        rule.readout.weight.fill_(-1.0)
    param = torch.zeros(2)
    ops.step_(rule, [param], [torch.ones(2)], [rule.init_state(param)])
    assert param.tolist() == [-0.5, -0.5]


def run_python(code: str, **environment: str) -> str:
    """Run code in a fresh interpreter and return what it printed."""
    root = str(Path(__file__).resolve().parents[1])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "PYTHONPATH": root, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_everything_works_without_the_library() -> None:
    output = run_python(
        "import torch, fastl2o\n"
        "model = torch.nn.Linear(3, 2)\n"
        "opt = fastl2o.LearnedOptimizer(model.parameters(), fastl2o.LSTMRule.as_sgd(0.1))\n"
        "model(torch.ones(1, 3)).sum().backward(); opt.step()\n"
        "print(fastl2o.info())\n",
        FASTL2O_CPP="0",
    )
    assert "FASTL2O_CPP=0 is set: unset it" in output


def test_a_broken_library_is_a_warning_not_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FASTL2O_CPP", raising=False)
    (tmp_path / "_C.abi3.so").write_text("not a library")
    (tmp_path / "_C_cuda.abi3.so").write_text("another one, of CUDA kernels")
    with pytest.warns(RuntimeWarning, match="goes on without its CPU kernels"):
        extension = _load.load_extension(tmp_path)
    assert not extension.loaded
    assert "rebuild it" in extension.reason
    (tmp_path / "_C.abi3.so").unlink()
    assert _load.find_library(tmp_path) is None
    assert "make build" in _load.load_extension(tmp_path).reason


def test_old_torch_is_refused() -> None:
    _load.check_torch_version("2.11.0")
    _load.check_torch_version("3.0.1+cu140")
    with pytest.raises(ImportError, match=r"needs torch >= 2.11, found 2.9.1"):
        _load.check_torch_version("2.9.1")


def test_info_prints_and_holds_what_it_says() -> None:
    info = fastl2o.info()
    assert info["torch"] == torch.__version__
    assert info["backends"]["reference"] == ""
    assert str(info).count("\n") == len(info) - 1
    assert info["zoo"] == fastl2o.zoo.names()
