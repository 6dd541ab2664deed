"""Launcher of the hierarchical rule's in-place Triton step.

Three launches however many tensors there are (two more for each further dtype of parameters in one
call), and one to look for non-finite gradients. Tables and working memory belong to the list of
tensors and are kept while their addresses stay, so later steps allocate nothing. On CPU tensors the
kernels run only under Triton's interpreter (``TRITON_INTERPRET=1``).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..lstm import step_kernels as lstm_kernels
from ..lstm.step import (
    DTYPES,
    RAISE,
    SCAN_BLOCK,
    SKIP,
    STATE_DTYPES,
    chunk_rows,
    high_low,
    seed_words,
)
from . import step_kernels
from .config import StepConfig, step_config
from .parameters import packed

MAX_PLANS = 16
PASS = 0


@dataclass
class Plan:
    """What the launches over one list of tensors need, on the list's device.

    Attributes:
        config: launch parameters.
        parts: of each dtype of the parameters, its first and its last chunk.
        tensors: int64 (tensors, 5): addresses of param, grad, planes and counter; coordinates.
        levels: int64 (tensors, 5): address of the tensor's state, problem, start of its raw
            step, first chunk, the one after its last.
        chunks: int64 (chunks, 2): index of a tensor, first coordinate.
        raw, partials, inverse_rms, packed: float32 working memory.
        flags: int32 (tensors,), 1 where a gradient holds NaN or Inf.
        rates: float32 (tensors, 4): 1 - lr * weight_decay and lr as sums of two, for `values`.
    """

    config: StepConfig
    parts: list[tuple[torch.dtype, int, int]]
    tensors: Tensor
    levels: Tensor
    chunks: Tensor
    raw: Tensor
    partials: Tensor
    inverse_rms: Tensor
    packed: Tensor
    flags: Tensor
    rates: Tensor
    values: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())

    def set_rates(self, lr: Sequence[float], weight_decay: Sequence[float]) -> None:
        """Write the table of rates, unless it holds these."""
        values = (tuple(lr), tuple(weight_decay))
        if values != self.values:
            rows = [
                (*high_low(1.0 - rate * decay), *high_low(rate))
                for rate, decay in zip(lr, weight_decay, strict=True)
            ]
            table = torch.tensor(rows, dtype=torch.float32, pin_memory=self.rates.is_cuda)
            # Nothing waits for a copy from pinned memory, which a capture may hold too.
            self.rates.copy_(table, non_blocking=True)
            self.values = values
            if capturing(self.rates.device):
                _captured.append(table)


_plans: OrderedDict[tuple[Any, ...], Plan] = OrderedDict()
# What graphs read when they are replayed: it must outlive the cache.
_captured: list[Any] = []
_lock = threading.Lock()


def capturing(device: torch.device) -> bool:
    """Whether launches go to a graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def make_plan(
    rule: Any, rows: Sequence[tuple[int, ...]], levels: Sequence[tuple[int, int]],
    dtypes: Sequence[torch.dtype], device: torch.device,
) -> Plan:  # fmt: skip
    """Tables and working memory.

    Args:
        rule: the rule; only its sizes are read.
        rows: of each tensor, addresses of param, grad, planes and counter; coordinates.
        levels: of each tensor, address of its state; its problem.
        dtypes: of the parameters.
        device: where the tables are to lie.
    """
    numels = [row[-1] for row in rows]
    config = step_config(sum(numels), rule.param_size)
    chunks: list[tuple[int, int]] = []
    firsts, parts = [0] * len(rows), []
    for dtype in dict.fromkeys(dtypes):
        begin = len(chunks)
        for index, own in enumerate(dtypes):
            if own == dtype:
                firsts[index] = len(chunks)
                chunks += [(index, at) for _, at in chunk_rows([numels[index]], config.chunk)]
        parts.append((dtype, begin, len(chunks)))
    ends = [first + -(-numel // config.chunk) for first, numel in zip(firsts, numels, strict=True)]
    table, at = [], 0
    for (address, problem), first, end, numel in zip(levels, firsts, ends, numels, strict=True):
        table.append((address, problem, at, first, end))
        at += numel

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    def integers(values: Sequence[Sequence[int]], width: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).reshape(-1, width).to(device)

    return Plan(
        config,
        parts,
        integers(rows, 5),
        integers(table, 5),
        integers(chunks, 2),
        floats(max(1, at)),
        floats(max(1, len(chunks)), rule.num_sums),
        floats(len(rows)),
        floats(config.max_programs, packed("all", rule.param_size, rule.num_scales)),
        torch.zeros(len(rows), dtype=torch.int32, device=device),
        floats(len(rows), 4),
    )


def plan_of(
    rule: Any,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    planes: Sequence[Tensor],
    tensors: Sequence[Tensor],
    steps: Sequence[Tensor],
    problems: Sequence[int],
) -> Plan:
    """The plan of these tensors, from the cache if their addresses are those of an earlier call."""
    rows = tuple(
        (*(tensor.data_ptr() for tensor in one), one[0].numel())
        for one in zip(params, grads, planes, steps, strict=True)
    )
    owners = problems or [0] * len(params)
    levels = tuple(
        (tensor.data_ptr(), problem) for tensor, problem in zip(tensors, owners, strict=True)
    )
    dtypes = tuple(param.dtype for param in params)
    device = params[0].device
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (rows, levels, dtypes, device, stream, *constants(rule).values())
    with _lock:
        plan = _plans.get(key)
        if plan is None:
            plan = _plans[key] = make_plan(rule, rows, levels, dtypes, device)
            if len(_plans) > MAX_PLANS:
                _plans.popitem(last=False)
        _plans.move_to_end(key)
        if capturing(device):
            _captured.append(plan)
    return plan


def _check(
    rule: Any, named: dict[str, Sequence[Tensor]], hidden: Tensor, meta: Tensor,
    scalars: dict[str, Tensor | None],
) -> None:  # fmt: skip
    """Check everything that the kernels take on trust but the shapes in lists."""
    params, planes = named["params"], named["planes"]
    device = params[0].device
    if planes[0].dtype not in STATE_DTYPES:
        raise TypeError(
            f"expected float32 or bfloat16 planes, got {planes[0].dtype}; use another backend"
        )
    for name, tensors in named.items():
        for index, tensor in enumerate(tensors):
            wanted = {"planes": planes[0].dtype, "params": tensor.dtype}.get(name, torch.float32)
            if name == "grads":
                wanted = params[index].dtype
            if tensor.dtype != wanted or tensor.device != device or not tensor.is_contiguous():
                raise ValueError(
                    f"{name}[{index}]: expected contiguous {wanted} on {device}, got "
                    f"{tensor.dtype} with strides {tensor.stride()} on {tensor.device}"
                )
    for index, param in enumerate(params):
        if param.dtype not in DTYPES:
            raise TypeError(
                f"params[{index}]: expected float32, float64, bfloat16 or float16, got "
                f"{param.dtype}"
            )
    counts = {"global_states": hidden.numel(), "meta": rule.num_meta_parameters}
    for name, number in {"global_states": hidden, "meta": meta, **scalars}.items():
        if number is None:
            continue
        count = counts.get(name, 1)
        right = number.dtype == torch.float32 and number.device == device
        if not right or number.numel() != count or not number.is_contiguous():
            raise ValueError(
                f"{name}: expected {count} contiguous float32 on {device}, got {number.dtype} of "
                f"shape {tuple(number.shape)} with strides {number.stride()} on {number.device}"
            )


def constants(rule: Any) -> dict[str, int]:
    """The rule's sizes as compile-time constants."""
    return {
        "P": rule.param_size, "T": rule.tensor_size, "G": rule.global_size, "S": rule.num_scales,
    }  # fmt: skip


def step_(
    rule: Any,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    planes: Sequence[Tensor],
    tensors: Sequence[Tensor],
    steps: Sequence[Tensor],
    hidden: Tensor,
    problems: Sequence[int],
    meta: Tensor,
    lr: Sequence[float],
    weight_decay: Sequence[float],
    maximize: bool,
    nonfinite_mode: int,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    rounding_seed: int | None = None,
) -> None:
    """One step of the tensors' problems, in place; shapes have been checked.

    Args:
        rule: a HierarchicalRule; only its sizes are read.
        params, grads: float32, float64, bfloat16 or float16, each gradient like its parameter,
            contiguous.
        planes: `(state_planes, *param.shape)` each, float32 or bfloat16, all of one dtype.
        tensors: `(tensor_size + 1,)` each, float32.
        steps: steps taken before, 0-dim float32, advanced by one.
        hidden: global states `(problems, global_size)`, float32.
        problems: the problem of each tensor; empty if there is one.
        meta: flat meta-parameters `(M,)`, float32.
        lr, weight_decay: of each tensor.
        maximize, nonfinite_mode, grad_scale, found_inf, rounding_seed: as for the LSTM rule's step.

    Raises:
        RuntimeError: RAISE, and a gradient holds NaN or Inf.
        TypeError, ValueError: dtypes, devices or layouts other than listed. Nothing was changed.
    """
    if not params:
        return
    lists = {"params": params, "grads": grads, "planes": planes, "tensor_states": tensors}
    scalars = {"grad_scale": grad_scale, "found_inf": found_inf}
    _check(rule, {**lists, "steps": steps}, hidden, meta, scalars)
    plan = plan_of(rule, params, grads, planes, tensors, steps, problems)
    if not len(plan.chunks):
        return
    plan.set_rates(lr, weight_decay)
    config, count = plan.config, len(params)
    found = plan.rates if found_inf is None else found_inf
    scale = plan.rates if grad_scale is None else grad_scale
    flagged = {"HAS_FOUND_INF": found_inf is not None, "HAS_FLAGS": nonfinite_mode == SKIP}
    sizes, state = constants(rule), DTYPES[planes[0].dtype]
    tiles = {"BLOCK": config.block, "TENSORS": config.tensors, "num_warps": config.warps}
    with torch.cuda.device_of(params[0]):
        if nonfinite_mode != PASS:
            plan.flags.zero_()
            for dtype, begin, end in plan.parts:
                if end > begin:
                    lstm_kernels.find_nonfinite[(end - begin,)](
                        plan.tensors, plan.chunks[begin:], plan.flags, found, end - begin,
                        config.chunk, PARAM=DTYPES[dtype], BLOCK=SCAN_BLOCK,
                        HAS_FOUND_INF=found_inf is not None,
                    )  # fmt: skip
        if nonfinite_mode == RAISE:
            flags = plan.flags.tolist()
            if any(flags):
                from fastl2o._ops_reference import nonfinite_message

                raise RuntimeError(nonfinite_message(flags.index(1)))
        for dtype, begin, end in plan.parts:
            programs = min(end - begin, config.max_programs)
            if programs:
                step_kernels.sweep[(programs,)](
                    plan.tensors, plan.levels, plan.chunks[begin:], meta, hidden, plan.packed,
                    plan.raw, plan.partials[begin:], scale, found, plan.flags,
                    count, end - begin, programs, config.chunk, -1.0 if maximize else 1.0,
                    *seed_words(rounding_seed or 0), PARAM=DTYPES[dtype], PLANES=state,
                    HAS_SCALE=grad_scale is not None, STOCHASTIC=rounding_seed is not None,
                    enable_fp_fusion=True, **tiles, **sizes, **flagged,
                )  # fmt: skip
        step_kernels.tensor_level[(count,)](
            plan.tensors, plan.levels, meta, hidden, plan.partials, plan.inverse_rms, found,
            plan.flags, ROWS=config.rows, num_warps=config.warps, enable_fp_fusion=True,
            **sizes, **flagged,
        )  # fmt: skip
        for number, (dtype, begin, end) in enumerate(plan.parts, 1):
            programs = min(end - begin, config.max_programs)
            shared = len(hidden) if number == len(plan.parts) else 0
            if programs + shared:
                step_kernels.apply[(programs + shared,)](
                    plan.tensors, plan.levels, plan.chunks[begin:], meta, hidden, plan.raw,
                    plan.inverse_rms, plan.rates, found, plan.flags,
                    count, end - begin, programs, config.chunk,
                    PARAM=DTYPES[dtype], enable_fp_fusion=True, **tiles, **sizes, **flagged,
                )  # fmt: skip
