"""Meta-losses on held-out data: rules see training gradients, and are judged by other data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastl2o import meta
from fastl2o.meta.recipe import RecipeError, build_trainer, parse_recipe
from fastl2o.meta.tasks import (
    Autoencoder,
    CharRNN,
    ConvClassification,
    DrawnBatchSize,
    DrawnMLP,
    GradientNoise,
    LogObjective,
    MLPClassification,
    Quadratic,
    RandomMLP,
    RandomScaling,
    Rescaled,
    SparseGradients,
    SumOf,
    Task,
    TensorScaling,
    WeightNormalization,
    WithConvex,
)
from fastl2o.meta.unroll import Perturbations
from fastl2o.rules import Rule
from tests.common import RuleCase
from tests.test_meta_gradient import assert_near, seeded
from tests.test_meta_trainer import assert_same_bits, small_rule, small_trainer

F64 = torch.float64
CASES = (
    RuleCase("lstm", "lstm", {"hidden_size": 4}),
    RuleCase("rnnprop", "rnnprop", {"hidden_size": 3}),
    RuleCase("hierarchical", "hierarchical", {"param_size": 3, "tensor_size": 2, "global_size": 2}),
)
over_cases = pytest.mark.parametrize("case", CASES, ids=str)
DIGITS = MLPClassification("digits", hidden=(3,), batch_size=6, init_scale=0.3)
WRAPPED = SparseGradients(WithConvex(RandomScaling(DIGITS, 1.0), num=3), 0.3)


def begin(rule: Rule, task: Task, estimator: meta.Estimator, runs: int = 2) -> meta.Progress:
    dtype = next(rule.parameters()).dtype
    return estimator.begin(rule, estimator.sample(task, runs, seeded(1), dtype))


@pytest.mark.parametrize("second_order", [False, True], ids=["first-order", "second-order"])
@over_cases
def test_meta_gradient_is_that_of_losses_on_the_other_split(
    case: RuleCase, second_order: bool
) -> None:
    """By a loop of its own, whose held-out losses are of a run of the held-out task."""
    rule, lr, decay = case.make(F64), 0.7, 0.1
    phi = rule.flat_parameters().detach().requires_grad_()
    run = DIGITS.sample(2, seeded(1), F64)
    valid = DIGITS.with_options(split="meta_valid").sample(2, seeded(2), F64)
    params, sizes = run.params, run.tensor_sizes
    state = first = rule.init_runs(params, sizes, run.generator).requires_grad_()
    batch = run.next_batch()
    valid.generator.manual_seed(int(torch.randint(2**62, (), generator=run.generator)))
    visited = [valid.losses(params, valid.next_batch())]
    for t in range(4):
        at = params if second_order else params.detach()
        at = at if at.requires_grad else at.requires_grad_()
        loss = run.losses(at, batch).sum()
        (grads,) = torch.autograd.grad(loss, at, create_graph=second_order)
        update, state = rule.reference_runs_step(grads, state, t, sizes, phi)
        params, batch = (1 - lr * decay) * params + lr * update, run.next_batch()
        visited.append(valid.losses(params, valid.next_batch()))
    losses = torch.stack(visited)
    expected_loss = torch.log((losses[1:] + 1e-8) / (losses[:1] + 1e-8)).mean()
    expected, d_start = torch.autograd.grad(expected_loss, (phi, first))
    if rule.learned_start:
        expected = expected + rule.start_gradient(d_start, sizes)

    estimator = meta.TruncatedBPTT(4, "log", second_order=second_order, held_out=True)
    progress = begin(rule, DIGITS, estimator)
    result = estimator.window(rule, progress, lr=lr, weight_decay=decay)
    assert_near(result.gradient, expected, 1e-10)
    assert_near(result.losses, losses.detach(), 1e-12)
    assert_near(result.loss, expected_loss.detach(), 1e-12)
    assert_near(progress.params, params.detach(), 1e-12)


@pytest.mark.parametrize("task", [WRAPPED, GradientNoise(DIGITS)], ids=["sparse", "noisy"])
@pytest.mark.parametrize("objective", ["sum", "weighted", "final", "log", "best"])
@pytest.mark.parametrize("final_term", [True, False], ids=["all-terms", "without-the-last"])
def test_fused_window_equals_autograd(task: Task, objective: str, final_term: bool) -> None:
    """Noise and gaps of the gradients that the rule sees are not in those of the meta-loss."""
    rule, results = CASES[0].make(F64), {}
    for path in ("fused", "autograd"):
        estimator = meta.TruncatedBPTT(5, objective, final_term, path, held_out=True)
        progress = begin(rule, task, estimator)
        results[path] = [estimator.window(rule, progress, lr=0.7, weight_decay=0.1) for _ in "ab"]
    for fused, eager in zip(results["fused"], results["autograd"], strict=True):
        assert_near(fused.gradient, eager.gradient, 1e-10)
        assert_near(fused.losses, eager.losses, 1e-12)


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_kernels_take_float32_windows(case: RuleCase) -> None:
    estimator = meta.TruncatedBPTT(5, held_out=True)
    gradients = []
    for dtype in (F64, torch.float32):
        rule = case.make(dtype)
        run = DIGITS.sample(2, seeded(), F64)
        run.tensors = {name: tensor.to(dtype) for name, tensor in run.tensors.items()}
        gradients.append(estimator.window(rule, estimator.begin(rule, run)).gradient.double())
    assert_near(gradients[1], gradients[0], 1e-3)


def test_the_gradient_is_not_that_of_the_training_losses() -> None:
    rule = CASES[0].make(F64)
    found = []
    for held_out in (False, True):
        estimator = meta.TruncatedBPTT(5, held_out=held_out)
        found.append(estimator.window(rule, begin(rule, DIGITS, estimator)).gradient)
    assert (found[0] - found[1]).norm() > 0.01 * found[0].norm()


def test_full_data_is_then_all_of_the_held_out_data() -> None:
    rule = CASES[0].make(F64)
    estimator = meta.TruncatedBPTT(3, full_data=True, held_out=True)
    progress = begin(rule, DIGITS, estimator)
    result = estimator.window(rule, progress)
    valid = DIGITS.held_out().sample(2, seeded(), F64)
    expected = valid.losses(progress.params, valid.full_batch())
    assert_near(result.losses[-1], expected, 1e-12)


@pytest.mark.parametrize("kind", [meta.ES, meta.PES])
def test_evolution_strategies_take_differences_of_held_out_losses(kind: type[meta.ES]) -> None:
    """Two runs along the gradient's direction differ by its length, as in test_meta_evolution."""
    # Of smooth inputs: the logarithms' clip makes central differences inexact.
    rule, runs = RuleCase("", "lstm", {"hidden_size": 3, "preprocess": "identity"}).make(F64), 4
    exact = meta.TruncatedBPTT(4, "sum", second_order=True, held_out=True)
    estimator = kind(4, 1e-3, "sum", held_out=True)
    progress = begin(rule, DIGITS, estimator, 2 * runs)
    same = begin(rule, DIGITS, exact, runs)
    for name in ("run", "held_out"):
        state = getattr(progress, name).generator.get_state()
        getattr(same, name).generator.set_state(state)
    gradient = exact.window(rule, same).gradient

    class Along(Perturbations):
        def noise(self, window: int, pairs: int, size: int) -> Tensor:
            return (gradient / gradient.norm()).expand(pairs, size)

    progress.perturbations = Along(seed=0)
    assert_near(estimator.window(rule, progress).gradient, gradient, 1e-4)


@pytest.mark.parametrize(
    "task",
    [
        DIGITS,
        Autoencoder(hidden=(4,), batch_size=3),
        ConvClassification(channels=(2,), batch_size=3),
        CharRNN(hidden_size=3, length=4, batch_size=3),
        DrawnMLP(depth=(1, 2), width=(3, 5), batch_size=3),
    ],
    ids=lambda task: type(task).__name__,
)
def test_held_out_losses_are_of_the_drawn_network_on_the_other_split(task: Any) -> None:
    run = task.sample(2, seeded(), F64)
    found = run.held_out(seeded(3))
    inner = getattr(run, "inner", run)
    other = inner.task.held_out().sample(2, seeded(5), F64)
    assert torch.equal(found.params, run.params)
    batch = found.next_batch()
    assert batch[0].shape == run.next_batch()[0].shape
    other.generator.manual_seed(3)
    assert torch.equal(batch[0], other.next_batch()[0])
    assert torch.equal(found.losses(run.params, batch), other.losses(run.params, batch))
    assert not torch.equal(found.losses(run.params, batch), run.losses(run.params, batch))


@pytest.mark.parametrize(
    ("wrap", "losses_of"),
    [
        (GradientNoise, lambda inner, outer, x, b: inner.losses(x, b)),
        (SparseGradients, lambda inner, outer, x, b: inner.losses(x, b)),
        (lambda task: Rescaled(task, 3.0), lambda inner, outer, x, b: 3 * inner.losses(x, b)),
        (
            LogObjective,
            lambda inner, outer, x, b: torch.log(inner.losses(x, b) * 1e6 + 1),
        ),
        (RandomScaling, lambda inner, outer, x, b: inner.losses(x * outer.tensors["scale"], b)),
        (TensorScaling, lambda inner, outer, x, b: inner.losses(x * outer.tensors["scale"], b)),
        (WeightNormalization, lambda inner, outer, x, b: inner.losses(x[:, : inner.dim], b)),
        (
            lambda task: SumOf([task, GradientNoise(task)]),
            lambda inner, outer, x, b: sum(
                part.losses(x.chunk(2, 1)[place], b[place : place + 1])
                for place, part in enumerate((inner, outer.parts[1].inner.held_out(seeded())))
            ),
        ),
    ],
    ids=["noise", "sparse", "rescaled", "log", "scaling", "tensors", "normalized", "sum"],
)
def test_transforms_of_a_task_hold_for_its_held_out_losses(
    wrap: Callable[[Task], Task], losses_of: Callable[..., Tensor]
) -> None:
    run: Any = wrap(DIGITS).sample(2, seeded(), F64)
    inner = (run.parts[0] if hasattr(run, "parts") else run.inner).held_out(seeded(3))
    found = run.held_out(seeded(3))
    batch = found.next_batch()
    expected = losses_of(inner, run, run.params, batch)
    losses, grads = found.loss_and_grad(run.params, batch)
    assert_near(losses, expected, 1e-12)
    leaf = run.params.clone().requires_grad_()
    (clean,) = torch.autograd.grad(found.losses(leaf, batch).sum(), leaf)
    assert_near(grads, clean, 1e-10)


@pytest.mark.parametrize(
    "estimator",
    [
        meta.TruncatedBPTT(3, "log", held_out=True),
        meta.ES(3, 0.02, held_out=True),
        meta.PES(3, 0.02, held_out=True),
    ],
    ids=lambda estimator: estimator.kind,
)
@pytest.mark.parametrize("stop", [1, 4])
def test_fit_resumed_has_the_same_bits(estimator: meta.Estimator, stop: int, tmp_path: Any) -> None:
    """Also where what is drawn changes shape, and windows end within a run."""
    drawn = DrawnBatchSize(MLPClassification("digits", hidden=(3,)), 4, 9)
    sizes = DrawnMLP(depth=(1, 2), width=(3, 5), batch_size=4)
    tasks = [RandomScaling(drawn), WeightNormalization(sizes), SumOf([DIGITS, WRAPPED])]

    def trainer(folder: str) -> meta.MetaTrainer:
        options = {"tasks": tasks, "estimator": estimator, "horizon": 8, "groups": 2}
        return small_trainer(**options, checkpoint_dir=tmp_path / folder)

    whole = trainer("whole")
    whole.fit(9)
    trainer("parts").fit(stop)
    parts = trainer("parts")
    parts.fit(9)
    assert_same_bits(parts, whole)


def test_lessons_report_held_out_losses_too() -> None:
    rule, imitation = small_rule(), meta.Imitation(probability=1.0)
    progress = begin(rule, DIGITS, meta.TruncatedBPTT(held_out=True))
    lesson = imitation.begin(rule, progress, seeded())
    apart = progress.held_out
    assert apart is not None
    replayed = torch.Generator().set_state(apart.generator.get_state())
    result = imitation.window(rule, progress, lesson, 1)
    again = progress.run.held_out(replayed)
    assert torch.equal(result.losses[1], again.losses(progress.params, again.next_batch()))


def test_training_by_held_out_losses_lowers_them() -> None:
    rule, estimator = small_rule(), meta.TruncatedBPTT(5, held_out=True)
    optimizer = torch.optim.Adam(rule.parameters(), lr=1e-2)
    task = MLPClassification("digits", hidden=(), batch_size=16)
    before = meta.run_losses(rule, task.held_out(), runs=8, horizon=20)
    small_trainer(
        rule=rule, tasks=[task], estimator=estimator, horizon=20, optimizer=optimizer
    ).fit(60)
    after = meta.run_losses(rule, task.held_out(), runs=8, horizon=20)
    assert after[-1].mean() < 0.5 * before[-1].mean()


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Quadratic(dim=3), "has no data besides what it trains on; held-out losses need"),
        (RandomMLP(), "no data besides"),
        (SumOf([DIGITS, Quadratic(dim=3)]), "no data besides"),
        (DIGITS.with_options(split="train"), "holds out no data; give it split='meta_train'"),
        (CharRNN(split="meta_valid"), "holds out no data"),
    ],
    ids=["quadratic", "random", "sum", "train", "text"],
)
@pytest.mark.parametrize("estimator", [meta.TruncatedBPTT, meta.ES, meta.PES])
def test_tasks_that_hold_out_no_data_are_refused(
    task: Task, message: str, estimator: type[meta.Estimator]
) -> None:
    with pytest.raises(ValueError, match=message):
        small_trainer(tasks=[DIGITS, task], estimator=estimator(held_out=True))


def test_unroll_gradient_refuses_runs_without_held_out_data() -> None:
    run = Quadratic(dim=3).sample(2, seeded())
    with pytest.raises(ValueError, match="no data besides"):
        meta.unroll_gradient(small_rule(), run, 3, estimator=meta.TruncatedBPTT(3, held_out=True))
    digits = DIGITS.sample(2, seeded())
    estimator = meta.TruncatedBPTT(3, held_out=True)
    assert meta.unroll_gradient(small_rule(), digits, 3, estimator=estimator)[1].shape == (4, 2)


@pytest.mark.parametrize("kind", [meta.TruncatedBPTT, meta.ES, meta.PES])
@pytest.mark.parametrize("held_out", [False, True])
def test_progress_of_other_losses_is_refused(kind: type[meta.Estimator], held_out: bool) -> None:
    rule = small_rule()
    progress = begin(rule, DIGITS, kind(held_out=not held_out))
    with pytest.raises(TypeError, match=f"the estimator has held_out={held_out}; start the runs"):
        kind(held_out=held_out).window(rule, progress, 3)


@pytest.mark.parametrize("kind", ["bptt", "es", "pes"])
def test_recipes_have_the_key(kind: str) -> None:
    text = """
    name = "tiny"
    outer_steps = 1
    [rule]
    family = "lstm"
    [[tasks]]
    kind = "{task}"
    [estimator]
    kind = "{kind}"
    held_out = true
    """
    recipe = parse_recipe(text.format(task="mlp", kind=kind))
    assert build_trainer(recipe).estimator.held_out is True
    with pytest.raises(RecipeError, match="no data besides"):
        build_trainer(parse_recipe(text.format(task="quadratic", kind=kind)))
