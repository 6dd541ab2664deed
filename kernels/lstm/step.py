"""Launcher of the in-place Triton step over many tensors.

The tables that the kernels read are built once for a list of tensors and kept while the addresses
stay the same, so later steps allocate nothing and can be captured in a CUDA graph after one step.
Tables that a capture used are kept as long as the process, since no one tells when its graph goes;
of the others the last 16 lists' are. A list's working memory is as its parameters are: two steps of
one list must not run at the same time on two streams. On CPU tensors the kernels run only under
Triton's interpreter (``TRITON_INTERPRET=1``).
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastl2o._ops_reference import check_lists, nonfinite_message

from . import step_kernels
from .config import StepConfig, step_config

DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
STATE_DTYPES = (torch.float32, torch.bfloat16)
PASS, SKIP, RAISE = 0, 1, 2
ADVANCE_BLOCK = 128
SCAN_BLOCK = 1024
MAX_PLANS = 16


@dataclass(frozen=True)
class Plan:
    """What the launches over one list of tensors need; every tensor is on the list's device.

    Attributes:
        config: launch parameters.
        tensors: int64 (tensors, 5): addresses of param, grad, state, step counter; coordinates.
        chunks: int64 (chunks, 2): index of a tensor, first coordinate.
        corrections: float32 (tensors, 2), RNNprop's 1 / (1 - beta^t) of this step.
        flags: int32 (tensors,), 1 where a gradient holds NaN or Inf.
        scratch: float32, h of a tile between layers for each program where the state is bf16.
        programs: programs of the step's launch.
        compiled: the compile-time options that the step's kernel was launched with.
        stream: the stream of the first step, None on the CPU.
    """

    config: StepConfig
    tensors: Tensor
    chunks: Tensor
    corrections: Tensor
    flags: Tensor
    scratch: Tensor
    programs: int
    compiled: set[tuple[Any, ...]] = field(default_factory=set)
    stream: Any = None

    def used_on(self, stream: Any) -> None:
        """Keep the memory, once the plan is dropped, until `stream` is done with it."""
        for tensor in (self.tensors, self.chunks, self.corrections, self.flags, self.scratch):
            tensor.record_stream(stream)


# The last lists' plans, the least recently used first, and those of captured graphs.
_plans: OrderedDict[tuple[Any, ...], Plan] = OrderedDict()
_captured: dict[tuple[Any, ...], Plan] = {}
_plans_lock = threading.Lock()


def high_low(value: float) -> tuple[float, float]:
    """A float64 number as the sum of two float32 numbers; the second is 0 if it is infinite."""
    high = float(torch.tensor(value, dtype=torch.float32))
    return high, value - high if math.isfinite(high) else 0.0


def chunk_rows(numels: Sequence[int], chunk: int) -> list[tuple[int, int]]:
    """(tensor, first coordinate) of every chunk, in order; none for empty tensors."""
    return [(index, first) for index, n in enumerate(numels) for first in range(0, n, chunk)]


def _plan(
    rule: Any,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Tensor],
    steps: Sequence[Tensor],
) -> Plan:
    """The plan of these tensors, from the cache if their addresses are those of an earlier call.

    Raises:
        RuntimeError: a graph is being captured and there is none; tables cannot be copied then.
    """
    counters = [step.data_ptr() for step in steps] if steps else [0] * len(params)
    rows = tuple(
        (param.data_ptr(), grad.data_ptr(), state.data_ptr(), counter, param.numel())
        for param, grad, state, counter in zip(params, grads, states, counters, strict=True)
    )
    device, state_dtype = params[0].device, states[0].dtype
    rnnprop = rule.family == "rnnprop"
    key = (rows, device, state_dtype, rule.hidden_size, rule.num_layers, rnnprop)
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    with _plans_lock:
        plan = _captured.get(key) or _plans.get(key)
        if _capturing(device):
            if plan is None:
                raise RuntimeError(
                    "a CUDA graph is being captured and these tensors were not stepped before: "
                    "step them once, then capture"
                )
            _plans.pop(key, None)
            _captured[key] = plan
        elif plan is None:
            plan = _plans[key] = _make_plan(rule, rows, device, state_dtype, stream)
            if len(_plans) > MAX_PLANS:
                _plans.popitem(last=False)
        elif key in _plans:
            _plans.move_to_end(key)
            if stream != plan.stream:
                plan.used_on(stream)
    return plan


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _make_plan(
    rule: Any,
    rows: Sequence[tuple[int, ...]],
    device: torch.device,
    state_dtype: torch.dtype,
    stream: Any,
) -> Plan:
    numels = [row[-1] for row in rows]
    float32_state = state_dtype == torch.float32
    config = step_config(
        rule.hidden_size,
        rule.num_layers,
        len(rows),
        sum(numels),
        float32_state=float32_state,
        rnnprop=rule.family == "rnnprop",
    )
    chunks = torch.tensor(chunk_rows(numels, config.chunk), dtype=torch.int64).reshape(-1, 2)
    programs = min(len(chunks), config.max_programs or len(chunks))
    between_layers = rule.num_layers > 1 and not float32_state
    return Plan(
        config,
        torch.tensor(rows, dtype=torch.int64, device=device),
        chunks.to(device),
        torch.zeros((len(rows), 2), dtype=torch.float32, device=device),
        torch.zeros(len(rows), dtype=torch.int32, device=device),
        torch.zeros(
            programs * rule.hidden_size * config.block if between_layers else 1,
            dtype=torch.float32,
            device=device,
        ),
        programs,
        stream=stream,
    )


def _check(
    rule: Any,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Tensor],
    steps: Sequence[Tensor],
    meta: Tensor,
    scalars: dict[str, Tensor | None],
) -> None:
    """Check everything that the kernels take on trust."""
    if params[0].dtype not in DTYPES or (states and states[0].dtype not in STATE_DTYPES):
        raise TypeError(
            f"expected float32, float64, bfloat16 or float16 parameters and float32 or bfloat16 "
            f"states, got {params[0].dtype} and {states[0].dtype}; use another backend"
        )
    expected = len(params) if rule.needs_step else 0
    if len(grads) != len(params) or len(states) != len(params) or len(steps) != expected:
        raise ValueError(
            f"expected {len(params)} grads and states and {expected} steps for {len(params)} "
            f"params, got {len(grads)}, {len(states)} and {len(steps)}"
        )
    check_lists(rule, params, grads, states, steps)
    device = params[0].device
    for name, tensors, dtype in (
        ("params", params, params[0].dtype),
        ("states", states, states[0].dtype),
        ("steps", steps, torch.float32),
    ):
        for index, tensor in enumerate(tensors):
            if tensor.dtype != dtype or tensor.device != device:
                raise ValueError(
                    f"{name}[{index}]: expected {dtype} on {device}, got {tensor.dtype} on "
                    f"{tensor.device}; group tensors by dtype and device"
                )
    for name, number in ({"meta": meta} | scalars).items():
        count = rule.num_meta_parameters if name == "meta" else 1
        if number is None:
            continue
        right = number.dtype == torch.float32 and number.device == device
        if not right or number.numel() != count or not number.is_contiguous():
            raise ValueError(
                f"{name}: expected {count} contiguous float32 on {device}, got {number.dtype} of "
                f"shape {tuple(number.shape)} with strides {number.stride()} on {number.device}"
            )


def step_(
    rule: Any,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Tensor],
    steps: Sequence[Tensor],
    meta: Tensor,
    lr: float,
    weight_decay: float,
    maximize: bool,
    nonfinite_mode: int,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    rounding_seed: int | None = None,
) -> None:
    """theta <- (1 - lr weight_decay) theta + lr u for every tensor of the lists, in place.

    One launch, two for RNNprop, whose counters another one advances, and one more to look for
    non-finite gradients.

    Args:
        rule: an LSTMRule or RNNPropRule; only its constants are read.
        params, grads: float32, float64, bfloat16 or float16, all of one dtype, contiguous.
        states: `(S, *param.shape)` each, float32 or bfloat16, all of one dtype.
        steps: RNNprop: steps taken before, 0-dim float32 on the device, advanced by one.
            LSTM rule: empty.
        meta: flat meta-parameters `(M,)`, float32.
        lr, weight_decay: factor on the update, and decay per unit of lr.
        maximize: the rule sees the negative gradient.
        nonfinite_mode: PASS gives NaN and Inf to the rule; SKIP leaves a tensor whose gradient
            holds any; RAISE leaves everything and raises, at the cost of one read by the host.
        grad_scale: one float32 number on the device, or None: the rule sees grad / grad_scale, and
            that is written to grads.
        found_inf: one float32 number on the device, or None: if it is not 0, nothing is changed.
        rounding_seed: signed 64-bit number to round bfloat16 states stochastically with, or None.

    Raises:
        RuntimeError: RAISE, and a gradient holds NaN or Inf; or a CUDA graph is being captured and
            these tensors were not stepped before.
        TypeError, ValueError: shapes, dtypes, devices or layouts other than listed.

        Nothing was changed where this raises, also where Triton fails to compile a kernel.
    """
    if not params:
        return
    _check(
        rule, params, grads, states, steps, meta, {"grad_scale": grad_scale, "found_inf": found_inf}
    )
    plan = _plan(rule, params, grads, states, steps)
    has_found_inf = found_inf is not None
    found = plan.corrections if found_inf is None else found_inf
    dtypes = {"PARAM": DTYPES[params[0].dtype]}
    with torch.cuda.device_of(params[0]):
        if nonfinite_mode != PASS:
            plan.flags.zero_()
            if len(plan.chunks):
                step_kernels.find_nonfinite[(len(plan.chunks),)](
                    plan.tensors, plan.chunks, plan.flags, found, len(plan.chunks),
                    plan.config.chunk, BLOCK=SCAN_BLOCK, HAS_FOUND_INF=has_found_inf, **dtypes,
                )  # fmt: skip
        if nonfinite_mode == RAISE:
            flags = plan.flags.tolist()
            if any(flags):
                raise RuntimeError(nonfinite_message(flags.index(1)))
        flagged = {"HAS_FOUND_INF": has_found_inf, "HAS_FLAGS": nonfinite_mode == SKIP}
        scale = plan.corrections if grad_scale is None else grad_scale
        options = flagged | dtypes
        options |= {"HAS_SCALE": grad_scale is not None, "STOCHASTIC": rounding_seed is not None}

        def launch(chunks: int) -> None:
            step_kernels.step[(plan.programs,)](
                plan.tensors, plan.chunks, plan.corrections, meta, plan.scratch, scale, found,
                plan.flags, chunks, plan.programs, plan.config.chunk,
                -1.0 if maximize else 1.0, *high_low(1.0 - lr * weight_decay), *high_low(lr),
                *scalars(rule), *seed_words(rounding_seed or 0),
                STATE=DTYPES[states[0].dtype], BLOCK=plan.config.block,
                num_warps=plan.config.warps, enable_fp_fusion=True, **options, **constants(rule),
            )  # fmt: skip

        if steps:
            if plan.programs and tuple(options.values()) not in plan.compiled:
                launch(0)  # compiles: the counters must not advance before that has succeeded
                plan.compiled.add(tuple(options.values()))
            logs = [
                part
                for beta in (rule.beta1, rule.beta2)
                for part in high_low(math.log(beta) if beta else -math.inf)
            ]
            step_kernels.advance[(triton.cdiv(len(params), ADVANCE_BLOCK),)](
                plan.tensors, plan.corrections, found, plan.flags, len(params), *logs,
                BLOCK=ADVANCE_BLOCK, **flagged,
            )  # fmt: skip
        if plan.programs:
            launch(len(plan.chunks))


def seed_words(seed: int) -> tuple[int, int]:
    """The lower and the upper half of a 64-bit seed as signed 32-bit numbers."""
    halves = (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)
    low, high = (half - (1 << 32) if half >> 31 else half for half in halves)
    return low, high


def constants(rule: Any) -> dict[str, Any]:
    """The rule's architecture as compile-time constants of the step kernel."""
    rnnprop = rule.family == "rnnprop"
    return {
        "RNNPROP": rnnprop,
        "LOG_SIGN": not rnnprop and rule.preprocess == "log_sign",
        "LAYERS": rule.num_layers,
        "H": rule.hidden_size,
    }


def scalars(rule: Any) -> tuple[float, ...]:
    """scale, p, eps, e^p, beta1, beta2, 1 - beta1, 1 - beta2, as far as the family has them."""
    if rule.family == "rnnprop":
        return (
            *(rule.step_size, 1.0, 0.0, 1.0),
            *(rule.beta1, rule.beta2, 1.0 - rule.beta1, 1.0 - rule.beta2),
        )
    return (rule.output_scale, rule.p, rule.eps, math.exp(rule.p), 0.0, 0.0, 1.0, 1.0)
