"""The hierarchical rule's Triton window backward: interpreted, compiled, its PTX executed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastl2o import HierarchicalRule
from tests import gpu_common
from tests.hierarchical_cpu import TOLERANCE, make_rule
from tests.test_hierarchical_cpu_unroll import autograd_unroll, make_window

pytestmark = [gpu_common.needs_triton, gpu_common.needs_ptxemu]

TYPES = {
    torch.float32: "*fp32", torch.int64: "*i64", torch.int32: "*i32", int: "i32", float: "fp32",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


@functools.cache
def compiled(kernel: Any, types: tuple[str, ...], constants: Any, architecture: int, warps: int):
    """A ptxemu module; `types` are those of the run-time arguments, in their order."""
    known = dict(constants)
    names = [name for name in kernel.arg_names if name not in known]
    signature = dict(zip(names, types, strict=True))
    return gpu_common.compile_triton(kernel, signature, known, architecture, warps)


class Executed:
    """Stands for a kernel; its launches run the compiled PTX.

    Triton lets lanes that hold the same value write it to one place at once. The check of races
    passes that as long as they hold the same bits.
    """

    def __init__(self, kernel: Any, counts: dict[str, Any]) -> None:
        self.kernel, self.counts = kernel, counts

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, num_warps: int, **options: Any) -> None:
            constants = {k: v for k, v in options.items() if k not in OPTIONS}
            types = (TYPES[getattr(each, "dtype", type(each))] for each in arguments)
            module = compiled(self.kernel, tuple(types), tuple(constants.items()), 80, num_warps)
            self.counts[self.kernel.__name__] = module.launch(
                grid, list(arguments), check_races=True, check_uninit=True
            )

        return launch


class Asked:
    """Stands for a kernel; its launches record what Triton would compile of it for tensors."""

    def __init__(self, kernel: Any, variants: dict[str, set[Any]]) -> None:
        self.kernel, self.seen = kernel, variants.setdefault(kernel.__name__, set())

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            aligned = tuple(
                parameter.do_not_specialize_on_alignment or argument.data_ptr() % 16 == 0
                for parameter, argument in zip(self.kernel.params, arguments, strict=False)
                if isinstance(argument, Tensor)
            )
            self.seen.add((aligned, tuple(options.items())))

        return launch


def replace_kernels(monkeypatch: pytest.MonkeyPatch, stand_in: Callable[[Any], Any]) -> None:
    from kernels.hierarchical import step_kernels, window_kernels
    from kernels.lstm import window_kernels as lstm_kernels

    for module, names in (
        (step_kernels, ("sweep", "tensor_level", "apply")),
        (
            window_kernels,
            ("advance_adjoint", "levels_backward", "sweep_backward", "injected_backward"),
        ),
        (lstm_kernels, ("add_partials",)),
    ):
        for name in names:
            monkeypatch.setattr(module, name, stand_in(getattr(module, name)))


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Counts of each kernel's last launch; memory is filled with NaN before kernels run."""
    from kernels.hierarchical import window

    counts: dict[str, Any] = {}
    replace_kernels(monkeypatch, lambda kernel: Executed(kernel, counts))
    monkeypatch.setattr(window, "address", gpu_common.device_address)
    gpu_common.poison_new_empty(monkeypatch)
    return counts


def run(rule: HierarchicalRule, recorded: Any) -> tuple[Tensor, Tensor]:
    from kernels.hierarchical import window

    return window.unroll_backward(
        rule, recorded.grads, recorded.state, recorded.taken,
        rule.flat_parameters().detach().float(), recorded.weights, recorded.steps,
        recorded.sizes, 0.7, 0.1, recorded.d_updates,
    )  # fmt: skip


def test_interpreted() -> None:
    gpu_common.run_interpreted("tests/interpreted_hierarchical_unroll.py")


@pytest.mark.parametrize("given", [False, True], ids=["weights", "d_updates"])
def test_executed_ptx_agrees_with_autograd(executed: dict[str, Any], given: bool) -> None:
    rule = make_rule((3, 4, 5, 2))
    recorded = make_window(rule, (33, 0, 5), 2, 2, 1, True)
    if given:
        generator = torch.Generator().manual_seed(7)
        recorded.d_updates = torch.randn(2, *recorded.grads.shape[1:], generator=generator)
        recorded.weights.fill_(torch.nan)
    exact = autograd_unroll(rule, recorded, 0.7, 0.1)
    for result, target in zip(run(rule, recorded), exact, strict=True):
        assert float((result - target).norm()) <= TOLERANCE * float(target.norm())


def test_memory_traffic_of_a_step_back_is_the_least_possible(executed: dict[str, Any]) -> None:
    rule, found = make_rule(), []
    for size in (32, 96):
        run(rule, make_window(rule, (size,), 1, 1, 1, True))
        found.append({name: counts.dram_bytes for name, counts in executed.items()})
    small, large = found
    # Adjoint, gradient and raw step; planes, their gradients both ways, gradient and adjoint. The
    # adjoint before a window's last step is not read.
    for name, least in (("advance_adjoint", 12), ("sweep_backward", 236)):
        assert least <= (large[name] - small[name]) / 64 <= 1.01 * least


@pytest.mark.parametrize("sizes", [(10, 20, 20, 4), (3, 4, 5, 2)], ids=str)
def test_steps_whose_tensors_lie_elsewhere_share_a_compiled_kernel(
    sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kernels.hierarchical import window
    from kernels.hierarchical.config import WindowConfig

    variants: dict[str, set[Any]] = {}
    replace_kernels(monkeypatch, lambda kernel: Asked(kernel, variants))
    monkeypatch.setattr(window, "window_config", lambda *asked: WindowConfig(32, 1024, 3, 2))
    rule = make_rule(sizes)
    run(rule, make_window(rule, (65, 5, 3), 5, 3, 1, True))
    assert len(variants.pop("add_partials")) == 2  # of either level's gradient
    assert {name: len(seen) for name, seen in variants.items()} == dict.fromkeys(variants, 1)


@pytest.mark.parametrize("architecture", gpu_common.ARCHITECTURES)
def test_the_sweep_compiles_without_spills(architecture: int) -> None:
    from kernels.hierarchical import step, window_kernels
    from kernels.hierarchical.config import window_config

    kernel, constants = window_kernels.sweep_backward, step.constants(HierarchicalRule())
    constants["BLOCK"] = window_config(1, 1).block
    integers = dict.fromkeys(("tensors", "d_tensors", "levels", "chunks"), "*i64")
    integers |= dict.fromkeys(("chunks_total", "programs", "chunk"), "i32")
    names = (name for name in kernel.arg_names if name not in constants)
    types = tuple(integers.get(name, "*fp32") for name in names)
    module = compiled(kernel, types, tuple(constants.items()), architecture, 1)
    found = gpu_common.resources(module, architecture)
    assert (found.spill_stores, found.spill_loads, found.stack) == (0, 0, 0)


def test_config_records_whole_windows_that_fit_and_segments_of_others() -> None:
    from kernels.hierarchical.config import RECORD_BYTES, window_config

    assert window_config(1000, 50).segments == 1
    for steps in (1, 2, 99, 100, 101):
        made = window_config(RECORD_BYTES, steps)
        assert made.segment * (made.segments - 1) < steps <= made.segment * made.segments
        assert made.segment <= steps**0.5 + 1
