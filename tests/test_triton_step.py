"""The in-place Triton step: interpreted, compiled ahead of time, and its PTX executed."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch

from tests import common, gpu_common

pytestmark = [gpu_common.needs_triton, gpu_common.needs_ptxemu]

POINTERS = {
    "tensors": "*i64",
    "chunks": "*i64",
    "chunks_total": "i32",
    "programs": "i32",
    "chunk": "i64",
    "seed_low": "i32",
    "seed_high": "i32",
    "flags": "*i32",
} | dict.fromkeys(
    ("corrections", "meta", "scratch", "grad_scale", "found_inf"), "*fp32"
)  # fmt: skip
CASES = {case.name: case for case in (*common.SMALL_RULE_CASES, *common.RULE_CASES)}


@functools.cache
def compiled(name: str, architecture: int, block: int, state: torch.dtype = torch.float32) -> Any:
    """The step kernel of a rule of common.py with float32 parameters, as a ptxemu module."""
    from kernels.lstm import step, step_kernels

    constants = step.constants(CASES[name].make()) | {
        "PARAM": step.DTYPES[torch.float32],
        "STATE": step.DTYPES[state],
        "BLOCK": block,
        "HAS_SCALE": False,
        "HAS_FOUND_INF": False,
        "HAS_FLAGS": False,
        "STOCHASTIC": False,
    }
    return gpu_common.compile_triton(
        step_kernels.step, POINTERS, constants, architecture, warps=min(4, block // 32)
    )


def execute(name: str, module: Any, sizes: tuple[int, ...], block: int, state_dtype: torch.dtype):
    """Run the PTX on tensors of `sizes`, compare with the reference, return ptxemu's counts."""
    from kernels.lstm import step

    case = CASES[name]
    rule, exact_rule = case.make(), case.make(torch.float64)
    generator = torch.Generator().manual_seed(2)
    params = [torch.randn(n, generator=generator) for n in sizes]
    grads = [common.tricky_gradients("mixed", (n,), generator) for n in sizes]
    states = [common.random_state(rule, (n,), generator).to(state_dtype) for n in sizes]
    plain, exact = [], []
    with torch.no_grad():
        for param, grad, state in zip(params, grads, states, strict=True):
            for results, each, dtype in (
                (plain, rule, torch.float32),
                (exact, exact_rule, torch.float64),
            ):
                update, planes = each.reference_step(grad.to(dtype), state.to(dtype), 3)
                results.append((0.9 * param.to(dtype) + 0.5 * update, planes.to(state_dtype)))
    address = gpu_common.device_address
    tensors = np.array(
        [
            [address(param), address(grad), address(state), 0, len(param)]
            for param, grad, state in zip(params, grads, states, strict=True)
        ],
        dtype=np.int64,
    )
    chunks = np.array(step.chunk_rows(sizes, block), dtype=np.int64).reshape(-1, 2)
    corrections = np.ones((len(sizes), 2), np.float32)
    if rule.needs_step:
        corrections[:] = [1 / (1 - rule.beta1**4), 1 / (1 - rule.beta2**4)]
    scratch = np.full(len(chunks) * rule.hidden_size * block, np.nan, np.float32)
    unused = np.zeros(len(sizes), np.int32)
    one = np.ones(1, np.float32)
    counts = module.launch(
        (len(chunks),),
        [
            tensors, chunks, corrections, rule.flat_parameters().detach(), scratch, one, one,
            unused, len(chunks), len(chunks), block, 1.0, *step.high_low(0.9), *step.high_low(0.5),
            *step.scalars(rule), *step.seed_words(0),
        ],
        check_races=True,
        check_uninit=True,
    )  # fmt: skip
    results = zip(params, states, strict=True)
    for what, got, other, target in (
        (what, got, other, target)
        for pair, others, targets in zip(results, plain, exact, strict=True)
        for what, got, other, target in zip(("param", "state"), pair, others, targets, strict=True)
    ):
        common.assert_as_accurate(got, other, target, what)
    return counts


def test_interpreted() -> None:
    gpu_common.run_interpreted("tests/interpreted_step.py")


@pytest.mark.parametrize("architecture", gpu_common.ARCHITECTURES)
@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("lstm-20x2", torch.float32),
        ("rnnprop-20x2", torch.float32),
        ("rnnprop-20x2", torch.bfloat16),
    ],
)
def test_compiles_without_spills(name: str, state: torch.dtype, architecture: int) -> None:
    from kernels.lstm.config import step_config

    config = step_config(
        20, 2, 1, 10**6, float32_state=state == torch.float32, rnnprop=name.startswith("rnnprop")
    )
    found = gpu_common.resources(compiled(name, architecture, config.block, state), architecture)
    assert (found.spill_stores, found.spill_loads, found.stack) == (0, 0, 0)
    # Two programs of four warps share a multiprocessor up to 255 registers a thread.
    assert found.registers <= 255


def test_counts_of_the_default_rule_stay_near_the_memory_floor() -> None:
    ptxemu = gpu_common.load_ptxemu()
    assert ptxemu is not None
    count, least = 512, 652
    module = compiled("lstm-20x2", 90, 512)
    counts = execute("lstm-20x2", module, (count,), 512, torch.float32)
    # A million coordinates share the meta-parameters and the tables.
    shared = 5141 * 4 + 256
    assert (counts.dram_bytes - shared) / count <= 1.02 * least
    assert counts.coalescing("st_global") >= 0.98
    assert counts.coalescing("ld_global") >= 0.98
    assert counts.thread_inst["fp32_fma"] / count <= 1.25 * 4980
    bound = ptxemu.roofline.predict(counts, "H100-SXM", min_bytes=least * count)
    chip = ptxemu.roofline.CHIPS["H100-SXM"]
    assert max(bound["times"].values()) <= 2.0 * least * count / chip.dram


@pytest.mark.parametrize("name", ["lstm-3x2", "lstm-2x1-identity", "rnnprop-3x2"])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_executed_ptx_is_as_accurate_as_plain_torch(name: str, state_dtype: torch.dtype) -> None:
    module = compiled(name, 80, 64, state_dtype)
    execute(name, module, (1, 63, 130), 64, state_dtype)


@functools.cache
def helper(name: str, architecture: int, **constants: Any) -> Any:
    """A helper kernel of the step, `advance` or `find_nonfinite`, as a ptxemu module."""
    from kernels.lstm import step_kernels

    types = POINTERS | {"count": "i32"}
    flagged = {"HAS_FOUND_INF": True} | constants
    return gpu_common.compile_triton(getattr(step_kernels, name), types, flagged, architecture)


def table(rows: list[list[int]]) -> np.ndarray:
    """The kernels' table of tensors."""
    return np.array(rows, dtype=np.int64)


@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_executed_scan_flags_the_tensors_that_are_not_finite(found_inf: float) -> None:
    from kernels.lstm import step

    sizes, block = (1, 130, 300), 128
    grads = [torch.ones(n) for n in sizes]
    grads[1][129], grads[2][255] = torch.nan, -torch.inf
    tensors = table([[0, gpu_common.device_address(g), 0, 0, len(g)] for g in grads])
    chunks = np.array(step.chunk_rows(sizes, 2 * block), dtype=np.int64).reshape(-1, 2)
    flags = np.zeros(3, np.int32)
    helper("find_nonfinite", 80, PARAM=step.DTYPES[torch.float32], BLOCK=block).launch(
        (len(chunks),),
        [tensors, chunks, flags, np.float32([found_inf]), len(chunks), 2 * block],
        check_races=True,
        check_uninit=True,
    )
    assert flags.tolist() == ([0, 0, 0] if found_inf else [0, 1, 1])


@pytest.mark.parametrize("chunk", [128, 512, 1024])
def test_executed_scan_reads_each_gradient_once(chunk: int) -> None:
    from kernels.lstm import step

    count = 4096
    grad = torch.ones(count)
    tensors = table([[0, gpu_common.device_address(grad), 0, 0, count]])
    chunks = np.array(step.chunk_rows([count], chunk), dtype=np.int64).reshape(-1, 2)
    counts = helper(
        "find_nonfinite", 80, PARAM=step.DTYPES[torch.float32], BLOCK=step.SCAN_BLOCK
    ).launch(
        (len(chunks),),
        [tensors, chunks, np.zeros(1, np.int32), np.zeros(1, np.float32), len(chunks), chunk],
    )
    # Each of a program's four warps also reads found_inf and four numbers of the tables.
    assert counts.space["ld_global"]["sectors"] == 4 * count // 32 + 4 * 5 * len(chunks)


@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_executed_advance_counts_and_corrects(found_inf: float) -> None:
    from kernels.lstm import step

    betas, taken = (0.95, 0.999), [0.0, 3.0, 9.0, 100_000.0]
    counters = [torch.tensor([t]) for t in taken]
    tensors = table([[0, 0, 0, gpu_common.device_address(c), 1] for c in counters])
    corrections, flags = np.full((4, 2), np.nan, np.float32), np.array([0, 0, 1, 0], np.int32)
    logs = [part for beta in betas for part in step.high_low(math.log(beta))]
    helper("advance", 80, HAS_FLAGS=True, BLOCK=128).launch(
        (1,),
        [tensors, corrections, np.float32([found_inf]), flags, 4, *logs],
        check_races=True,
        check_uninit=True,
    )
    stepped = [] if found_inf else [0, 1, 3]
    for index, (counter, before) in enumerate(zip(counters, taken, strict=True)):
        assert counter.item() == before + (index in stepped)
        if index in stepped:
            exact = [1.0 / -math.expm1((before + 1) * math.log(beta)) for beta in betas]
            np.testing.assert_allclose(corrections[index], exact, rtol=1.2e-7)
        else:
            assert np.isnan(corrections[index]).all()


@pytest.mark.parametrize("architecture", gpu_common.ARCHITECTURES)
def test_helpers_compile_without_spills(architecture: int) -> None:
    from kernels.lstm import step

    scan = helper(
        "find_nonfinite", architecture,
        PARAM=step.DTYPES[torch.float32], BLOCK=step.SCAN_BLOCK,
    )  # fmt: skip
    advance = helper("advance", architecture, HAS_FLAGS=True, BLOCK=step.ADVANCE_BLOCK)
    for module in (scan, advance):
        found = gpu_common.resources(module, architecture)
        assert (found.spill_stores, found.spill_loads, found.stack) == (0, 0, 0)
        assert found.registers <= 64


def test_config_is_a_function_of_the_problem() -> None:
    from kernels.lstm.config import MAX_CHUNKS, StepConfig, step_config

    assert step_config(20, 2, 1, 10**6, float32_state=True) == StepConfig(512, 4, 512, None)
    assert step_config(20, 2, 1, 10**6, float32_state=True, rnnprop=True).block == 256
    assert step_config(40, 2, 1, 10**6, float32_state=True).block == 256
    assert step_config(64, 3, 1, 10**6, float32_state=True).block == 128
    assert step_config(20, 2, 10_000, 10**6, float32_state=True).block == 128
    huge = step_config(20, 2, 1, 2**33, float32_state=False)
    assert 2**33 / huge.chunk <= MAX_CHUNKS
    assert huge.max_programs is not None
    with pytest.raises(ValueError, match="Invalid block: 100"):
        StepConfig(100, 4, 512, None)
    with pytest.raises(ValueError, match="Invalid block: 64; pass a multiple of"):
        StepConfig(64, 4, 512, None)
