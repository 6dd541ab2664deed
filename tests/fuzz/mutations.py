"""Damage: to bytes, and to one place of a tree of dictionaries and lists."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

# As they stand in JSON; those that Python writes otherwise are texts.
HOSTILE_JSON: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, 10**30, 1e308, -1e-320, 0.5),
    *("", "x", "F32", "F64", "I8", "BOOL", "x" * 5000, "\x00", "\ud800", "../..", "NaN"),
    *([], {}, [[]], [0], [0, 0], [-1, 4], [2**62, 2**63], [1] * 300, {"": {}}, float("nan")),
)
HOSTILE_VALUES: tuple[Callable[[], Any], ...] = (
    *(lambda value=value: copy.deepcopy(value) for value in HOSTILE_JSON),  # type: ignore[misc]
    lambda: torch.zeros(()),
    lambda: torch.zeros(0),
    lambda: torch.full((3,), torch.nan),
    lambda: torch.zeros(3, dtype=torch.int64),
    lambda: torch.zeros(2, 2, dtype=torch.complex64),
    lambda: torch.zeros(3, device="meta"),
    lambda: torch.zeros(3).to_sparse(),
    lambda: torch.zeros(1).expand(2**33),
    lambda: torch.tensor(True),
    lambda: torch.float16,
    lambda: (1, 2),
)


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip bits, cut, repeat, exchange or overwrite parts of a file."""
    out = bytearray(data)
    kind = rng.randrange(6)
    at = rng.randrange(len(out))
    length = min(rng.choice((1, 2, 8, 64, len(out))), len(out) - at)
    if kind == 0:
        for _ in range(rng.choice((1, 1, 2, 8, 64))):
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del out[at : at + length]
    elif kind == 2:
        out[at:at] = out[at : at + length]
    elif kind == 3:
        out[at : at + length] = bytes(rng.choice((0, 255)) for _ in range(1)) * length
    elif kind == 4:
        out[at : at + length] = rng.randbytes(length)
    else:
        other = rng.randrange(len(out) - length + 1)
        out[at : at + length] = out[other : other + length]
    return bytes(out)


def mutate_length(data: bytes, rng: random.Random) -> bytes:
    """Make the 8 bytes that say how long a safetensors header is lie."""
    true = int.from_bytes(data[:8], "little")
    lies = (0, 1, 2, true - 1, true + 1, len(data), len(data) - 8, 2**31, 2**63, 2**64 - 1)
    return rng.choice(lies).to_bytes(8, "little") + data[8:]


def _places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items: Sequence[tuple[Any, Any]] = ()
    if isinstance(tree, dict):
        items = list(tree.items())
    elif isinstance(tree, list):
        items = list(enumerate(tree))
    for key, value in items:
        yield (*path, key)
        yield from _places(value, (*path, key))


def mutate_tree(tree: Any, rng: random.Random, hostile: Callable[[random.Random], Any]) -> Any:
    """A copy with one place replaced, removed, doubled or renamed."""
    tree = copy.deepcopy(tree)
    path = rng.choice(list(_places(tree)))
    node = tree
    for key in path[:-1]:
        node = node[key]
    key = path[-1]
    kind = rng.randrange(6)
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node, dict):
        node[rng.choice(("", "x", "rule", "planes", 7))] = node.pop(key)
    elif kind == 1:
        node.append(node[key])
    elif kind == 2:
        other = rng.choice(list(_places(tree)))
        value = tree
        for step in other:
            value = value[step]
        node[key] = copy.deepcopy(value)
    else:
        node[key] = hostile(rng)
    return tree


def hostile_json(rng: random.Random) -> Any:
    """Something that JSON can hold, and a reader may not expect."""
    return copy.deepcopy(rng.choice(HOSTILE_JSON))


def hostile_value(rng: random.Random) -> Any:
    """Something that torch.save can write, and a reader may not expect."""
    return rng.choice(HOSTILE_VALUES)()


def as_json(tree: Any, rng: random.Random) -> str:
    """The tree as text, now and then nested or cut beyond what a reader can take."""
    text = json.dumps(tree)
    kind = rng.randrange(30)
    if kind == 0:
        return "[" * 100_000 + text
    if kind == 1:
        return text[: rng.randrange(len(text))]
    if kind == 2:
        return '{"a":' * 20_000 + text + "}" * 20_000
    return text
