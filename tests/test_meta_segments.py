"""Windows in segments: the gradient of the whole, from records of one segment at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastl2o import meta
from fastl2o.meta import _segments
from fastl2o.meta.recipe import RecipeError, build_trainer, parse_recipe
from fastl2o.meta.tasks import (
    DrawnMLP,
    GradientNoise,
    MLPClassification,
    Quadratic,
    RandomScaling,
    SparseGradients,
    SumOf,
    Task,
    TaskRun,
    VmapRun,
    WithConvex,
)
from fastl2o.rules import Rule
from tests.common import RuleCase
from tests.test_meta_gradient import assert_near, seeded
from tests.test_meta_trainer import assert_same_bits, small_rule, small_trainer

F64 = torch.float64
CASES = (
    RuleCase("lstm", "lstm", {"hidden_size": 3}),
    RuleCase("lstm-linear", "lstm", {"num_layers": 0}),
    RuleCase("rnnprop", "rnnprop", {"hidden_size": 3}),
)
DIGITS = MLPClassification("digits", hidden=(3,), batch_size=6, init_scale=0.3)
# Every kind of run that draws from several generators, or from one within another.
NESTED = SumOf([GradientNoise(RandomScaling(DIGITS, 1.0)), WithConvex(GradientNoise(DIGITS))])
DRAWN = SparseGradients(DrawnMLP(depth=(1, 2), width=(3, 5), batch_size=4), 0.3)


def windows(
    rule: Rule, task: Task, estimator: meta.TruncatedBPTT, steps: int, count: int = 2
) -> tuple[list[meta.MetaGradient], meta.Progress]:
    """The second window starts from a state and a step count that are not zero."""
    run = estimator.sample(task, 2, seeded(1), next(rule.parameters()).dtype)
    progress = estimator.begin(rule, run)
    rates = {"lr": 0.7, "weight_decay": 0.1}
    return [estimator.window(rule, progress, steps, **rates) for _ in range(count)], progress


def assert_same_end(ours: meta.Progress, theirs: meta.Progress) -> None:
    assert ours.step == theirs.step
    for name in ("params", "state", "grads"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert_near(ours.losses, theirs.losses, 1e-12 if ours.losses.dtype == F64 else 1e-5)
    pairs = zip(ours.generators(), theirs.generators(), strict=True)
    assert all(torch.equal(a.get_state(), b.get_state()) for a, b in pairs)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("held_out", [False, True], ids=["training", "held-out"])
@pytest.mark.parametrize("segments", [2, 3, 7, 100])
@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-12), (torch.float32, 2e-6)], ids=str)
def test_segments_give_the_gradient_of_the_whole(
    case: RuleCase, held_out: bool, segments: int, dtype: torch.dtype, tolerance: float
) -> None:
    rule, found = case.make(dtype), []
    for count in (1, segments):
        estimator = meta.TruncatedBPTT(None, "log", held_out=held_out, segments=count)
        found.append(windows(rule, DIGITS, estimator, 7))
    (whole, end), (parts, other_end) = found
    for expected, result in zip(whole, parts, strict=True):
        assert_near(result.gradient, expected.gradient, tolerance)
        assert_near(result.losses, expected.losses, tolerance)
        assert_near(result.loss, expected.loss, 10 * tolerance)
    assert_same_end(other_end, end)


@pytest.mark.parametrize("task", [NESTED, DRAWN, Quadratic(dim=4)], ids=["nested", "drawn", "f"])
@pytest.mark.parametrize("objective", ["sum", "weighted", "final", "log", "best"])
@pytest.mark.parametrize("final_term", [True, False], ids=["all-terms", "without-the-last"])
def test_segments_of_every_kind_of_run_and_objective(
    task: Task, objective: str, final_term: bool
) -> None:
    rule, found = CASES[0].make(F64), []
    for segments in (1, 3):
        estimator = meta.TruncatedBPTT(8, objective, final_term, segments=segments)
        found.append(windows(rule, task, estimator, 8))
    for expected, result in zip(found[0][0], found[1][0], strict=True):
        assert_near(result.gradient, expected.gradient, 1e-12)
    assert_same_end(found[1][1], found[0][1])


def test_no_more_than_a_segment_is_recorded_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded, record = [], _segments.run_window

    def counting(rule: Rule, progress: meta.Progress, steps: int, **rates: float) -> meta.Window:
        recorded.append((progress.step, steps))
        return record(rule, progress, steps, **rates)

    monkeypatch.setattr(_segments, "run_window", counting)
    windows(CASES[0].make(), DIGITS, meta.TruncatedBPTT(10, segments=3), 10, count=1)
    assert recorded == [(6, 4), (3, 3), (0, 3)]


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("steps", [1, 10, 100, 1000, 20_000])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_auto_takes_about_the_least_memory(case: RuleCase, steps: int, held_out: bool) -> None:
    rule = case.make()
    progress = meta.start(rule, DIGITS.sample(2, seeded()), held_out=held_out)
    beginning = progress.state.shape[0] + 2

    def numbers(segments: int) -> float:
        return segments * beginning + (2 if held_out else 1) * steps / segments

    chosen = _segments.least_memory(progress, steps)
    least = min(numbers(segments) for segments in range(1, steps + 1))
    assert 1 <= chosen <= steps
    assert numbers(chosen) <= 1.1 * least


class Forgetful(Task):
    """Its runs draw from a generator that they do not list."""

    class Run(VmapRun):
        hidden = torch.Generator()

        def next_batch(self) -> tuple[Tensor, ...]:
            return (torch.randn(self.num_runs, 3, generator=self.hidden),)

        def loss(self, params: Tensor, *inputs: Tensor) -> Tensor:
            return (params - inputs[0]).square().sum()

    def sample(
        self, num_runs: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> TaskRun:
        return self.Run({"params": torch.ones(num_runs, 3, dtype=dtype)}, torch.Generator())

    def config(self) -> dict[str, Any]:
        return {}


def test_runs_that_cannot_be_replayed_are_refused() -> None:
    estimator = meta.TruncatedBPTT(6, segments=2)
    with pytest.raises(RuntimeError, match=r"a Run did not give the same gradients .* segments=1"):
        windows(small_rule(), Forgetful(), estimator, 6)


def test_diverged_runs_are_replayed_too() -> None:
    """Their windows are dropped by the trainer, which looks for NaN itself."""
    rule = small_rule()
    with torch.no_grad():
        rule.readout.bias.fill_(1e30)
    (result,), _ = windows(rule, Quadratic(dim=3), meta.TruncatedBPTT(6, segments=3), 6, count=1)
    assert not torch.isfinite(result.losses).all()


def test_fit_on_whole_horizons_in_segments_resumes_to_the_same_bits(tmp_path: Any) -> None:
    def trainer(folder: str) -> meta.MetaTrainer:
        estimator = meta.TruncatedBPTT(None, "log", held_out=True, segments="auto")
        options = {"tasks": [DIGITS], "estimator": estimator, "horizon": (10, 60), "groups": 2}
        return small_trainer(**options, checkpoint_dir=tmp_path / folder)

    whole = trainer("whole")
    whole.fit(6)
    trainer("parts").fit(3)
    parts = trainer("parts")
    parts.fit(6)
    assert_same_bits(parts, whole)


@pytest.mark.parametrize("segments", [1, 3, "auto"])
def test_windows_of_no_steps_are_refused(segments: int | str) -> None:
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        windows(small_rule(), DIGITS, meta.TruncatedBPTT(segments=segments), 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segments": 0}, "segments must be an int of at least 1, got 0"),
        ({"segments": 2.0}, "segments must be an int"),
        ({"segments": "few"}, "segments must be one of 'auto'; got 'few'"),
        ({"segments": 2, "second_order": True}, "segments=2 is for the fused path"),
        ({"segments": "auto", "path": "autograd"}, "segments='auto' is for the fused path"),
    ],
)
def test_impossible_segments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        meta.TruncatedBPTT(5, **options)


def test_rules_whose_coordinates_talk_are_refused() -> None:
    rule = RuleCase("", "hierarchical", {"param_size": 2, "tensor_size": 2}).make()
    with pytest.raises(ValueError, match="segments=3 is for rules whose coordinates do not talk"):
        small_trainer(rule=rule, estimator=meta.TruncatedBPTT(6, segments=3))


def test_recipes_have_the_key() -> None:
    text = """
    name = "tiny"
    outer_steps = 1
    [rule]
    family = "lstm"
    [[tasks]]
    kind = "quadratic"
    [estimator]
    unroll = "horizon"
    segments = {segments}
    """
    for written, segments in (("3", 3), ('"auto"', "auto")):
        estimator = build_trainer(parse_recipe(text.format(segments=written))).estimator
        assert isinstance(estimator, meta.TruncatedBPTT)
        assert estimator.segments == segments
    with pytest.raises(RecipeError, match="segments must be one of 'auto'"):
        build_trainer(parse_recipe(text.format(segments='"some"')))
