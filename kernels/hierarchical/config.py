"""Launch parameters of the hierarchical rule's step and window: pure functions of the problem."""

from __future__ import annotations

import math
from dataclasses import dataclass

# Programs of a sweep: a few for each multiprocessor of the largest devices. Each reads the tensors'
# mean log rates once, so there are no more of them.
MAX_PROGRAMS = 1024
# Chunks of a call until they have grown to MAX_TILES: a tensor's are added up by one program.
MAX_CHUNKS = 1024
# Tiles of a chunk: their sums are added in float32.
MAX_TILES = 64


@dataclass(frozen=True)
class StepConfig:
    """Launch parameters of the three launches.

    Attributes:
        block: coordinates of a tile, a power of two.
        warps: warps of a program.
        chunk: coordinates that a partial sum stands for; whole tiles.
        max_programs: limit on programs that walk chunks.
        tensors: tensors that are looked at together for a problem's means.
        rows: chunks whose sums are loaded together.
    """

    block: int = 512
    warps: int = 4
    chunk: int = 512
    max_programs: int = MAX_PROGRAMS
    tensors: int = 128
    rows: int = 64


def step_config(coordinates: int, units: int = 10) -> StepConfig:
    """The parameters for `coordinates` in all, of a rule with `units` units for each.

    Four coordinates a thread share the loads of weights: with 10 units that takes all registers, so
    with more units there are two. A chunk is one tile until there are MAX_CHUNKS, then more, up to
    MAX_TILES.
    """
    block = StepConfig.block if units <= 10 else StepConfig.block // 2
    chunk = block
    while coordinates > chunk * MAX_CHUNKS and chunk < block * MAX_TILES:
        chunk *= 2
    return StepConfig(block=block, chunk=chunk)


# Bytes of states that are recorded at once; beyond, segments of about sqrt(T) steps.
RECORD_BYTES = 1 << 31
# Programs of the backward sweep, each with a scratch and a partial sum of the parameter level's
# meta-gradient.
MAX_SWEEP_PROGRAMS = 1024


@dataclass(frozen=True)
class WindowConfig:
    """Launch parameters of the window backward.

    Attributes:
        block: coordinates of a tile of the backward sweep; its programs are one warp.
        programs: limit on programs of the backward sweep.
        segment: steps whose states are recorded at once.
        segments: how many of these make up the window.
    """

    block: int
    programs: int
    segment: int
    segments: int


def window_config(row: int, steps: int) -> WindowConfig:
    """The parameters for `steps` steps of a state of `row` numbers.

    One coordinate a thread: with two, which would share the loads of weights, the sweep spilled 16
    bytes on compute capability 10.0. The
    states of all steps are recorded unless they take more than RECORD_BYTES; then of
    sqrt(T) steps at a time, replayed from as many states between.
    """
    whole = 4 * row * (steps + 1) <= RECORD_BYTES
    segment = steps if whole else max(1, math.isqrt(max(0, steps - 1)) + 1)
    return WindowConfig(32, MAX_SWEEP_PROGRAMS, segment, -(-steps // max(1, segment)))
