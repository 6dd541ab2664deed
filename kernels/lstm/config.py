"""Launch parameters of the step and of the window backward: pure functions of the problem."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

WARP = 32
# Numbers that a thread keeps for the inputs of its coordinates; more than this and registers spill.
INPUTS_IN_REGISTERS = 160
# Chunks of a launch: enough to fill any device many times, and a table of 256 KB.
MAX_CHUNKS = 16_384
# Programs of a launch whose state is bf16: bounds the scratch for h, 40 KB a program for 2 x 20.
MAX_SCRATCH_PROGRAMS = 512


@dataclass(frozen=True)
class StepConfig:
    """Launch parameters of the step.

    Attributes:
        block: coordinates of a tile; a multiple of a warp's threads.
        warps: warps of a program.
        chunk: coordinates that a program takes before it looks at its table again; whole tiles.
        max_programs: limit on programs, or None for one program a chunk.
    """

    block: int
    warps: int
    chunk: int
    max_programs: int | None

    def __post_init__(self) -> None:
        for name in ("block", "warps", "chunk"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"Invalid {name}: {value}; pass a power of two")
        if self.block % (self.warps * WARP) or self.chunk % self.block:
            raise ValueError(
                f"Invalid block: {self.block}; pass a multiple of {WARP} * warps = "
                f"{self.warps * WARP} that divides chunk = {self.chunk}"
            )


def step_config(
    hidden_size: int,
    num_layers: int,
    tensors: int,
    coordinates: int,
    *,
    float32_state: bool,
    rnnprop: bool = False,
) -> StepConfig:
    """The parameters for `coordinates` in all over `tensors` tensors.

    A weight is loaded once for all coordinates of a thread, so a thread takes as many (4, 2 or 1)
    as leave a layer's inputs, its own and the layer's below, in registers; RNNprop, which projects
    its features first, spilled with 4 of 20 units (148 to 280 bytes on sm_90 and sm_100). Where
    tensors are smaller than half such a tile, most of it would be masked: one coordinate a thread.
    A tensor is one chunk a tile until the table would grow beyond MAX_CHUNKS.
    """
    warps = 4
    lanes = (2 if rnnprop else 4) if num_layers else 1
    while lanes > 1 and 2 * hidden_size * lanes > INPUTS_IN_REGISTERS:
        lanes //= 2
    if coordinates < tensors * warps * WARP * lanes // 2:
        lanes = 1
    block = warps * WARP * lanes
    chunk = block
    while coordinates > chunk * MAX_CHUNKS:
        chunk *= 2
    return StepConfig(block, warps, chunk, None if float32_state else MAX_SCRATCH_PROGRAMS)


# Steps whose states are kept at once. A longer window replays twice, from states between segments.
MAX_SEGMENT = 32
# Programs of a window. Their scratch for 20 steps of 2 x 20 is 1 MB each.
MAX_PROGRAMS = 512


@dataclass(frozen=True)
class WindowConfig:
    """Launch parameters of the window backward.

    Attributes:
        block: coordinates of a tile; a multiple of a warp's threads.
        warps: warps of a program.
        programs: programs, each with a scratch and a partial sum of the weight gradient.
        segment: steps whose states are kept at once.
        segments: how many of these make up the window.
        scratch_rows: rows of `block` floats of one program's scratch.
    """

    block: int
    warps: int
    programs: int
    segment: int
    segments: int
    scratch_rows: int


def window_config(rule: Any, coordinates: int, steps: int) -> WindowConfig:
    """The parameters for `coordinates` coordinates and `steps` steps.

    A program is one warp: its products cross coordinates, and so no warp waits for another. A
    thread takes four coordinates, which share the loads of weights, or fewer where programs would
    be left without a tile; RNNprop two, since it spilled with four (32 bytes on sm_100). A window
    longer than MAX_SEGMENT is cut so that the states between segments and those of one segment are
    about as many, 2 sqrt(T) in all.
    """
    lanes = 2 if rule.family == "rnnprop" else 4
    while lanes > 1 and coordinates < MAX_PROGRAMS * WARP * lanes:
        lanes //= 2
    block = WARP * lanes
    segments = 1 if steps <= MAX_SEGMENT else -(-steps // max(MAX_SEGMENT, math.isqrt(steps)))
    segment = -(-steps // segments)
    segments = -(-steps // segment)
    rows = (segments + segment + 1) * rule.state_planes + 6 * rule.hidden_size + 6
    return WindowConfig(
        block, 1, min(MAX_PROGRAMS, -(-coordinates // block)), segment, segments, rows
    )
