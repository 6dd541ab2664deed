"""The Triton window backward and functional step: interpreted, compiled, their PTX executed."""

from __future__ import annotations

import functools
import re
from typing import Any

import numpy as np
import pytest
import torch

from fastl2o.rules import Rule
from tests import common, gpu_common, tensor_core

pytestmark = [gpu_common.needs_triton, gpu_common.needs_ptxemu]

CASES = {case.name: case for case in (*common.SMALL_RULE_CASES, *common.RULE_CASES)}
LR, DECAY = 0.7, 0.1
INTEGERS = (
    *("scratch_rows", "total", "dim", "runs", "steps", "rows", "segment", "segments"),
    *("tiles", "programs"),
)


@pytest.fixture(scope="module", autouse=True)
def _tensor_cores_truncate() -> None:
    gpu_common.load_ptxemu()
    tensor_core.install()


def compile_kernel(kernel: Any, constants: dict[str, Any], architecture: int, warps: int) -> Any:
    """A kernel as the launchers compile it, with tensors aligned as torch's allocator does."""
    ptxemu = gpu_common.load_ptxemu()
    assert ptxemu is not None
    names = [name for name in kernel.arg_names if name not in constants]
    scalars = ("lr", "keep", "scale", "p", "eps", "exp_p", "beta1", "beta2", "rest1", "rest2")
    types = dict.fromkeys(scalars, "fp32") | dict.fromkeys(INTEGERS, "i32")
    signature = {name: types.get(name, "*fp32") for name in names}
    aligned = {
        (index,): [["tt.divisibility", 16]] for index, name in enumerate(names) if name not in types
    }
    return ptxemu.from_triton(
        kernel, signature, constants, arch=architecture, num_warps=warps, num_stages=1,
        attrs=aligned, enable_fp_fusion=True,
    )  # fmt: skip


@functools.cache
def window_module(name: str, architecture: int, block: int, given: bool = False) -> Any:
    """The window kernel of a rule of common.py."""
    from kernels.lstm import step, window_kernels

    rule = CASES[name].make()
    constants = {"META": rule.num_meta_parameters, "GIVEN": given, "BLOCK": block}
    return compile_kernel(
        window_kernels.window, step.constants(rule) | constants, architecture, warps=1
    )


@functools.cache
def sum_module(count: int) -> Any:
    """The kernel that adds the partial sums of `count` meta-parameters."""
    from kernels.lstm import window, window_kernels

    constants = {"META": count, "DEPTH": window.SUM_DEPTH, "BLOCK": window.SUM_BLOCK}
    return compile_kernel(window_kernels.add_partials, constants, 80, warps=4)


def nan_filled(*shape: int) -> torch.Tensor:
    return torch.full(shape, torch.nan)


def execute(
    rule: Rule, module: Any, tensors: dict[str, torch.Tensor], sizes: tuple[int, ...], block: int,
    programs: int = 1, keep: float = 1.0 - LR * DECAY, lr: float = LR,
) -> tuple[torch.Tensor, Any]:  # fmt: skip
    """Both launches of a window; d_meta and the first launch's counts."""
    from kernels.lstm import step, window
    from kernels.lstm.config import WindowConfig, window_config

    made = window_config(rule, sizes[0], sizes[3])
    config = WindowConfig(block, 1, programs, made.segment, made.segments, made.scratch_rows)
    meta = rule.flat_parameters().detach()
    partials = nan_filled(programs, meta.numel())
    counts = module.launch(
        (programs,),
        [
            *(tensors.get(name, meta) for name in window.WINDOW_TENSORS), partials,
            nan_filled(programs * config.scratch_rows * block),
            *window.launch_sizes(config, sizes), lr, keep, *step.scalars(rule),
        ],
        check_races=True,
        check_uninit=True,
    )  # fmt: skip
    d_meta = nan_filled(meta.numel())
    sum_module(meta.numel()).launch(
        (-(-meta.numel() // window.SUM_BLOCK),),
        [partials, d_meta, programs],
        check_races=True,
        check_uninit=True,
    )
    return d_meta, counts


def run_window(
    name: str, architecture: int, block: int, recorded: common.Window, programs: int = 1
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """d_meta, d_state and counts of a recorded window."""
    from kernels.lstm import window

    rule = CASES[name].make()
    rows, runs, dim = recorded.grads.shape
    d_state = nan_filled(*recorded.state.shape)
    tensors = {
        "grads": recorded.grads,
        "state": recorded.state,
        "meta": rule.flat_parameters().detach(),
        "loss_weights": recorded.loss_weights,
        "corrections": window.corrections(
            rule, recorded.step, recorded.steps, recorded.loss_weights
        ),
        "d_state": d_state,
    }
    sizes = (runs * dim, dim, runs, recorded.steps, rows)
    module = window_module(name, architecture, block)
    d_meta, counts = execute(rule, module, tensors, sizes, block, programs)
    return d_meta, d_state, counts


def assert_window(name: str, recorded: common.Window, result: Any) -> None:
    """Compare d_meta and d_state with autograd in float64, by the error of float32 autograd."""
    case, scales = CASES[name], {"lr": LR, "weight_decay": DECAY}
    plain = common.autograd_unroll(case.make(), recorded, **scales)
    exact = common.autograd_unroll(case.make(torch.float64), recorded.to(torch.float64), **scales)
    for index, what in enumerate(("d_meta", "d_state")):
        common.assert_as_accurate(result[index], plain[index], exact[index], what, norm=True)


def test_interpreted() -> None:
    gpu_common.run_interpreted("tests/interpreted_unroll.py")


@pytest.mark.parametrize("architecture", gpu_common.ARCHITECTURES)
@pytest.mark.parametrize("name", ["lstm-20x2", "rnnprop-20x2"])
def test_compiles_without_spills(name: str, architecture: int) -> None:
    from kernels.lstm.config import window_config

    config = window_config(CASES[name].make(), 10**6, 20)
    assert config.warps == 1
    module = window_module(name, architecture, config.block)
    ptxemu = gpu_common.load_ptxemu()
    assert ptxemu is not None
    (found,) = ptxemu.toolchain.resources(module, f"sm_{architecture}", sass=False).values()
    assert (found.spill_stores, found.spill_loads, found.stack) == (0, 0, 0)
    # Eight programs of one warp share a multiprocessor up to 255 registers a thread.
    assert found.registers <= 255


@pytest.mark.parametrize(
    ("name", "architecture"), [("lstm-20x2", 80), ("lstm-20x2", 90), ("rnnprop-20x2", 80)]
)
def test_executed_ptx_is_as_accurate_as_plain_torch(name: str, architecture: int) -> None:
    rule = CASES[name].make()
    recorded = common.random_window(rule, steps=2, runs=3, dim=37, last=architecture == 80)
    block = 128 if name.startswith("lstm") else 64
    result = run_window(name, architecture, block, recorded)
    assert_window(name, recorded, result)
    counts = result[2]
    assert counts.mma_flops > 0
    assert counts.bank_conflicts <= 0.05 * counts.shared_wavefronts


def test_a_barrier_stands_on_both_sides_of_every_layer() -> None:
    # The emulator does not see races in global memory, where the rows are.
    ptx = window_module("rnnprop-3x2", 80, 32).ptx
    found = re.findall(
        r"^\s*(?:call\S* \S*(?:window_layers|products)_\$_(\w+?)__|(bar)\.sync)", ptx, re.MULTILINE
    )
    parts = [call or barrier for call, barrier in found]
    layers = [index for index, part in enumerate(parts) if part == "forward_layer"]
    assert len(layers) >= 2
    assert all(parts[index - 1] == parts[index + 1] == "bar" for index in layers)


def test_twenty_steps_and_two_programs_are_the_same_bits_each_time() -> None:
    name = "lstm-3x2"
    rule = CASES[name].make()
    recorded = common.random_window(rule, steps=20, runs=1, dim=71)
    results = [run_window(name, 80, 32, recorded, programs=2)[:2] for _ in range(2)]
    assert_window(name, recorded, results[0])
    assert common.same_bits(list(results[0]), list(results[1]))


@pytest.mark.parametrize("name", ["lstm-3x2", "rnnprop-3x2"])
def test_functional_step_and_its_derivative(name: str) -> None:
    from kernels.lstm import step, window, window_kernels

    case, block, dim = CASES[name], 32, 45
    rule = case.make()
    generator = torch.Generator().manual_seed(5)
    grad = torch.randn(dim, generator=generator)
    state = common.random_state(rule, (dim,), generator)
    d_update = torch.randn(dim, generator=generator)
    d_new_state = torch.randn(state.shape, generator=generator)
    meta = rule.flat_parameters().detach()
    corrections = window.corrections(rule, 3, 1, meta)

    module = compile_kernel(
        window_kernels.functional_step, step.constants(rule) | {"BLOCK": block}, 80, warps=1
    )
    update, new_state = nan_filled(dim), nan_filled(*state.shape)
    scratch = nan_filled(2 * (rule.hidden_size + 2) * block)
    module.launch(
        (2,),
        [
            *(grad, state, meta, corrections, update, new_state, scratch, dim, 2, 2),
            *step.scalars(rule),
        ],
        check_races=True,
        check_uninit=True,
    )
    d_state, d_grad = d_new_state.clone(), nan_filled(dim)
    tensors = {
        "grads": grad, "state": state, "meta": meta, "d_update": d_update,
        "corrections": corrections, "d_state": d_state, "d_grads": d_grad,
    }  # fmt: skip
    d_meta, _ = execute(
        rule, window_module(name, 80, block, given=True), tensors, (dim, dim, 1, 1, 1), block,
        lr=1.0, keep=1.0,
    )  # fmt: skip

    references = []
    for each, dtype in ((rule, torch.float32), (case.make(torch.float64), torch.float64)):
        flat = each.flat_parameters().detach()
        parts = [part.to(dtype) for part in (d_update, d_new_state, grad, state)]
        with torch.no_grad():
            forward = each.reference_step(*parts[2:], 3, flat)
            references.append((*forward, *each.reference_backward(*parts, 3, flat)))
    names = ("update", "new state", "d_grad", "d_state", "d_meta")
    kernel = (update, new_state, d_grad, d_state, d_meta)
    for what, *results in zip(names, kernel, *references, strict=True):
        common.assert_as_accurate(*results, what, norm=True)


def test_partials_are_added_in_float64() -> None:
    # In float32 the small numbers would vanish beside the large one.
    partials = np.full((70, 141), 2.0**-24, np.float32)
    partials[0], partials[69] = 1.0, -1.0
    d_meta = np.full(141, np.nan, np.float32)
    sum_module(141).launch((-(-141 // 32),), [partials, d_meta, 70], check_uninit=True)
    assert (d_meta == 68 * 2.0**-24).all()


def test_config_is_a_function_of_the_problem() -> None:
    from kernels.lstm.config import MAX_PROGRAMS, MAX_SEGMENT, window_config

    rule = CASES["lstm-20x2"].make()
    large = window_config(rule, 10**6, 20)
    assert (large.block, large.programs) == (128, MAX_PROGRAMS)
    assert (large.segment, large.segments) == (20, 1)
    assert window_config(CASES["rnnprop-20x2"].make(), 10**6, 20).block == 64
    assert window_config(rule, 1000, 20).block == 32
    assert window_config(rule, 0, 20).programs == 0
    for steps in (MAX_SEGMENT, MAX_SEGMENT + 1, 1000, 10**6):
        made = window_config(rule, 10, steps)
        assert made.segment * (made.segments - 1) < steps <= made.segment * made.segments
        assert made.segment + made.segments <= 2 * max(MAX_SEGMENT, steps**0.5) + 2
