"""Imitation of Adam: the lesson's path, its misfit and the misfit's gradient."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import fastl2o
from fastl2o import meta
from fastl2o.meta.imitation import Lesson
from fastl2o.meta.tasks import Quadratic, RandomScaling, WithConvex
from fastl2o.rules import FAMILIES, Rule
from tests.common import RuleCase
from tests.test_meta_gradient import assert_near, over_cases
from tests.test_meta_trainer import assert_same_bits

F64 = torch.float64
TASK = WithConvex(RandomScaling(Quadratic(dim=4), 1.0), num=3)
LESSONS = {
    "as-published": meta.Imitation(lr=0.05),
    "linear-fall": meta.Imitation(lr=0.05, decay=6.0, schedule="linear", relative=True),
    "falling-rate": meta.Imitation(lr=0.05, betas=(0.95, 0.9), decay=3.0, relative=True),
    "own-path": meta.Imitation(lr=0.05, own_path=1.0),
    "some-coordinates": meta.Imitation(lr=0.05, coordinates=5),
    "some-on-its-own-path": meta.Imitation(lr=0.05, own_path=1.0, coordinates=5, relative=True),
}


def ahead(imitation: meta.Imitation, grads: list[float]) -> list[float]:
    """The steps of a teacher with nesterov and cautious on one coordinate, number by number."""
    (beta1, beta2), m, v, steps = imitation.betas, 0.0, 0.0, []
    for t, g in enumerate(grads, 1):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        mean = m / (1 - beta1**t)
        if imitation.nesterov:
            mean = beta1 * m / (1 - beta1 ** (t + 1)) + (1 - beta1) * g / (1 - beta1**t)
        allowed = not imitation.cautious or (mean > 0) == (g > 0)
        root = math.sqrt(v / (1 - beta2**t)) + 1e-8
        steps.append(-imitation.rate(t) * mean / root if allowed else 0.0)
    return steps


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def replay(rule: Rule, imitation: meta.Imitation, lesson: Lesson, windows: int, steps: int) -> Any:
    """The same lesson by torch.optim.Adam, autograd and the reference step, window by window."""
    run = TASK.sample(3, seeded(1), F64)
    params = run.params.clone().requires_grad_()
    taught = params.detach().clone().requires_grad_()  # what Adam steps, wherever it is
    adam = torch.optim.Adam([taught], betas=imitation.betas)
    picked = torch.arange(params.shape[1]) if lesson.picked is None else lesson.picked
    seen = params if lesson.own_path else params[:, picked]
    state, weights = rule.init_state(seen, F64), list(rule.parameters())
    batch = run.next_batch()
    for window in range(windows):
        state, misfit = state.detach(), torch.zeros((), dtype=F64)
        for count in range(window * steps + 1, (window + 1) * steps + 1):
            params.grad = None
            run.losses(params, batch).sum().backward()
            taught.grad, before = params.grad.clone(), taught.detach().clone()
            adam.param_groups[0]["lr"] = imitation.rate(count)
            adam.step()
            target = taught.detach() - before
            grads = params.grad if lesson.own_path else params.grad[:, picked]
            update, state = rule.reference_step(grads, state, count - 1)
            compared = update[:, picked] if lesson.own_path else update
            unit = imitation.rate(count) if imitation.relative else 1.0
            misfit = misfit + 0.5 * ((target[:, picked] - compared) / unit).square().mean()
            with torch.no_grad():
                params += update if lesson.own_path else target
            batch = run.next_batch()
        yield misfit.detach(), torch.autograd.grad(misfit, weights), params.detach().clone()


@over_cases
@pytest.mark.parametrize("kind", LESSONS)
def test_misfit_and_gradient_are_autograds(case: RuleCase, kind: str) -> None:
    rule, imitation = case.make(F64), LESSONS[kind]
    progress = meta.start(rule, TASK.sample(3, seeded(1), F64))
    lesson = imitation.begin(rule, progress, seeded(2))
    expected = replay(rule, imitation, lesson, windows=2, steps=4)
    for misfit, gradients, params in expected:
        result = imitation.window(rule, progress, lesson, 4)
        torch.testing.assert_close(result.loss, misfit, rtol=1e-9, atol=0)
        assert_near(result.gradient, torch.cat([g.flatten() for g in gradients]), 1e-9)
        torch.testing.assert_close(progress.params, params, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(
            progress.losses, progress.run.losses(params, progress.run.full_batch())
        )


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("cautious", [False, True])
def test_teacher_looks_ahead_and_leaves_out_steps_against_the_gradient(
    nesterov: bool, cautious: bool
) -> None:
    imitation = meta.Imitation(
        lr=0.05, betas=(0.9, 0.8), decay=3.0, nesterov=nesterov, cautious=cautious
    )
    grads = torch.randn(12, 1, 5, generator=seeded(), dtype=F64)
    moments = torch.zeros(2, 1, 5, dtype=F64)
    steps = [imitation.adam_step(g, moments, t) for t, g in enumerate(grads, 1)]
    taught = torch.stack(steps).squeeze(1)
    expected = torch.tensor([ahead(imitation, g.tolist()) for g in grads.squeeze(1).T], dtype=F64)
    torch.testing.assert_close(taught, expected.T, rtol=1e-12, atol=0)
    assert bool((taught == 0).any()) == cautious


def test_rate_falls_with_the_root_of_time() -> None:
    assert meta.Imitation(lr=0.02).rate(10_000) == 0.02
    assert meta.Imitation(lr=0.02, decay=300.0).rate(900) == pytest.approx(0.01)


def test_rate_falls_with_time() -> None:
    assert meta.Imitation(lr=0.02, decay=300.0, schedule="inverse").rate(900) == 0.005


def test_rate_falls_linearly_to_a_twentieth() -> None:
    linear = meta.Imitation(lr=0.02, decay=2000.0, schedule="linear")
    assert linear.rate(1000) == pytest.approx(0.01)
    assert linear.rate(2000) == linear.rate(10_000) == pytest.approx(0.001)


def test_own_path_and_coordinates_are_drawn_for_each_lesson() -> None:
    rule, generator = fastl2o.LSTMRule(4, 1), seeded()
    imitation = meta.Imitation(own_path=0.5, coordinates=3)
    lessons = []
    for _ in range(40):
        progress = meta.start(rule, TASK.sample(2, seeded(1)))
        lessons.append(imitation.begin(rule, progress, generator))
        # On Adam's path only what is compared needs a state.
        assert progress.state.shape[2] == (7 if lessons[-1].own_path else 3)
    assert 8 < sum(lesson.own_path for lesson in lessons) < 32
    assert len({tuple(lesson.picked.tolist()) for lesson in lessons}) > 20
    assert all(lesson.picked.unique().numel() == 3 for lesson in lessons)


@pytest.mark.parametrize("own_path", [0.0, 1.0])
@pytest.mark.parametrize(
    ("family", "coordinates"), [("rnnprop", None), ("rnnprop", 3), ("hierarchical", None)]
)
def test_lessons_resume_to_the_same_bits(
    family: str, coordinates: int | None, own_path: float, tmp_path: Path
) -> None:
    sizes = {"rnnprop": (4, 1), "hierarchical": (3, 2, 2)}[family]

    def trainer(directory: Path | None = None) -> meta.MetaTrainer:
        rule = FAMILIES[family](*sizes)
        rule.reset_parameters(seeded())
        return meta.MetaTrainer(
            rule,
            [Quadratic(dim=7)],
            meta.TruncatedBPTT(5),
            horizon=40,
            imitation=meta.Imitation(1.0, coordinates=coordinates, own_path=own_path),
            runs=2,
            groups=2,
            progress=False,
            checkpoint_dir=directory,
        )

    whole = trainer()
    whole.fit(8)
    trainer(tmp_path).fit(5)
    resumed = trainer(tmp_path)
    resumed.fit(8)
    assert_same_bits(resumed, whole)


def test_a_rule_learns_adams_steps() -> None:
    """RNNprop sees what Adam with its betas sees: a few hundred lessons bring it close."""
    rule = fastl2o.RNNPropRule(8, 1)
    rule.reset_parameters(seeded())
    trainer = meta.MetaTrainer(
        rule,
        [Quadratic(dim=10)],
        meta.TruncatedBPTT(10),
        horizon=40,
        optimizer=torch.optim.Adam(rule.parameters(), lr=1e-2),
        imitation=meta.Imitation(1.0, lr=0.05, betas=(0.95, 0.95), relative=True, own_path=0.5),
        runs=4,
        clip_grad=1.0,
        progress=False,
    )
    first = trainer.fit(1).meta_loss
    misfits = [trainer.fit(step).meta_loss for step in range(302, 342)]
    assert math.fsum(misfits) / len(misfits) < 0.05 * first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probability": 1.5}, "probability must be at most 1"),
        ({"own_path": -0.1}, "own_path must be"),
        ({"betas": [0.9, 0.9]}, "betas must be two numbers"),
        ({"betas": (0.9, 1.0)}, "betas must be"),
        ({"decay": 0.0}, "decay must be"),
        ({"coordinates": 0}, "coordinates must be"),
        (
            {"schedule": "cosine"},
            "schedule must be one of 'inverse_sqrt', 'inverse', 'linear'; got 'cosine'",
        ),
        ({"schedule": "linear"}, "schedule='linear' needs decay"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        meta.Imitation(**options)


@pytest.mark.parametrize("own_path", [0.0, 1.0])
def test_rules_whose_coordinates_talk_are_taught_whole_tensors(own_path: float) -> None:
    """Misfit and gradient are autograd's through the reference, the learned start included."""
    rule = fastl2o.HierarchicalRule(3, 4, 2, lowest_rate=1e-2, highest_rate=1e-2).double()
    imitation = meta.Imitation(lr=0.05, decay=3.0, relative=True, own_path=own_path)
    progress, other = (
        meta.start(rule, TASK.sample(2, seeded(1), F64)),
        TASK.sample(2, seeded(1), F64),
    )
    lesson = imitation.begin(rule, progress, seeded(2))
    params, moments = other.params.clone(), torch.zeros(2, *other.params.shape, dtype=F64)
    sizes = other.tensor_sizes
    assert len(sizes) == 2
    state = rule.init_runs(params, sizes)
    flat = rule.flat_parameters().detach()
    for window in range(2):
        meta_parameters, start = flat.clone().requires_grad_(), state.detach().requires_grad_()
        misfit, state = torch.zeros((), dtype=F64), start
        for count in range(4 * window + 1, 4 * window + 5):
            grads = other.loss_and_grad(params, other.next_batch())[1]
            target = imitation.adam_step(grads, moments, count)
            update, state = rule.reference_runs_step(
                grads, state, count - 1, sizes, meta_parameters
            )
            apart = (update - target) / imitation.rate(count)
            misfit = misfit + 0.5 * apart.square().mean()
            params = params + (update.detach() if lesson.own_path else target)
        expected, d_start = torch.autograd.grad(misfit, (meta_parameters, start))
        if window == 0:
            expected = expected + rule.start_gradient(d_start, sizes)
        result = imitation.window(rule, progress, lesson, 4)
        torch.testing.assert_close(result.loss, misfit.detach(), rtol=1e-9, atol=0)
        assert_near(result.gradient, expected, 1e-8)
        torch.testing.assert_close(progress.params, params, rtol=1e-9, atol=1e-12)


def test_coordinates_of_a_rule_that_must_see_all_are_refused_before_it_trains() -> None:
    rule = fastl2o.HierarchicalRule(param_size=2, tensor_size=2, global_size=2)
    with pytest.raises(ValueError, match="3 coordinates alone is for rules whose coordinates do"):
        meta.MetaTrainer(
            rule, [meta.tasks.Quadratic(dim=2)], imitation=meta.Imitation(coordinates=3)
        )
