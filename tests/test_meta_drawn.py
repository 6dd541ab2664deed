"""Tasks with drawn settings: what is drawn, resuming into another draw, and generated signals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastl2o import meta
from fastl2o.meta.tasks import (
    Bowl,
    DrawnBatchSize,
    DrawnMLP,
    GradientNoise,
    MLPClassification,
    Quadratic,
    RandomScaling,
    SumOf,
    Task,
    TensorScaling,
    WeightNormalization,
    WithConvex,
)
from fastl2o.meta.tasks._signals import draw_signals
from tests.test_meta_tasks import seeded
from tests.test_meta_trainer import assert_same_bits, small_rule


def family(**options: Any) -> DrawnMLP:
    settings = {"depth": (1, 3), "width": (2, 9), "batch_size": 5, **options}
    return DrawnMLP("digits", **settings)


DRAWN = {
    "mlp": family(),
    "batch": DrawnBatchSize(MLPClassification("digits", hidden=(3,)), low=2, high=40),
    "both": DrawnBatchSize(family(), low=2, high=40),
    "noisy": GradientNoise(family()),
    "rnnprop": WithConvex(RandomScaling(family()), num=4),
    "normalized": WeightNormalization(family()),
    "tensor-scaled": TensorScaling(family()),
    "sum": SumOf([family(), Bowl(), family()]),
}
over_drawn = pytest.mark.parametrize("task", DRAWN.values(), ids=DRAWN.keys())


def test_depth_width_and_activation_are_drawn_for_every_batch_of_runs() -> None:
    generator, task = seeded(), family()
    draws = [task.sample(3, generator).draw for _ in range(60)]
    assert {len(draw["hidden"]) for draw in draws} == {1, 2, 3}
    assert {width for draw in draws for width in draw["hidden"]} == set(range(2, 10))
    assert {draw["activation"] for draw in draws} == {"sigmoid", "relu", "elu", "tanh"}


def test_a_drawn_run_is_that_of_the_network_drawn() -> None:
    run = family().sample(3, seeded(2), torch.float64)
    network = MLPClassification("digits", **run.draw, batch_size=5, init_scale="torch")
    plain = network.sample(3, seeded(), torch.float64)
    assert run.tensor_sizes == plain.tensor_sizes == tuple(network.sizes)
    batch = run.next_batch()
    assert batch[0].shape == (3, 5)
    for mine, theirs in zip(
        run.loss_and_grad(run.params, batch), plain.loss_and_grad(run.params, batch), strict=True
    ):
        assert torch.equal(mine, theirs)


def test_batch_sizes_are_drawn_log_uniformly() -> None:
    generator = seeded()
    task = DrawnBatchSize(MLPClassification("digits"), low=4, high=63)
    sizes = [task.sample(2, generator).next_batch()[0].shape[1] for _ in range(400)]
    assert min(sizes) >= 4
    assert max(sizes) <= 63
    # Half of the draws lie below the geometric mean of 4 and 64.
    share = sum(size < 16 for size in sizes) / len(sizes)
    assert share == pytest.approx(0.5, abs=0.07)


@over_drawn
def test_a_run_takes_over_the_state_of_another_draw(task: Task) -> None:
    first, other = task.sample(2, seeded(3)), task.sample(2, seeded(4))
    first.next_batch()
    state = first.state_dict()
    other.load_state_dict(state)
    assert other.dim == first.dim
    assert other.tensor_sizes == first.tensor_sizes
    mine, theirs = first.next_batch(), other.next_batch()
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    for a, b in zip(
        first.loss_and_grad(first.params, mine),
        other.loss_and_grad(other.params, theirs),
        strict=True,
    ):
        assert torch.equal(a, b)


@over_drawn
def test_a_refused_state_changes_nothing(task: Task) -> None:
    run = task.sample(2, seeded(3))
    params, draws = run.params.clone(), run.generator.get_state()
    for foreign in (Quadratic(dim=7), GradientNoise(Quadratic(dim=7)), SumOf([Bowl()] * 2)):
        with pytest.raises(ValueError, match="run of the task that it was saved from"):
            run.load_state_dict(foreign.sample(2, seeded()).state_dict())
        assert torch.equal(run.params, params)
        assert torch.equal(run.generator.get_state(), draws)
        run.loss_and_grad(run.params, run.next_batch())
        run.generator.set_state(draws)


def make_trainer(estimator: meta.Estimator, **options: Any) -> meta.MetaTrainer:
    tasks = [DRAWN["both"], DRAWN["rnnprop"], DRAWN["sum"]]
    return meta.MetaTrainer(
        small_rule(),
        tasks,
        estimator,
        horizon=(2, 4),
        runs=2,
        groups=2,
        progress=False,
        **options,
    )


@pytest.mark.parametrize(
    ("estimator", "imitation"),
    [(meta.TruncatedBPTT(2, objective="log"), meta.Imitation(0.3)), (meta.PES(2), None)],
    ids=["bptt", "pes"],
)
def test_a_resumed_training_on_drawn_tasks_has_the_same_bits(
    estimator: meta.Estimator, imitation: meta.Imitation | None, tmp_path: Path
) -> None:
    whole = make_trainer(estimator, imitation=imitation)
    whole.fit(8)
    make_trainer(estimator, imitation=imitation, checkpoint_dir=tmp_path).fit(3)
    resumed = make_trainer(estimator, imitation=imitation, checkpoint_dir=tmp_path)
    resumed.fit(8)
    assert_same_bits(resumed, whole)


def test_held_out_is_the_other_images_at_the_tasks_own_batch_size() -> None:
    held_out = DrawnBatchSize(family(), low=2, high=40).held_out()
    assert isinstance(held_out, DrawnMLP)
    assert repr(held_out) == repr(family(split="meta_valid"))


def test_signals_are_templates_moved_and_scaled() -> None:
    signals, labels = draw_signals(2000)
    again, _ = draw_signals(2000)
    assert torch.equal(signals, again)
    assert not torch.equal(signals, draw_signals(2000, seed=1)[0])
    assert labels.bincount().tolist() == [200] * 10
    assert signals.std().item() == pytest.approx(0.5, abs=0.05)
    # A class's mean signal is no template, but differs from other classes' by more than noise.
    means = torch.stack([signals[labels == c].mean(dim=0) for c in range(10)])
    assert torch.pdist(means).min() > 0.3
    halves = torch.stack([signals[labels == c][::2].mean(dim=0) for c in range(10)])
    assert torch.linalg.vector_norm(halves - means, dim=1).max() < 0.3


def test_signals_stand_in_for_images() -> None:
    task = MLPClassification("signals", hidden=(4,), batch_size=7)
    assert task.config()["data"] == "signals"
    assert task.dim == 41 * 4 + 5 * 10
    assert [len(task.with_options(split=s).examples()[1]) for s in ("meta_train", "test")] == [
        2000,
        1000,
    ]
    run = task.sample(2, seeded(), torch.float64)
    (indices,) = batch = run.next_batch()
    signals = task.examples()[0][indices].double()
    assert torch.equal(run.gather(batch)[0], signals)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: family(depth=0), "depth must be an int of at least 1"),
        (lambda: family(depth=(3, 1)), r"depth \(low, high\) must have low <= high"),
        (lambda: family(width=(1, 2, 3)), r"width must be an int or a \(low, high\) pair"),
        (lambda: family(width="8"), "width must be an int"),
        (lambda: family(activations="tanh"), "activations must be a sequence of at least one of"),
        (lambda: family(activations=("tanh", "gelu")), "'tanh'; got 'gelu'"),
        (lambda: family(init_scale="he"), "at least 0, or 'torch'"),
        (lambda: DrawnBatchSize(Quadratic()), "task must have a batch_size to draw"),
        (lambda: DrawnBatchSize(family(), low=9, high=3), "must have low <= high"),
        (lambda: family().sample(0, seeded()), "num_runs must be"),
    ],
)
def test_impossible_arguments_are_named(make: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()
