"""Where the GPU kernels join the package: routing, refusals, loading, building; needs no GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastl2o
from fastl2o import _load, _ops_gpu, backends
from fastl2o.rules import LSTMRule, RNNPropRule
from tests.common import Lists, SetVariable
from tests.gpu_common import needs_nvcc, needs_triton
from tests.test_backends import run_python

ROOT = Path(__file__).resolve().parent.parent
CUDA = torch.device("cuda", 0)
INTERPRETED = """
import torch, fastl2o
from fastl2o import ops
torch.manual_seed(0)
for rule in (fastl2o.LSTMRule(4, 1), fastl2o.RNNPropRule(4, 1)):
    results = []
    for name in ("triton", "reference"):
        param, grad = torch.linspace(-1, 1, 5), torch.linspace(-2, 1, 5)
        state, count = rule.init_state(param), torch.zeros(())
        with fastl2o.backend(name):
            ops.step_(rule, [param], [grad.clone()], [state], [count], lr=0.5)
        results.append([param, state, count])
        state, grads, weights = rule.init_state(grad), torch.stack([grad, -grad]), torch.ones(2, 1)
        meta = rule.flat_parameters().detach().requires_grad_()
        with fastl2o.backend(name):
            update, state = ops.step(rule, grad, state, 1, meta)
            results[-1] += [update.detach(), *torch.autograd.grad(update.sum() + state.sum(), meta)]
            results[-1] += ops.unroll_backward(
                rule, grads[:, None], rule.init_state(grad[None]), weights, steps=1, lr=0.5
            )
            results[-1] += ops.unroll_backward(
                rule, grads[:, None], rule.init_state(grad[None]), steps=2, d_updates=grads[:, None]
            )
            later = torch.ones_like(rule.init_state(grad[None]))
            results[-1] += ops.unroll_backward(
                rule, grads[:, None], 0.1 * later, weights, steps=2, lr=0.5, d_last_state=later
            )
    for kernel, reference in zip(*results, strict=True):
        torch.testing.assert_close(kernel, reference, rtol=1e-4, atol=1e-5)
print("alike")
"""


@pytest.fixture
def present(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Why each GPU backend is absent, to be changed by the test; both are present at first."""
    reasons = {"cuda": "", "triton": ""}
    for name in reasons:
        monkeypatch.setitem(backends._WHY_ABSENT, name, lambda name=name: reasons[name])
    return reasons


def test_auto_takes_cuda_then_triton_then_reference(present: dict[str, str]) -> None:
    assert backends.choose(CUDA, "") == "cuda"
    assert backends.choose(CUDA, "", lambda name: "size" if name == "cuda" else "") == "triton"
    assert backends.choose(CUDA, "float64 tensors") == "reference"
    present["cuda"] = "no library"
    assert backends.choose(CUDA, "") == "triton"
    present["triton"] = "not installed"
    assert backends.choose(CUDA, "") == "reference"
    assert backends.choose(torch.device("meta"), "") == "reference"


def test_forced_gpu_backends_refuse_instead_of_falling_back(present: dict[str, str]) -> None:
    with fastl2o.backend("cuda"):
        assert backends.choose(CUDA, "") == "cuda"
        with pytest.raises(RuntimeError, match="'cuda' was forced, but hidden 3 is not there"):
            backends.choose(CUDA, "", lambda name: "hidden 3 is not there")
        with pytest.raises(RuntimeError, match="'cuda' was forced for tensors on cpu; move them"):
            backends.choose(torch.device("cpu"), "")
    with (
        fastl2o.backend("triton"),
        pytest.raises(RuntimeError, match=r"forced for tensors on cpu; .*TRITON_INTERPRET=1"),
    ):
        Lists(LSTMRule(2, 1)).run(LSTMRule(2, 1))
    with fastl2o.backend("reference"):
        assert backends.choose(CUDA, "") == "reference"


def test_absent_gpu_backends_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(backends, "_cuda_extension", _load.load_cuda_extension())
    with pytest.raises(RuntimeError, match=r"'cuda' is not available: .*(FASTL2O|without CUDA)"):
        fastl2o.backend("cuda")
    if backends.importlib.util.find_spec("triton") is not None:
        with pytest.raises(
            RuntimeError, match=r"built without CUDA and ROCm: .*TRITON_INTERPRET=1"
        ):
            fastl2o.backend("triton")
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="Triton is not installed; get it with: pip install"):
        fastl2o.backend("triton")


def test_cuda_library_is_left_alone_under_a_torch_without_cuda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "_C_cuda.abi3.so"
    library.write_text("not a library; loading it would warn")
    monkeypatch.delenv("FASTL2O_CUDA", raising=False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in _load.load_cuda_extension(tmp_path).reason
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.warns(RuntimeWarning, match="goes on without its CUDA kernels"):
        extension = _load.load_cuda_extension(tmp_path)
    assert "built for another torch: rebuild it" in extension.reason
    monkeypatch.setenv("FASTL2O_CUDA", "0")
    assert "FASTL2O_CUDA=0 is set: unset it" in _load.load_cuda_extension(tmp_path).reason
    monkeypatch.delenv("FASTL2O_CUDA")
    library.unlink()
    assert "FASTL2O_CUDA=1 make build" in _load.load_cuda_extension(tmp_path).reason


def test_triton_takes_what_cuda_does_not(
    present: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_ops_gpu, "_cuda_refuses", lambda *_: "its kernels do not take this size")
    refuses = _ops_gpu.objections(LSTMRule(2, 1), CUDA)
    assert backends.choose(CUDA, "", refuses) == "triton"
    with (
        fastl2o.backend("cuda"),
        pytest.raises(RuntimeError, match="forced, but its kernels do not take this size"),
    ):
        backends.choose(CUDA, "", refuses)
    present["triton"] = "not installed"
    assert backends.choose(CUDA, "", refuses) == "reference"


def test_lists_of_several_dtypes_are_refused_by_gpu_steps() -> None:
    mixed = [torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16)]
    assert _ops_gpu.one_dtype(mixed[:1], mixed[:1]) == ""
    assert "params of one dtype in a call" in _ops_gpu.one_dtype(mixed, mixed[:1] * 2)
    assert "states of one dtype in a call" in _ops_gpu.one_dtype(mixed[:1] * 2, mixed)


def test_precision_is_exact_unless_asked(set_variable: SetVariable) -> None:
    set_variable("FASTL2O_PRECISION", None)
    assert not _ops_gpu.fast()
    set_variable("FASTL2O_PRECISION", "fast")
    assert _ops_gpu.fast()
    set_variable("FASTL2O_PRECISION", "tf32")
    with pytest.raises(ValueError, match="FASTL2O_PRECISION: 'tf32'; pass one of exact, fast"):
        _ops_gpu.fast()


def test_rules_become_arguments_of_the_cuda_ops() -> None:
    lstm = LSTMRule(3, 1, preprocess="identity", p=8.0, eps=1e-8, output_scale=0.2)
    assert _ops_gpu.cuda_arguments(lstm) == (False, 3, 1, False, 8.0, 1e-8, 0.2, 0.0, 0.0)
    rnnprop = RNNPropRule(4, 2, beta1=0.8, beta2=0.9, step_size=0.3)
    assert _ops_gpu.cuda_arguments(rnnprop) == (True, 4, 2, False, 1.0, 0.0, 0.3, 0.8, 0.9)


def test_importing_and_stepping_do_not_import_triton() -> None:
    output = run_python(
        "import sys, torch, fastl2o\n"
        "rule = fastl2o.LSTMRule(2, 1); param = torch.ones(3)\n"
        "fastl2o.ops.step_(rule, [param], [param.clone()], [rule.init_state(param)])\n"
        "fastl2o.info()\n"
        "print('triton' in sys.modules)"
    )
    assert output.split() == ["False"]


@needs_triton
def test_forced_triton_runs_in_the_interpreter() -> None:
    assert run_python(INTERPRETED, TRITON_INTERPRET="1").split() == ["alike"]


def test_direct_calls_of_the_gpu_ops_choose_their_backend(
    present: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = LSTMRule(2, 1)
    calls: list[str] = []
    kernel = _ops_gpu.dispatched(
        lambda name, *_: calls.append(name), lambda named: rule, lambda named: calls.append("plain")
    )
    named = {"grad": torch.ones(2), "state": torch.ones(4, 2), "meta": torch.ones(3)}
    monkeypatch.setattr(backends, "choose", _as_if_on_cuda(backends.choose))
    kernel(named)
    kernel({**named, "grad": torch.ones(2, dtype=torch.float64)})
    present["cuda"] = "no library"
    kernel(named)
    lists = {name: [torch.ones(2)] for name in ("params", "grads", "states")}
    kernel({**lists, "meta": torch.ones(3)})
    assert calls == ["cuda", "plain", "triton", "triton"]


def test_tensors_of_several_devices_are_refused_by_name(
    present: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "choose", _as_if_on_cuda(backends.choose))
    rule = LSTMRule(2, 1)
    kernel = _ops_gpu.dispatched(lambda *_: None, lambda named: rule, lambda named: None)
    here, there = torch.ones(2), torch.ones(2, device="meta")
    window = {"grads": here, "state": here, "loss_weights": there, "meta": here}
    with pytest.raises(ValueError, match="loss_weights is on meta, meta on cpu: move all tensors"):
        kernel(window)
    lists = {"params": [here, here], "grads": [here, there], "states": [here, here], "meta": here}
    with pytest.raises(ValueError, match=r"grads\[1\] is on meta, meta on cpu: move all tensors"):
        kernel(lists)


def _as_if_on_cuda(choose: object) -> object:
    return lambda device, unsupported, refuses: choose(CUDA, unsupported, refuses)  # type: ignore[operator]


def build_ext(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "setup.py"), "--version"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_setup_checks_the_cuda_switch(tmp_path: Path) -> None:
    result = build_ext(tmp_path, FASTL2O_CUDA="yes")
    assert result.returncode != 0
    assert "FASTL2O_CUDA is 'yes'; accepted are auto, 0 and 1" in result.stderr
    result = build_ext(tmp_path, FASTL2O_CUDA="1", PATH=str(tmp_path))
    assert result.returncode != 0
    assert "FASTL2O_CUDA=1 but nvcc is not on PATH" in result.stderr
    assert build_ext(tmp_path, FASTL2O_CUDA="auto", PATH=str(tmp_path)).returncode == 0


@needs_nvcc
def test_cuda_library_is_built_and_depends_on_the_stable_abi_only() -> None:
    if "0" in (os.environ.get("FASTL2O_CUDA"), os.environ.get("FASTL2O_CPP")):
        pytest.skip("FASTL2O_CUDA=0 or FASTL2O_CPP=0: no CUDA library was asked for")
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm (binutils) on this machine")
    library = Path(fastl2o.__file__).parent / "_C_cuda.abi3.so"
    listing = subprocess.run(
        [nm, "-D", "-C", "--undefined-only", str(library)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    symbols = [line.split(maxsplit=1)[1] for line in listing.splitlines() if line.strip()]
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols)
    assert not [s for s in symbols if re.search(r"\b(at|c10|torch|caffe2)::", s)]
    assert not [s for s in symbols if re.match(r"_?Py[A-Z_]|cuda[A-Z]|cu[A-Z]", s)]


@needs_nvcc
def test_cuda_library_is_bound_to_torchs_libraries() -> None:
    """Or the loader looks for torch's symbols in no library, and the CUDA kernels never load."""
    readelf = shutil.which("readelf")
    library = Path(fastl2o.__file__).parent / "_C_cuda.abi3.so"
    if readelf is None or not library.exists():
        pytest.skip("needs readelf (binutils), and the library that FASTL2O_CUDA=0 leaves out")
    dynamic = subprocess.run(
        [readelf, "-d", str(library)], capture_output=True, text=True, check=True
    ).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    assert {"libc10.so", "libtorch_cpu.so", "libtorch_cuda.so"} <= set(needed)


def test_ops_have_cuda_kernels_registered() -> None:
    for name in ("step_", "step", "step_backward", "unroll_backward"):
        for family in ("lstm", "rnnprop"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(
                f"fastl2o::{family}_{name}", "CUDA"
            )
