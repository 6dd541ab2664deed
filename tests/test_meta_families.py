"""Re-parametrised tasks, the lists of families, and all of it in recipes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastl2o.meta.recipe import RecipeError, build_trainer, parse_recipe
from fastl2o.meta.tasks import (
    Quadratic,
    RandomMLP,
    Task,
    TensorScaling,
    WeightNormalization,
    ensemble,
    families,
    held_out_families,
)
from tests.test_meta_tasks import F64, seeded, small_mlp


def test_tensors_are_scaled_each_by_one_factor() -> None:
    task = small_mlp()
    plain = task.sample(2, seeded(), F64)
    scaled = TensorScaling(task, bound=2.0).sample(2, seeded(), F64)
    scale = scaled.tensors["scale"]
    factors = torch.stack([piece[:, 0] for piece in scale.split(task.sizes, dim=1)], dim=1)
    assert factors.unique().numel() == 2 * len(task.sizes)
    assert factors.log().abs().max() <= 2.0
    for piece, factor in zip(scale.split(task.sizes, dim=1), factors.unbind(1), strict=True):
        assert (piece == factor.unsqueeze(1)).all()
    batch = plain.next_batch()
    losses, grads = scaled.loss_and_grad(scaled.params, batch)
    plain_losses, plain_grads = plain.loss_and_grad(plain.params, batch)
    torch.testing.assert_close(losses, plain_losses)
    torch.testing.assert_close(grads, plain_grads * scale)


def test_normalized_weights_have_their_length_and_their_direction() -> None:
    task = small_mlp(hidden=(3,))
    plain = task.sample(2, seeded(), F64)
    run = WeightNormalization(task).sample(2, seeded(), F64)
    assert run.tensor_sizes == (192, 3, 30, 10, 4)
    batch = plain.next_batch()
    start = run.losses(run.params, batch)
    torch.testing.assert_close(start, plain.losses(plain.params, batch))
    # Longer directions are the same weights; longer lengths are longer weights.
    generator = seeded(1)
    longer = 0.5 + torch.rand(2, 4, generator=generator, dtype=F64)
    direction, length = run.params.split([task.dim, 4], dim=1)
    pieces = [p * longer[:, k : k + 1] for k, p in enumerate(direction.split(task.sizes, dim=1))]
    stretched = torch.cat([*pieces, length], dim=1)
    torch.testing.assert_close(run.losses(stretched, batch), start)
    lengthened = torch.cat([direction, length * longer], dim=1)
    expected = plain.losses(torch.cat(pieces, dim=1), batch)
    torch.testing.assert_close(run.losses(lengthened, batch), expected)
    # A gradient in the direction does not change the length, to first order.
    grads = run.loss_and_grad(run.params, batch)[1][:, : task.dim]
    for grad, piece in zip(
        grads.split(task.sizes, 1), plain.params.split(task.sizes, 1), strict=True
    ):
        assert (grad * piece).sum(dim=1).abs().max() < 1e-12


def test_tensors_that_start_at_zero_are_not_normalized() -> None:
    task = RandomMLP(features=3, hidden=(4,), points=20)
    run = WeightNormalization(task).sample(2, seeded(), F64)
    assert run.tensor_sizes == (12, 4, 8, 2, 2)
    batch = run.next_batch()
    assert torch.isfinite(run.loss_and_grad(run.params, batch)[1]).all()
    biases = torch.cat([torch.arange(12, 16), torch.arange(24, 26)])
    plain_grads = run.inner.loss_and_grad(run.inner.params, batch)[1]
    torch.testing.assert_close(
        run.loss_and_grad(run.params, batch)[1][:, biases], plain_grads[:, biases]
    )
    at_origin = WeightNormalization(Quadratic(dim=3)).sample(2, seeded())
    assert at_origin.tensor_sizes == (3,)


def test_reparametrised_tasks_are_held_out_as_they_are() -> None:
    task = small_mlp()
    for wrapped in (WeightNormalization(task), TensorScaling(task)):
        assert repr(wrapped.held_out()) == repr(task.held_out())


def flat(lists: dict[str, list[Task]]) -> list[Task]:
    return [task for tasks in lists.values() for task in tasks]


def test_held_out_families_share_nothing_with_those_to_train_on() -> None:
    training, held_out = families(), held_out_families()
    assert training.keys() >= ensemble().keys()
    assert not training.keys() & held_out.keys()
    assert not {repr(task) for task in flat(training)} & {repr(task) for task in flat(held_out)}
    configs = [task.config() for task in flat(families(small_problems=False))]
    assert not [config for config in configs if "signals" in str(config)]
    assert not [config for config in configs if config.get("cell") == "gru"]
    assert all(config.get("language", 0) == 0 for config in configs)
    for task in flat(held_out):
        config = task.config()
        assert config.get("data", "signals") == "signals"
        assert config.get("language", 1) > 0


@pytest.mark.parametrize("lists", [families(small_problems=False), held_out_families()])
def test_every_listed_task_can_be_trained_on(lists: dict[str, list[Task]]) -> None:
    for task in flat(lists):
        run = task.sample(2, seeded())
        losses, grads = run.loss_and_grad(run.params, run.next_batch())
        assert bool(losses.isfinite().all()), task
        assert bool((grads != 0).any(dim=1).all()), task


RECIPE = """
name = "many"
outer_steps = 9
[rule]
family = "hierarchical"
param_size = 3
tensor_size = 3
global_size = 3
[estimator]
unroll = 2
objective = "log"
[trainer]
horizon = [2, 4]
runs = 2
[validation]
every = 9
runs = 1
horizon = 2
[[tasks]]
kind = "families"
families = ["drawn_mlp"]
small_problems = false
weight = 4.0
[[tasks]]
kind = "drawn_mlp"
depth = [1, 2]
width = 4
activations = ["tanh", "elu"]
batch_size = 4
batch_sizes = [2, 6]
weight_normalization = true
tensor_scaling = 1
noise = 0.1
[[tasks]]
kind = "conv"
channels = [2]
kernel_size = 5
[[tasks]]
kind = "autoencoder"
hidden = [4]
loss = "cross_entropy"
sparse = 0.5
[[tasks]]
kind = "char_rnn"
cell = "gru"
hidden_size = 3
length = 4
language = 3
[[tasks]]
kind = "char_transformer"
width = 4
feedforward = 3
[[validation.tasks]]
kind = "families"
held_out = true
families = ["signal_mlp"]
"""


def chain(task: Task) -> list[str]:
    """Names of a task's transforms, from the outside in, and of the task inside."""
    inside = chain(task.task) if hasattr(task, "task") else []
    return [type(task).__name__, *inside]


def test_a_recipe_names_every_task_and_transform() -> None:
    trainer = build_trainer(parse_recipe(RECIPE), progress=False)
    assert [type(task).__name__ for task in trainer.tasks] == [
        "DrawnMLP",
        "DrawnBatchSize",
        "GradientNoise",
        "ConvClassification",
        "SparseGradients",
        "CharRNN",
        "CharTransformer",
    ]
    assert chain(trainer.tasks[2]) == [
        "GradientNoise",
        "TensorScaling",
        "WeightNormalization",
        "DrawnBatchSize",
        "DrawnMLP",
    ]
    assert trainer._starter.weights.tolist() == [2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    result = trainer.fit(9)
    assert result.skipped == 0
    assert result.best_step == 9


def test_recipes_find_mnist_for_families_too(tmp_path: Path) -> None:
    table = RECIPE.replace("small_problems = false", 'small_problems = false\ndata = "mnist"')
    with pytest.raises(FileNotFoundError, match=r"recipe 'many', tasks\[0\]: .*there is no file"):
        build_trainer(parse_recipe(table), data=tmp_path / "nowhere.npz")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("small_problems = false", "held_out = true", r"tasks\[0\] asks for held-out families"),
        ("held_out = true", "held_out = true\ndata = 'digits'", "take no data; leave it out"),
        ('["signal_mlp"]', '["mlp"]', r"validation.tasks\[0\]: families must be .* of signal_mlp"),
        ("small_problems = false", 'data = "signals"', "data = 'signals' is held out"),
        ("batch_sizes = [2, 6]", "batch_sizes = [2]", r"batch_sizes must be \[low, high\]"),
        ("batch_sizes = [2, 6]", "batch_sizes = [6, 2]", r"tasks\[1\]: .* must have low <= high"),
        ("tensor_scaling = 1", "tensor_scaling = -1", r"tasks\[1\]: tensor_scaling must be"),
        ("noise = 0.1", "noise = -0.1", r"tasks\[1\]: noise must be"),
        ("sparse = 0.5", "sparse = 1.5", r"tasks\[3\]: sparse must be"),
        ("weight_normalization = true", "weight_normalization = 1", "must be true or false, got 1"),
        ("width = 4\nact", "with = 4\nact", r"'tasks\[1\].with'; did you mean 'width'"),
        ("channels = [2]", "channels = [2.5]", r"tasks\[2\]: channels must be an int"),
        ("channels = [2]", "batch_size = 3\nlength = 2", r"unknown key 'tasks\[2\].length'"),
        ('cell = "gru"', 'cell = "lstm"', r"tasks\[4\]: cell must be one of"),
        ('kind = "conv"', 'kind = "cnn"', "kind must be one of quadratic, mlp, drawn_mlp, conv"),
    ],
)
def test_bad_recipes(old: str, new: str, message: str) -> None:
    assert old in RECIPE
    with pytest.raises(RecipeError, match=message):
        build_trainer(parse_recipe(RECIPE.replace(old, new, 1)))


def test_drawn_batches_need_a_task_on_minibatches() -> None:
    table = RECIPE.split("[validation]", maxsplit=1)[0]
    table += '[[tasks]]\nkind = "quadratic"\nbatch_sizes = [2, 3]'
    with pytest.raises(RecipeError, match=r"tasks\[0\]: batch_sizes: task must have a batch_size"):
        build_trainer(parse_recipe(table))
