"""Launch parameters of the hierarchical rule's step: a pure function of the problem."""

from __future__ import annotations

from dataclasses import dataclass

# Programs of a sweep: a few for each multiprocessor of the largest devices. Each reads the tensors'
# mean log rates once, so there are no more of them.
MAX_PROGRAMS = 1024
# Chunks of a call until they have grown to MAX_TILES: a tensor's are added up by one program.
MAX_CHUNKS = 2048
# Tiles of a chunk: their sums are added in float32.
MAX_TILES = 64


@dataclass(frozen=True)
class StepConfig:
    """Launch parameters of the three launches.

    Attributes:
        block: coordinates of a tile.
        warps: warps of a program.
        chunk: coordinates that a partial sum stands for; whole tiles.
        max_programs: limit on programs that walk chunks.
        tensors: tensors that are looked at together for a problem's means.
        rows: chunks whose sums are loaded together.
    """

    block: int = 256
    warps: int = 4
    chunk: int = 256
    max_programs: int = MAX_PROGRAMS
    tensors: int = 128
    rows: int = 64


def step_config(coordinates: int) -> StepConfig:
    """The parameters for `coordinates` in all.

    Two coordinates a thread share the loads of weights. A chunk is one tile until there are
    MAX_CHUNKS, then more, up to MAX_TILES.
    """
    block = StepConfig.block
    chunk = block
    while coordinates > chunk * MAX_CHUNKS and chunk < block * MAX_TILES:
        chunk *= 2
    return StepConfig(chunk=chunk)
