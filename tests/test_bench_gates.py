"""The gates of the benchmark suite: what is right passes them, what is wrong is not timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastl2o
from bench.suite import contenders, gates, jax_step, scaling, steps, training
from tests.common import needs_cpu_kernels

OFF = r"error .* exceeds .*; nothing was timed"
# Each is wrong by too little to be seen in a loss.
WRONG_ADAMS: dict[str, dict[str, Any]] = {
    "lr": {"lr": 1.001e-3},
    "beta1": {"betas": (0.901, 0.999)},
    "beta2": {"betas": (0.9, 0.9989)},
    "eps": {"eps": 1e-7},
    "weight decay": {"weight_decay": 1e-3},
}
over_wrong_adams = pytest.mark.parametrize("wrong", WRONG_ADAMS.values(), ids=WRONG_ADAMS)
over_families = pytest.mark.parametrize("family", contenders.RULES)


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where something is timed."""

    def run(*_: object) -> None:
        pytest.fail("it was timed")

    for section in (steps, scaling, training):
        monkeypatch.setattr(section.Contest, "run", run)


def _data(batch: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, 1, 8, 8, generator=generator)
    return images, torch.randint(10, (batch,), generator=generator)


def _trainings(model: str = "MLP 64-32-10") -> dict[str, training._Training]:
    torch.manual_seed(0)
    return training._trainings(training.MODELS[model](), _data())


# Torch's Adam
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", contenders.ADAMS)
def test_torchs_adams_pass(name: str) -> None:
    timed = contenders.adam(name, (50, 7))
    assert timed.gate == gates.FLOAT64
    assert timed.state_bytes() == 8 * 57
    timed.run()


@pytest.mark.parametrize("name", contenders.ADAMS)
@over_wrong_adams
def test_a_wrong_adam_gets_no_row(
    name: str, wrong: dict[str, Any], monkeypatch: pytest.MonkeyPatch, untimed: None
) -> None:
    monkeypatch.setattr(steps, "RULES", {})
    monkeypatch.setattr(steps, "SIZES", (1_000,))
    monkeypatch.setitem(contenders.ADAMS, name, {**contenders.ADAMS[name], **wrong})
    with pytest.raises(AssertionError, match=OFF):
        steps.measure(2, 0.1)


# Training
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", training.MODELS)
def test_trainings_pass(model: str) -> None:
    found = _trainings(model)
    assert list(found) == [training.NONE, *contenders.RULES, *contenders.ADAMS]
    for name, each in found.items():
        assert training.gate(name, name, each) == gates.FLOAT64


@over_wrong_adams
def test_training_with_a_wrong_adam_is_not_timed(
    wrong: dict[str, Any], monkeypatch: pytest.MonkeyPatch, untimed: None
) -> None:
    monkeypatch.setattr(training, "RULES", {})
    monkeypatch.setitem(contenders.ADAMS, "Adam, fused", {"fused": True, **wrong})
    with pytest.raises(AssertionError, match=f"optimizer Adam, fused.*{OFF}"):
        training.measure(2, 0.1)


@over_families
@pytest.mark.parametrize("wrong", [{"lr": 1.001}, {"weight_decay": 1e-4}], ids=str)
def test_training_with_a_wrong_learned_optimizer_is_not_timed(
    family: str, wrong: dict[str, float]
) -> None:
    each = _trainings()[family]
    each.optimizer = fastl2o.LearnedOptimizer(
        each.model.parameters(), training.shipped_rule(family), **wrong
    )
    with pytest.raises(AssertionError, match=OFF):
        training.gate(family, family, each)


def test_training_whose_optimizer_leaves_out_a_tensor_is_not_timed() -> None:
    each = _trainings()["Adam, foreach"]
    assert each.optimizer is not None
    step = each.optimizer.step

    def all_but_the_last() -> None:
        *_, last = each.model.parameters()
        before = last.detach().clone()
        step()
        last.data.copy_(before)

    each.optimizer.step = all_but_the_last  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match=OFF):
        training.gate("training", "Adam, foreach", each)


@pytest.mark.parametrize("name", [training.NONE, "lstm", "Adam, fused"])
def test_training_with_a_loss_that_is_not_finite_is_not_timed(name: str) -> None:
    each = _trainings()[name]
    with torch.no_grad():
        next(each.model.parameters()).fill_(torch.inf)
    if name == "lstm":
        # refused by the optimizer already, as it stands
        each.optimizer = fastl2o.LearnedOptimizer(each.model.parameters(), "lstm", nonfinite="pass")
    with pytest.raises(AssertionError, match="the loss is nan; nothing was timed"):
        training.gate(name, name, each)


def test_a_training_loop_that_keeps_old_gradients_is_not_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    each = _trainings()[training.NONE]
    monkeypatch.setattr(each.model, "zero_grad", lambda: None)
    with pytest.raises(AssertionError, match="gradients are off"):
        training.gate("training", training.NONE, each)


# Steps of rules
# --------------------------------------------------------------------------------------------------


class _Wrong(contenders.Learned):
    """Spoils one coordinate a little in each step."""

    def run(self) -> None:
        super().run()
        with torch.no_grad():
            self.params[-1][-1] += 1e-5


@over_families
@pytest.mark.parametrize("sizes", [(3,), (2_000,), (5,) * 20, (1, 3_001, 70)], ids=str)
def test_one_coordinate_that_is_off_is_found(family: str, sizes: tuple[int, ...]) -> None:
    assert contenders.learned(family, sizes).gate == gates.FLOAT64
    with pytest.raises(AssertionError, match=OFF):
        contenders.gate(family, family, _Wrong(family, sizes), sizes)


def test_a_coordinate_that_is_nan_is_found() -> None:
    made = contenders.Learned("lstm", (2_000,), "reference")
    run = made.run

    def spoiled() -> None:
        run()
        made.params[0].data[1_500] = torch.nan

    made.run = spoiled  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="NaN in other places; nothing was timed"):
        contenders.gate("lstm", "lstm", made, (2_000,))


@needs_cpu_kernels
@pytest.mark.parametrize("section", ["coordinates", "tensors", "threads"])
def test_no_curve_has_a_step_that_is_off(
    section: str, monkeypatch: pytest.MonkeyPatch, untimed: None
) -> None:
    monkeypatch.setattr(scaling, "RULES", {"rnnprop": contenders.RULES["rnnprop"]})
    monkeypatch.setattr(scaling, "SIZES", (100,))
    monkeypatch.setattr(scaling, "TOTAL", 100)
    monkeypatch.setattr(scaling, "COUNTS", (10,))
    monkeypatch.setattr(contenders, "Learned", _Wrong)
    measure: Callable[..., object] = getattr(scaling, section)
    arguments = (2, 0.1, 100) if section == "coordinates" else (2, 0.1)
    threads = torch.get_num_threads()
    with pytest.raises(AssertionError, match="nothing was timed"):
        measure(*arguments)
    assert torch.get_num_threads() == threads


def test_a_reference_that_is_off_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    make, calls = contenders.make_rule, []

    def other(family: str) -> nn.Module:
        calls.append(family)
        rule = make(family)
        if len(calls) == 2:  # that of plain torch in float32; the contender's comes first
            with torch.no_grad():
                rule.readout.bias.add_(1.0)
        return rule

    monkeypatch.setattr(contenders, "make_rule", other)
    with pytest.raises(AssertionError, match="plain torch is itself off by"):
        contenders.learned("lstm", (3,), "reference")


@pytest.mark.parametrize("family", jax_step.FAMILIES)
def test_jaxs_step_passes_where_jax_is_installed(family: str) -> None:
    pytest.importorskip("jax")
    timed = contenders.jitted(family, (30, 30))
    assert timed.gate == gates.FLOAT64


# Windows, memory
# --------------------------------------------------------------------------------------------------


@over_families
@pytest.mark.parametrize("which", ["fused", "eager"])
def test_no_curve_has_a_window_gradient_that_is_off(
    family: str, which: str, monkeypatch: pytest.MonkeyPatch, untimed: None
) -> None:
    monkeypatch.setattr(scaling, "RULES", {family: contenders.RULES[family]})
    monkeypatch.setattr(scaling, "LENGTHS", (2,))
    monkeypatch.setattr(scaling, "DIM", 5)
    monkeypatch.setattr(scaling, "TENSORS", (10, 3))
    if family == "hierarchical":
        where, name = scaling.hierarchical.Window, "kernel" if which == "fused" else "eager"
    else:
        where, name = scaling.unroll, which
    right = getattr(where, name)

    def wrong(*arguments: Any) -> Any:
        found = right(*arguments)
        return tuple(1.01 * each for each in found) if isinstance(found, tuple) else 1.01 * found

    if family == "hierarchical" and which == "eager":
        # in float32 only: float64 is what all are compared with
        def wrong(self: Any, dtype: torch.dtype = torch.float32) -> Tensor:
            return right(self, dtype) * (1.01 if dtype == torch.float32 else 1.0)

    monkeypatch.setattr(where, name, wrong)
    with pytest.raises(AssertionError, match="nothing was timed"):
        scaling.lengths(2, 0.1)


def test_points_that_memory_does_not_suffice_for_are_left_out_and_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = (10**6, 10**8)
    monkeypatch.setattr(contenders, "available_bytes", lambda: 20 * 2.0**30)
    # 80 planes, parameter and gradient, of four bytes each
    assert contenders.needed_bytes("lstm", 10**8) == 4 * 82 * 10**8
    fits, (note,) = scaling.fitting("lstm", sizes)
    assert fits == [10**6]
    assert "100,000,000 coordinates need 30.5 GiB; 20.0 GiB are available" in note
    assert note.endswith("**not timed**")
    fits, (note,) = scaling.fitting("hierarchical", sizes)
    assert fits == list(sizes)
    assert note.endswith("15.3 GiB; 20.0 GiB are available, of which 80% may be taken: timed")
