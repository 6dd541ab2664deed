"""Launcher of the hierarchical rule's window backward in Triton.

The window is replayed by the step's own kernels, with every step's state recorded, a segment at a
time; then four launches take the gradients back over each step. On CPU tensors the kernels run only
under Triton's interpreter (``TRITON_INTERPRET=1``). Sums are in a fixed order that depends on the
problem alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..lstm import window_kernels as lstm_kernels
from ..lstm.window import SUM_BLOCK, SUM_DEPTH
from . import step_kernels, window_kernels
from .cells import offset
from .config import window_config
from .step import Plan, constants, make_plan
from .window_kernels import level_work
from .window_sweep import down, row

FLOAT = 4  # bytes


def address(tensor: Tensor) -> int:
    """Where a tensor lies on its device."""
    return tensor.data_ptr()


@dataclass
class Replay:
    """States and what else the replay records, and the tables of the kernels.

    Attributes:
        plan: tables of the first slot and of the first step, and the chunks.
        rows: `(segment + 2, R, W)`: states before the segment's steps, after its last, and last
            their gradients; global states are apart.
        hidden: `(segment + 1, R, global_size)`.
        raw: `(segment, R * D)`.
        sums: `(segment, ..)`, of each step first `(chunks, num_sums)`.
        inverse_rms: `(segment, tensors)`.
        taken: `(T,)`, steps taken before each.
    """

    plan: Plan
    rows: Tensor
    hidden: Tensor
    raw: Tensor
    sums: Tensor
    inverse_rms: Tensor
    taken: Tensor

    def tensors(self, slots: Tensor, times: Tensor) -> Tensor:
        """Tables `(n, tensors, 5)` of n slots and steps, both `(n,)` int64."""
        gradient = FLOAT * self.raw.shape[1]
        table = self.plan.tensors.expand(len(slots), -1, -1).clone()
        table[:, :, 1] += (times * gradient)[:, None]
        table[:, :, 2] += (slots * (self.rows.stride(0) * FLOAT))[:, None]
        table[:, :, 3] += (times * FLOAT)[:, None]
        return table

    def levels(self, slots: Tensor) -> Tensor:
        """Tables `(n, tensors, 5)` of n slots."""
        table = self.plan.levels.expand(len(slots), -1, -1).clone()
        table[:, :, 0] += (slots * (self.rows.stride(0) * FLOAT))[:, None]
        return table


class Window:
    """One call's tensors; see `unroll_backward`."""

    def __init__(
        self, rule: Any, grads: Tensor, state: Tensor, step: int, meta: Tensor,
        loss_weights: Tensor, steps: int, sizes: Sequence[int], lr: float, weight_decay: float,
        d_updates: Tensor | None,
    ) -> None:  # fmt: skip
        self.rule, self.grads, self.meta, self.loss_weights = rule, grads, meta, loss_weights
        self.steps, self.lr, self.keep = steps, lr, 1.0 - lr * weight_decay
        self.d_updates = d_updates
        if d_updates is not None:
            self.lr = 1.0
        self.state = state
        self.runs, self.coordinates = grads.shape[1:]
        self.count = sum(size > 0 for size in sizes)
        self.config = window_config(state.numel(), steps)
        self.replay = self._record(step, sizes)
        tensors, chunks = len(self.replay.plan.tensors), len(self.replay.plan.chunks)
        self.programs = min(chunks, self.config.programs)
        self.level = offset("tensor_gates", **constants(rule))
        units, upper = rule.param_size, (rule.tensor_size, rule.global_size)
        scales = rule.num_scales
        self.adjoint = meta.new_empty(self.runs * self.coordinates)
        self.products = meta.new_empty(chunks)
        self.step_sums = meta.new_empty((chunks, 3 * units + 1))
        self.down = meta.new_empty((tensors, down("all", units, scales)))
        self.work = meta.new_empty((tensors, level_work("all", **constants(rule))))
        self.scratch = meta.new_empty(self.programs * row("all", units, scales) * self.config.block)
        self.partials = meta.new_zeros((self.programs, self.level + 1))
        self.level_partials = meta.new_zeros((tensors, meta.numel() - self.level))
        self.d_levels = [meta.new_zeros((tensors, size)) for size in (*upper, 1)]
        self.between = [meta.new_empty((tensors, size)) for size in upper]

    def _record(self, step: int, sizes: Sequence[int]) -> Replay:
        rule, state, segment = self.rule, self.state, self.config.segment
        rows = state.new_empty((segment + 2, *state.shape))
        hidden = state.new_empty((segment + 1, self.runs, rule.global_size))
        taken = (torch.arange(self.steps, device=state.device) + step).to(state.dtype)
        table, levels = [], []
        width, first = state.shape[1], sum(sizes) * rule.state_planes
        for run in range(self.runs):
            at_grad = address(self.grads) + run * self.coordinates * FLOAT
            at_planes = address(rows) + run * width * FLOAT
            at_state = at_planes + first * FLOAT
            for size in sizes:
                if size:
                    table.append((0, at_grad, at_planes, address(taken), size))
                    levels.append((at_state, run))
                at_grad += size * FLOAT
                at_planes += size * rule.state_planes * FLOAT
                at_state += (rule.tensor_size + 1) * FLOAT
        plan = make_plan(rule, table, levels, [state.dtype] * len(table), state.device)
        # Each step's begin where rows of sums can be read four numbers at once.
        sums = -(-plan.partials.numel() // 4) * 4
        return Replay(
            plan,
            rows,
            hidden,
            state.new_empty((segment, self.runs * self.coordinates)),
            state.new_empty((segment, sums)),
            state.new_empty((segment, len(table))),
            taken,
        )

    def _forward(self, tensors: Tensor, levels: Tensor, hidden: Tensor, place: int) -> None:
        """One step in place on a slot; raw steps, sums and 1 / rms go to `place`."""
        replay, config, sizes = self.replay, self.replay.plan.config, constants(self.rule)
        plan, meta = replay.plan, self.meta
        chunks, count = len(plan.chunks), len(plan.tensors)
        programs = min(chunks, config.max_programs)
        flagged = {"HAS_FOUND_INF": False, "HAS_FLAGS": False}
        raw, sums, inverse_rms = replay.raw[place], replay.sums[place], replay.inverse_rms[place]
        step_kernels.sweep[(programs,)](
            tensors, levels, plan.chunks, meta, hidden, plan.packed, raw, sums, meta, meta,
            plan.flags, count, chunks, programs, config.chunk, 1.0, 0, 0, PARAM=tl.float32,
            PLANES=tl.float32, BLOCK=config.block, TENSORS=config.tensors, HAS_SCALE=False,
            STOCHASTIC=False, num_warps=config.warps, enable_fp_fusion=True, **sizes, **flagged,
        )  # fmt: skip
        step_kernels.tensor_level[(count,)](
            tensors, levels, meta, hidden, sums, inverse_rms, meta, plan.flags, ROWS=config.rows,
            num_warps=config.warps, enable_fp_fusion=True, **sizes, **flagged,
        )  # fmt: skip
        # Without programs for parameters, only the global states.
        step_kernels.apply[(self.runs,)](
            tensors, levels, plan.chunks, meta, hidden, raw, inverse_rms, plan.rates, meta,
            plan.flags, count, 0, 0, config.chunk, PARAM=tl.float32, BLOCK=config.block,
            TENSORS=config.tensors, num_warps=config.warps, enable_fp_fusion=True,
            **sizes, **flagged,
        )  # fmt: skip

    def _backward(
        self, t: int, place: int, tensors: Tensor, d_tensors: Tensor, levels: Tensor,
        new_levels: Tensor,
    ) -> None:  # fmt: skip
        """Everything back over step t, whose state is in slot `place`."""
        replay, config, sizes = self.replay, self.replay.plan.config, constants(self.rule)
        plan, meta, hidden = replay.plan, self.meta, replay.hidden[place]
        chunks, count = len(plan.chunks), len(plan.tensors)
        recorded = t + 1 < len(self.grads)
        after = t + 1 if recorded else t
        ahead, weights, follows = self.grads[after], self.loss_weights[after], t + 1 < self.steps
        if self.d_updates is not None:
            recorded, follows = True, False
            ahead, weights = self.d_updates[t], torch.ones_like(self.loss_weights[0])
        options = {"num_warps": config.warps, "enable_fp_fusion": True}
        window_kernels.advance_adjoint[(chunks,)](
            tensors, levels, plan.chunks, ahead, weights, replay.raw[place], self.adjoint,
            self.products, config.chunk, int(recorded), int(follows), self.lr, self.keep,
            BLOCK=config.block, **options,
        )  # fmt: skip
        window_kernels.levels_backward[(count,)](
            tensors, levels, new_levels, meta, hidden, plan.flags, replay.sums[place],
            replay.inverse_rms[place], self.products, *self.d_levels, *self.between, self.down,
            self.work, self.level_partials, count, self.count, float(self.coordinates), self.lr,
            META=self.level_partials.shape[1], TENSORS=config.tensors, ROWS=config.rows,
            **sizes, **options,
        )  # fmt: skip
        window_kernels.sweep_backward[(self.programs,)](
            tensors, d_tensors, levels, plan.chunks, meta, self.down, self.adjoint, self.step_sums,
            self.partials, self.scratch, chunks, self.programs, config.chunk,
            BLOCK=self.config.block, num_warps=1, num_stages=1, enable_fp_fusion=True, **sizes,
        )  # fmt: skip
        window_kernels.injected_backward[(count,)](
            levels, meta, hidden, self.step_sums, *self.between, *self.d_levels,
            self.level_partials, META=self.level_partials.shape[1], ROWS=config.rows,
            **sizes, **options,
        )  # fmt: skip

    def _segment(self, start: int, count: int) -> None:
        """The steps of a segment forward, from the state in the first slot, and back."""
        replay = self.replay
        slots = torch.arange(count + 1, device=self.meta.device)
        times = torch.arange(start, start + count, device=self.meta.device)
        levels = replay.levels(slots)
        stepped = replay.tensors(slots[1:], times)
        for j in range(count):
            replay.rows[j + 1].copy_(replay.rows[j])
            replay.hidden[j + 1].copy_(replay.hidden[j])
            self._forward(stepped[j], levels[j + 1], replay.hidden[j + 1], j)
        before = replay.tensors(slots[:-1], times)
        last = torch.full_like(slots[:1], len(replay.rows) - 1)
        (gradients,) = replay.tensors(last, times[:1])
        for j in reversed(range(count)):
            self._backward(start + j, j, before[j], gradients, levels[j], levels[j + 1])

    def run(self) -> tuple[Tensor, Tensor]:
        """d_meta and d_state."""
        replay, config, steps = self.replay, self.config, self.steps
        replay.rows[-1].zero_()
        starts = range(0, steps, config.segment)
        slot = torch.zeros(1, dtype=torch.int64, device=self.meta.device)
        self._enter(self.state, self.state[:, -self.rule.global_size :])
        (levels,) = replay.levels(slot)
        kept = []
        for start in starts:
            kept.append((replay.rows[0].clone(), replay.hidden[0].clone()))
            if start == starts[-1]:
                break
            for t in range(start, start + config.segment):
                (tensors,) = replay.tensors(slot, slot + t)
                self._forward(tensors, levels, replay.hidden[0], 0)
        for start in reversed(starts):
            self._enter(*kept.pop())
            self._segment(start, min(config.segment, steps - start))
        return self._meta_gradient(), self._state_gradient()

    def _enter(self, rows: Tensor, hidden: Tensor) -> None:
        self.replay.rows[0].copy_(rows)
        self.replay.hidden[0].copy_(hidden)

    def _meta_gradient(self) -> Tensor:
        d_meta = torch.empty_like(self.meta)
        # The sweep's rows end with a number that the first of the others then replaces.
        for partials, target in (
            (self.partials, d_meta),
            (self.level_partials, d_meta[self.level :]),
        ):
            columns = partials.shape[1]
            lstm_kernels.add_partials[(triton.cdiv(columns, SUM_BLOCK),)](
                partials, target, len(partials), META=columns, DEPTH=SUM_DEPTH, BLOCK=SUM_BLOCK,
                num_warps=4, num_stages=1, enable_fp_fusion=True,
            )  # fmt: skip
        return d_meta

    def _state_gradient(self) -> Tensor:
        """The planes' gradients, with those of the tensors' states and of the global ones."""
        d_state = self.replay.rows[-1].clone()
        of_states, of_hidden, of_centred = self.d_levels
        by_run = (self.runs, self.count)
        numels = self.replay.plan.tensors[:, 4].view(by_run)
        total = of_centred.view(by_run).sum(dim=1, keepdim=True)
        rates = -total * (numels.to(d_state.dtype) / self.coordinates)
        tails = torch.cat((of_states, rates.reshape(-1, 1)), dim=1)
        first = self.replay.plan.levels[: self.count, 0] - address(self.replay.rows)
        places = first[:, None] // FLOAT + torch.arange(tails.shape[1], device=first.device)
        d_state[:, places.reshape(-1)] = tails.view(self.runs, -1)
        d_state[:, -self.rule.global_size :] = of_hidden.view(*by_run, -1).sum(dim=1)
        return d_state


def unroll_backward(
    rule: Any,
    grads: Tensor,
    state: Tensor,
    step: int,
    meta: Tensor,
    loss_weights: Tensor,
    steps: int,
    sizes: Sequence[int],
    lr: float,
    weight_decay: float,
    d_updates: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradient of sum_t w_t f_t(theta_t) over a window; this folder's README derives it.

    Args:
        rule: a HierarchicalRule; only its sizes are read.
        grads: recorded gradients `(K, R, D)`, K = steps or steps + 1; float32 and contiguous like
            all tensors.
        state: the window's first state `(R, W)`.
        step: steps taken before the window.
        meta: flat meta-parameters `(M,)`.
        loss_weights: w_t of each run `(K, R)`.
        steps: T.
        sizes: coordinates of each tensor of a run; they add up to D.
        lr, weight_decay: of the window's steps.
        d_updates: `(T, R, D)`, dL/du_t of each step in place of the weights, lr and weight_decay.

    Returns:
        d_meta `(M,)` and d_state `(R, W)`.
    """
    if steps == 0 or grads.shape[1:].numel() == 0:
        return torch.zeros_like(meta), torch.zeros_like(state)
    with torch.cuda.device_of(meta):
        return Window(
            rule, grads, state, step, meta, loss_weights, steps, sizes, lr, weight_decay, d_updates
        ).run()
