"""The C++ core on every instruction set of this processor, against the plain-torch reference.

Called without torch, through the test-only binding ``fastl2o_core`` (``make build``).
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastl2o.rules import Rule, from_config
from tests import common

ROOT = Path(__file__).resolve().parent.parent


def load_core() -> ModuleType | None:
    """The binding from build/core, or None where it was not built."""
    for path in sorted((ROOT / "build/core").glob("fastl2o_core*.so")):
        spec = importlib.util.spec_from_file_location("fastl2o_core", path)
        if spec is not None and spec.loader is not None:
            module = sys.modules.get("fastl2o_core") or importlib.util.module_from_spec(spec)
            if sys.modules.setdefault("fastl2o_core", module) is module and not hasattr(
                module, "step"
            ):
                spec.loader.exec_module(module)
            return module
    return None


core = load_core()
pytestmark = pytest.mark.skipif(
    core is None, reason="fastl2o_core is not built: run `make build` (needs a C++ compiler)"
)
over_isa = pytest.mark.parametrize("isa", core.instruction_sets() if core else ["baseline"])


def config_of(rule: Rule) -> dict[str, Any]:
    """The rule's constants as the binding takes them."""
    fields = dict(rule.config(), family=rule.family)
    if rule.family == "lstm":
        fields["log_sign"] = fields.pop("preprocess") == "log_sign"
    return fields


def core_step(isa: str, rule: Rule, grad: Tensor, state: Tensor, step: int, threads: int = 1):
    meta = rule.flat_parameters().detach().float().numpy()
    update, planes = core.step(
        isa, config_of(rule), meta, grad.numpy(), state.numpy(), float(step), threads
    )
    return torch.from_numpy(update), torch.from_numpy(planes)


def core_unroll(isa: str, rule: Rule, window: common.Window, threads: int = 1, **scales: float):
    meta = rule.flat_parameters().detach().float().numpy()
    arrays = (part.numpy() for part in (window.grads, window.state, window.loss_weights))
    d_meta, d_state = core.unroll_backward(
        isa,
        config_of(rule),
        meta,
        *arrays,
        window.steps,
        float(window.step),
        threads=threads,
        **scales,
    )
    return torch.from_numpy(d_meta), torch.from_numpy(d_state)


@over_isa
@common.over_rules
@pytest.mark.parametrize("kind", common.GRADIENT_KINDS)
def test_step_is_as_accurate_as_plain_torch(isa: str, case: common.RuleCase, kind: str) -> None:
    # All sizes are judged together: of one coordinate alone, plain torch's error is luck.
    rule, exact_rule = case.make(), case.make(torch.float64)
    generator = torch.Generator().manual_seed(1)
    results: list[list[Tensor]] = []
    for size in common.SIZES:
        grad = common.tricky_gradients(kind, (size,), generator)
        state = common.random_state(rule, (size,), generator)
        with torch.no_grad():
            plain = rule.reference_step(grad, state, 3)
            exact = exact_rule.reference_step(grad.double(), state.double(), 3)
        pairs = zip(core_step(isa, rule, grad, state, 3), plain, exact, strict=True)
        results.append([part for pair in pairs for part in pair])
    merged = [torch.cat(parts, dim=-1) for parts in zip(*results, strict=True)]
    common.assert_as_accurate(*merged[:3], "update")
    common.assert_as_accurate(*merged[3:], "state")


@over_isa
@common.over_rules
@pytest.mark.parametrize("threads", [1, 3])
def test_runs_stepped_by_rows_have_the_bits_of_single_steps(
    isa: str, case: common.RuleCase, threads: int
) -> None:
    # Sizes around every width of a vector and of a tile.
    rules = [case.make(seed=seed) for seed in range(3)]
    generator = torch.Generator().manual_seed(5)
    meta = torch.stack([rule.flat_parameters().detach() for rule in rules]).numpy()
    for size in (1, 3, 4, 5, 8, 10, 15, 16, 17, 24, 25, 32, 33, 47, 48, 49, 100):
        grads = common.tricky_gradients("wide", (3, size), generator)
        states = torch.stack([common.random_state(rule, (size,), generator) for rule in rules])
        updates, planes = core.step_runs(
            isa, config_of(rules[0]), meta, grads.numpy(), states.numpy(), 3.0, threads
        )
        for run, rule in enumerate(rules):
            update, state = core_step(isa, rule, grads[run], states[run], 3)
            assert np.array_equal(updates[run], update.numpy())
            assert np.array_equal(planes[run], state.numpy())


@over_isa
@common.over_rules
def test_nan_and_infinity_go_where_the_reference_puts_them(isa: str, case: common.RuleCase) -> None:
    rule, exact_rule = case.make(), case.make(torch.float64)
    generator = torch.Generator().manual_seed(2)
    grad = common.tricky_gradients("nonfinite", (100,), generator)
    state = common.random_state(rule, (100,), generator)
    update, planes = core_step(isa, rule, grad, state, 0)
    with torch.no_grad():
        plain = rule.reference_step(grad, state, 0)
        exact = exact_rule.reference_step(grad.double(), state.double(), 0)
    common.assert_as_accurate(update, plain[0], exact[0], "update")
    common.assert_as_accurate(planes, plain[1], exact[1], "state")


@functools.cache
def references(name: str, last: bool, kind: str, sizes: tuple[int, int, int]):
    """A window with its gradients by autograd, in float32 and in float64: shared by all ISAs."""
    case = next(case for case in common.RULE_CASES if case.name == name)
    steps, runs, dim = sizes
    rule = case.make()
    window = common.random_window(rule, steps=steps, runs=runs, dim=dim, last=last, kind=kind)
    plain = common.autograd_unroll(rule, window, lr=0.7, weight_decay=0.1)
    exact_rule, exact_window = case.make(torch.float64), window.to(torch.float64)
    exact = common.autograd_unroll(exact_rule, exact_window, lr=0.7, weight_decay=0.1)
    return rule, window, plain, exact


@common.over_rules
@pytest.mark.parametrize(
    ("last", "kind", "sizes"),
    [(True, "normal", (4, 3, 37)), (False, "normal", (1, 1, 65)), (True, "normal", (6, 2, 63))],
    ids=["with-last", "one-step", "long"],
)
@over_isa
def test_unroll_backward_is_as_accurate_as_plain_torch(
    isa: str, case: common.RuleCase, last: bool, kind: str, sizes: tuple[int, int, int]
) -> None:
    rule, window, plain, exact = references(case.name, last, kind, sizes)
    result = core_unroll(isa, rule, window, lr=0.7, weight_decay=0.1)
    for what, index in (("d_meta", 0), ("d_state", 1)):
        common.assert_as_accurate(result[index], plain[index], exact[index], what, norm=True)


@common.over_rules
@over_isa
def test_unroll_backward_over_sixteen_decades_of_gradients(isa: str, case: common.RuleCase) -> None:
    # One coordinate-step outweighs all others here, so plain torch's own error is a matter of luck:
    # judged by the stated bound instead, 1e-5 of the gradient.
    rule, window, _, exact = references(case.name, True, "wide", (6, 2, 63))
    result = core_unroll(isa, rule, window, lr=0.7, weight_decay=0.1)
    for part, target in zip(result, exact, strict=True):
        assert float((part - target).norm()) <= 1e-5 * float(target.norm())


@over_isa
@pytest.mark.parametrize("family", ["lstm", "rnnprop"])
def test_windows_longer_than_the_recorded_segment_agree_with_autograd(
    isa: str, family: str
) -> None:
    # 150 steps are several segments between checkpoints, the last one shorter.
    rule = from_config(family, {"hidden_size": 20, "num_layers": 2})
    window = common.random_window(rule, steps=150, runs=2, dim=21)
    result = core_unroll(isa, rule, window)
    plain = common.autograd_unroll(rule, window)
    exact = common.autograd_unroll(rule.double(), window.to(torch.float64))
    for index in (0, 1):
        common.assert_as_accurate(result[index], plain[index], exact[index], norm=True)


@over_isa
@common.over_small_rules
@pytest.mark.parametrize("threads", [2, 3, 5])
def test_thread_count_does_not_change_a_bit(isa: str, case: common.RuleCase, threads: int) -> None:
    rule = case.make()
    window = common.random_window(rule, steps=5, runs=3, dim=211)
    one, many = core_unroll(isa, rule, window, 1), core_unroll(isa, rule, window, threads)
    assert common.same_bits(list(one), list(many))
    grad, state = window.grads[0].reshape(-1), window.state.flatten(1)
    one, many = core_step(isa, rule, grad, state, 1), core_step(isa, rule, grad, state, 1, threads)
    assert common.same_bits(list(one), list(many))


@over_isa
@settings(max_examples=25)
@given(
    family=st.sampled_from(["lstm", "rnnprop"]),
    hidden=st.integers(1, 64),
    layers=st.integers(1, 3),
    steps=st.integers(1, 6),
    runs=st.integers(1, 4),
    dim=st.integers(1, 70),
    seed=st.integers(0, 2**31),
)
def test_any_size_agrees_with_the_float64_reference(
    isa: str, family: str, hidden: int, layers: int, steps: int, runs: int, dim: int, seed: int
) -> None:
    rule = from_config(family, {"hidden_size": hidden, "num_layers": layers}).double()
    rule.reset_parameters(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for parameter in rule.parameters():
            parameter.copy_(parameter.float())
    window = common.random_window(rule, steps=steps, runs=runs, dim=dim, seed=seed)
    d_meta, d_state = core_unroll(isa, rule, window)
    exact = common.autograd_unroll(rule, window.to(torch.float64))
    # Norms, not single entries: with few coordinates a single entry may cancel to rounding noise.
    for result, target in zip((d_meta, d_state), exact, strict=True):
        assert float((result - target).norm()) <= 1e-5 * float(target.norm())


@over_isa
def test_a_window_continues_from_the_state_of_the_live_step(isa: str) -> None:
    rule = from_config("lstm", {"hidden_size": 20, "num_layers": 2})
    window = common.random_window(rule, steps=6, runs=1, dim=64, last=True)
    state = window.state
    for t in range(3):
        _, state = core_step(isa, rule, window.grads[t, 0], state.flatten(1), 0)
    second = common.Window(
        window.grads[3:], state.view_as(window.state), window.loss_weights[3:], 3, 0
    )
    d_second, d_state = core_unroll(isa, rule, second)
    exact_rule = from_config("lstm", {"hidden_size": 20, "num_layers": 2}).double()
    exact_rule.load_state_dict(rule.state_dict())
    exact_second = common.autograd_unroll(exact_rule, second.to(torch.float64))
    plain_second = common.autograd_unroll(rule, second)
    common.assert_as_accurate(d_second, plain_second[0], exact_second[0], norm=True)
    common.assert_as_accurate(d_state, plain_second[1], exact_second[1], norm=True)


def test_unknown_instruction_sets_are_refused() -> None:
    rule = from_config("lstm", {})
    with pytest.raises(ValueError, match="no sse9"):
        core.step(
            "sse9",
            config_of(rule),
            np.zeros(rule.num_meta_parameters, np.float32),
            np.zeros(1, np.float32),
            np.zeros((80, 1), np.float32),
        )
