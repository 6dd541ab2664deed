"""Where the hierarchical rule's CUDA kernels join the package: routing and schema; needs no GPU."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastl2o import _ops_hierarchical_gpu as gpu
from fastl2o import backends
from fastl2o.rules import HierarchicalRule

ROOT = Path(__file__).resolve().parent.parent
CUDA = torch.device("cuda", 0)
OPS = ("hierarchical_step_", "hierarchical_unroll_backward")


def schema_of(op: str) -> Any:
    return getattr(torch.ops.fastl2o, op).default._schema


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """Calls of a stand-in for the CUDA library, which a torch without CUDA cannot load."""
    gpu._cuda_refuses.cache_clear()
    calls: list[tuple[Any, ...]] = []
    stub = SimpleNamespace(
        hierarchical_step_=lambda *arguments: calls.append(arguments),
        hierarchical_unroll_backward=lambda *arguments: calls.append(arguments),
        hierarchical_supported=lambda *sizes: sizes == (10, 20, 20, 4),
    )
    monkeypatch.setattr(torch.ops, "fastl2o_cuda", stub, raising=False)
    monkeypatch.setattr(gpu, "capability_refusal", lambda device: "")
    for name in ("cuda", "triton"):
        monkeypatch.setitem(backends._WHY_ABSENT, name, lambda: "")
    yield calls
    gpu._cuda_refuses.cache_clear()


def test_auto_takes_cuda_for_the_default_sizes_and_triton_for_others(library: Any) -> None:
    def chosen(rule: HierarchicalRule) -> str:
        return backends.choose(CUDA, "", gpu.objections(rule, CUDA))

    assert chosen(HierarchicalRule()) == "cuda"
    assert chosen(HierarchicalRule(tensor_size=8)) == "triton"
    with (
        backends.backend("cuda"),
        pytest.raises(
            RuntimeError,
            match=r"take the default sizes, not .*tensor_size=8.*'triton' takes others",
        ),
    ):
        chosen(HierarchicalRule(tensor_size=8))


@pytest.mark.parametrize("op", OPS)
def test_an_op_hands_its_arguments_on_in_the_order_of_the_schema(op: str, library: Any) -> None:
    rule = HierarchicalRule()
    names = [argument.name for argument in schema_of(op).arguments]
    named = {name: object() for name in names} | rule.config() | {"meta": torch.zeros(1)}
    getattr(gpu, op.removeprefix("hierarchical_"))("cuda", rule, named)
    (arguments,) = library
    assert list(arguments) == [named[name] for name in names]


@pytest.mark.parametrize("op", OPS)
def test_the_library_has_the_schema_of_the_op(op: str) -> None:
    source = (ROOT / "csrc/cuda/hierarchical_ops.cpp").read_text(encoding="utf-8")
    (sizes,) = re.findall(r'#define FASTL2O_SIZES "(.*)"', source)
    text = source.replace("FASTL2O_SIZES", f'"{sizes}"', source.count("FASTL2O_SIZES"))
    definitions = re.findall(r"m\.def\(((?:\s*\"[^\"]*\")+)\);", text)
    schemas = ("".join(re.findall(r'"([^"]*)"', each)) for each in definitions)
    (schema,) = (each for each in schemas if each.startswith(f"{op}("))
    expected = torch._C.parse_schema(str(schema_of(op)).removeprefix("fastl2o::"))
    assert str(torch._C.parse_schema(schema)) == str(expected)
