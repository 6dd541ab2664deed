"""Stochastic rounding of bfloat16 state: seeds of steps, random bits, and the rounding itself.

A value goes to the bfloat16 number above or below it, in proportion to its distance from either, so
the mean over seeds is the value itself and changes below half a unit in the last place are not
lost. The 16 random bits of a value are a hash of the step's seed, the tensor's place in the list
and the value's coordinate and plane: `csrc/include/rounding.h` and the Triton kernels compute the
same, so every backend draws the same bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_Words = TypeVar("_Words", int, Tensor)


def step_seed(seed: int, step: int, part: int = 0) -> int:
    """A signed 64-bit seed for one call of a step op.

    Args:
        seed: the user's.
        step: number of the step.
        part: number of the call within the step.
    """
    digest = hashlib.blake2b(f"{seed} {step} {part}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def check_seed(seed: int, states: Sequence[Tensor], name: str) -> None:
    """Raise unless a step op can round these states, its argument `name`, with this seed."""
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"Invalid rounding_seed: {seed}; pass a signed 64-bit number")
    for index, state in enumerate(states):
        if state.dtype != torch.bfloat16:
            raise ValueError(
                f"{name}[{index}]: stochastic rounding is of bfloat16 states, not {state.dtype}; "
                "convert the state, or leave rounding_seed out"
            )
    if states[0].is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "stochastic rounding cannot be captured in a CUDA graph: its seed is a number of the "
            "host, so every replay would repeat the same random bits. Step outside the graph, or "
            "use float32 state"
        )


def mix_bits(x: _Words) -> _Words:
    """A bijection of 32-bit words, held in 64 bits.

    A product that wraps around int64 still has the right lower half.
    """
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


def random_bits(seed: int, tensor: int, coordinates: Tensor, pairs: int) -> Tensor:
    """32 random bits for each pair of planes.

    Args:
        seed: of the step.
        tensor: the tensor's place in the list.
        coordinates: int64 `(N,)`.
        pairs: number of pairs of planes, P.

    Returns:
        int64 `(P, N)`, below 2^32: the lower 16 bits for the first plane of a pair.
    """
    key = mix_bits(mix_bits((seed + tensor) & _WORD) ^ (seed >> 32 & _WORD))
    base = mix_bits((mix_bits((coordinates & _WORD) ^ key) + (coordinates >> 32)) & _WORD)
    pair = torch.arange(1, pairs + 1, device=coordinates.device).unsqueeze(1)
    return mix_bits(base ^ (pair * 0x9E3779B9 & _WORD))


def round_state(rule: Any, state: Tensor, seed: int, tensor: int, first: int) -> Tensor:
    """A float32 state `(S, N)` of an LSTM rule or RNNprop as bfloat16; NaN and infinity stay.

    Args:
        rule: whose state it is.
        state: its planes for coordinates `first` to `first + N - 1`.
        seed: of the step.
        tensor: the tensor's place in the list.
        first: number of the first coordinate.
    """
    hidden, layers = rule.hidden_size, rule.num_layers
    units = layers * hidden
    moments = state.shape[0] - 2 * units
    coordinates = torch.arange(first, first + state.shape[1], device=state.device)
    random = random_bits(seed, tensor, coordinates, units + moments // 2)
    # (pair, half) to planes: the moments' pair comes first there, then h and c of each layer.
    halves = torch.stack((random & 0xFFFF, random >> 16))
    recurrent = halves[:, :units].unflatten(1, (layers, hidden)).transpose(0, 1).flatten(0, 2)
    return _round(state, torch.cat((halves[:, units:].flatten(0, 1), recurrent)))


def round_planes(planes: Tensor, seed: int, tensor: int) -> Tensor:
    """Float32 planes `(S, ...)` of a hierarchical rule as bfloat16; NaN and infinity stay.

    Args:
        planes: of all coordinates of a tensor.
        seed: of the step.
        tensor: the tensor's place in the list.
    """
    rows = planes.reshape(planes.shape[0], planes[0].numel())
    coordinates = torch.arange(rows.shape[1], device=rows.device)
    # A pair for each plane: kernels compute the planes one by one.
    random = random_bits(seed, tensor, coordinates, rows.shape[0]) & 0xFFFF
    return _round(rows, random).view(planes.shape)


def _round(values: Tensor, random: Tensor) -> Tensor:
    bits = values.contiguous().view(torch.int32)
    rounded = (bits + random.to(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(values.isfinite(), rounded, values.to(torch.bfloat16))
