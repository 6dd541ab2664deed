"""Tasks: values and gradients against torch modules, batching, randomness, transforms, bad data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from fastl2o.meta.tasks import (
    DATA_VARIABLE,
    Autoencoder,
    BenchmarkFunction,
    Bowl,
    ConvClassification,
    DrawnMLP,
    LogObjective,
    MLPClassification,
    Norm,
    Quadratic,
    RandomMLP,
    RandomScaling,
    Rescaled,
    SoftmaxRegression,
    SumOf,
    Task,
    TensorScaling,
    VmapRun,
    WeightNormalization,
    WithConvex,
)

MNIST = Path(__file__).resolve().parents[2] / "shared" / "data" / "mnist.npz"
F64 = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_mlp(**options: Any) -> MLPClassification:
    settings = {"hidden": (6,), "batch_size": 9, "init_scale": 0.5, **options}
    return MLPClassification("digits", **settings)


TASKS = {
    "quadratic": Quadratic(dim=4, init_scale=0.3),
    "quadratic-uniform": Quadratic(dim=3, distribution="uniform"),
    "mlp": small_mlp(),
    "mlp-deep-tanh": small_mlp(hidden=(5, 4), activation="tanh"),
    "scaled": RandomScaling(Quadratic(dim=4, init_scale=1.0), bound=2.0),
    "convex": WithConvex(Quadratic(dim=3), num=5, bound=1.0),
    "rnnprop": WithConvex(RandomScaling(small_mlp(), 3.0), num=4, bound=1.0),
    "tensor-scaled": TensorScaling(small_mlp(), bound=2.0),
    "normalized": WeightNormalization(small_mlp()),
    "function": BenchmarkFunction("styblinski_tang"),
    "bowl": Bowl(condition=5.0, angle=45.0),
    "norm": Norm(dim=4, p=2.5),
    "softmax": SoftmaxRegression(features=4, batch_size=9, points=50),
    "random-mlp": RandomMLP(features=3, hidden=(4, 3), batch_size=9, points=50),
    "log": LogObjective(Bowl()),
    "rescaled": Rescaled(Norm(dim=3, p=1.5), factor=8.0),
    "sum": SumOf([RandomMLP(3, (4,), points=20), Quadratic(dim=3), SoftmaxRegression(2, points=9)]),
}
over_tasks = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS.keys())


def module_loss_and_grad(
    task: MLPClassification, params: Tensor, indices: Tensor
) -> tuple[Tensor, Tensor]:
    """One run's loss and gradient by an ordinary nn.Sequential and backward()."""
    images, labels = task.examples()
    network = task.module().double()
    vector_to_parameters(params, network.parameters())
    scale = 16 if task.data == "digits" else 255
    loss = F.cross_entropy(network(images[indices].double() / scale), labels[indices])
    loss.backward()
    return loss.detach(), parameters_to_vector([p.grad for p in network.parameters()])


@pytest.mark.parametrize("activation", ["sigmoid", "relu", "elu", "tanh"])
@pytest.mark.parametrize("hidden", [(20,), (7, 5), ()], ids=str)
def test_mlp_is_the_sequential_module(activation: str, hidden: tuple[int, ...]) -> None:
    task = small_mlp(hidden=hidden, activation=activation)
    run = task.sample(3, seeded(), F64)
    (indices,) = batch = run.next_batch()
    losses, grads = run.loss_and_grad(run.params, batch)
    for i in range(3):
        loss, grad = module_loss_and_grad(task, run.params[i], indices[i])
        torch.testing.assert_close(losses[i], loss, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(grads[i], grad, rtol=1e-10, atol=1e-14)


def test_quadratic_is_the_formula() -> None:
    run = Quadratic(dim=4, init_scale=1.0).sample(3, seeded(), F64)
    params = run.params.clone().requires_grad_()
    matrix, target = run.tensors["matrix"], run.tensors["target"]
    expected = torch.stack([(matrix[i] @ params[i] - target[i]).square().sum() for i in range(3)])
    expected.sum().backward()
    losses, grads = run.loss_and_grad(run.params, run.next_batch())
    torch.testing.assert_close(losses, expected.detach())
    torch.testing.assert_close(grads, params.grad)


@over_tasks
def test_gradient_is_that_of_the_losses(task: Task) -> None:
    run = task.sample(3, seeded(), F64)
    batch = run.next_batch()
    params = run.params.clone().requires_grad_()
    losses = run.losses(params, batch)
    (expected,) = torch.autograd.grad(losses.sum(), params)
    got_losses, got_grads = run.loss_and_grad(run.params, batch)
    torch.testing.assert_close(got_losses, losses.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(got_grads, expected, rtol=1e-10, atol=1e-14)


@over_tasks
def test_gradients_at_several_points_are_those_of_each(task: Task) -> None:
    run = task.sample(3, seeded(), F64)
    batch = run.next_batch()
    points = torch.stack([run.params, run.params + 0.1, 0.5 * run.params])
    losses, grads = run.loss_and_grad_at(points, batch)
    for point, loss, grad in zip(points, losses, grads, strict=True):
        expected_loss, expected_grad = run.loss_and_grad(point, batch)
        torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-14)
    assert losses.is_contiguous()
    assert grads.is_contiguous()


@pytest.mark.parametrize("name", ["quadratic", "mlp", "mlp-deep-tanh"])
def test_written_out_gradient_is_vmaps(name: str) -> None:
    run = TASKS[name].sample(4, seeded(), F64)
    batch = run.next_batch()
    for got, expected in zip(
        run.loss_and_grad(run.params, batch),
        VmapRun.loss_and_grad(run, run.params, batch),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", ["quadratic", "mlp"])
def test_batched_runs_equal_single_runs(name: str) -> None:
    run = TASKS[name].sample(4, seeded(), F64)
    batch = run.next_batch()
    losses, grads = run.loss_and_grad(run.params, batch)
    for i in range(4):
        state = run.state_dict()
        state["tensors"] = {key: tensor[i : i + 1] for key, tensor in state["tensors"].items()}
        single = TASKS[name].sample(1, seeded(1), F64)
        single.load_state_dict(state)
        alone = single.loss_and_grad(single.params, tuple(t[i : i + 1] for t in batch))
        torch.testing.assert_close(alone[0][0], losses[i], rtol=1e-12, atol=0)
        torch.testing.assert_close(alone[1][0], grads[i], rtol=1e-10, atol=1e-15)


@over_tasks
def test_runs_repeat_from_their_seed_and_their_state(task: Task) -> None:
    first, second, other = (task.sample(2, seeded(s)) for s in (3, 3, 4))
    assert torch.equal(first.params, second.params)
    for _ in range(3):
        first.next_batch()
    other.load_state_dict(first.state_dict())
    for _ in range(3):
        mine, theirs = first.next_batch(), other.next_batch()
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    again = other.loss_and_grad(other.params, theirs)
    for a, b in zip(first.loss_and_grad(first.params, mine), again, strict=True):
        assert torch.equal(a, b)


def test_every_evaluation_draws_a_fresh_minibatch_with_replacement() -> None:
    task = small_mlp(batch_size=3000)
    run = task.sample(2, seeded())
    (first,), (second,) = run.next_batch(), run.next_batch()
    assert first.shape == (2, 3000)
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])
    assert len(first[0].unique()) < 3000
    assert first.max() == len(task.examples()[1]) - 1


@pytest.mark.parametrize("init_scale", [0.01, 1.0, "torch"])
def test_initial_parameters(init_scale: float | str) -> None:
    task = small_mlp(hidden=(20,), init_scale=init_scale)
    params = task.sample(50, seeded()).params
    first_weights = params[:, : task.sizes[0]]
    expected = init_scale if isinstance(init_scale, float) else 1 / np.sqrt(3 * 64)
    assert first_weights.std().item() == pytest.approx(expected, rel=0.02)
    biases = params[:, task.sizes[0] : task.sizes[0] + task.sizes[1]]
    assert biases.std().item() == pytest.approx(expected, rel=0.1)
    if init_scale == "torch":
        assert first_weights.abs().max() <= 1 / 8


def test_random_scaling_reparametrises() -> None:
    task = Quadratic(dim=4, init_scale=1.0)
    plain = task.sample(3, seeded(), F64)
    scaled = RandomScaling(task, bound=2.0).sample(3, seeded(), F64)
    scale = scaled.tensors["scale"]
    assert scale.log().abs().max() <= 2.0
    assert scale.std() > 0.1
    losses, grads = scaled.loss_and_grad(scaled.params, ())
    plain_losses, plain_grads = plain.loss_and_grad(plain.params, ())
    torch.testing.assert_close(losses, plain_losses)
    torch.testing.assert_close(grads, plain_grads * scale)


def test_convex_part_is_clipped() -> None:
    run = WithConvex(Quadratic(dim=2), num=3).sample(1, seeded(), F64)
    params = torch.cat([run.params[:, :2], torch.tensor([[50.0, 0.1, -50.0]], dtype=F64)], dim=1)
    losses, grads = run.loss_and_grad(params, ())
    inner, _ = run.inner.loss_and_grad(params[:, :2].contiguous(), ())
    near = (0.1 - run.tensors["centre"][0, 1]) ** 2
    torch.testing.assert_close(losses, inner + (20 + near) / 3)
    assert grads[0, 2] == 0
    assert grads[0, 4] == 0
    assert grads[0, 3] != 0


def test_held_out_is_the_other_images_without_augmentation() -> None:
    task = small_mlp(split="meta_train", fraction=0.25)
    seen, unseen = task.examples(), task.held_out().examples()
    together = torch.cat([seen[0], unseen[0]])
    assert torch.equal(together, task.with_options(split="train").examples()[0])
    assert len(seen[1]) == round(len(together) * 0.25)
    assert len(task.with_options(split="test").examples()[1]) == 360
    wrapped = WithConvex(RandomScaling(task)).held_out()
    assert isinstance(wrapped, MLPClassification)
    assert wrapped.split == "meta_valid"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Quadratic(dim=0), "dim must be"),
        (lambda: Quadratic(dim=2.5), "dim must be an int"),
        (lambda: Quadratic(distribution="cauchy"), "'normal', 'uniform'; got 'cauchy'"),
        (lambda: Quadratic(init_scale=float("nan")), "init_scale must be"),
        (lambda: small_mlp(hidden=(0,)), "hidden must be"),
        (lambda: small_mlp(hidden=20), "hidden must be a sequence"),
        (lambda: small_mlp(activation="gelu"), "'sigmoid', 'relu', 'elu', 'tanh'; got 'gelu'"),
        (lambda: small_mlp(init_scale="xavier"), "at least 0, or 'torch'"),
        (lambda: small_mlp(fraction=1.0), "fraction must lie between 0 and 1"),
        (lambda: small_mlp(split="valid"), "'meta_train'"),
        (lambda: small_mlp(batch_size=True), "batch_size must be an int"),
        (lambda: RandomScaling(Quadratic(), bound=-1), "bound must be"),
        (lambda: RandomScaling("quadratic"), "task must be"),
        (lambda: WithConvex(Quadratic(), num=0), "num must be"),
        (lambda: Quadratic().sample(0, seeded()), "num_runs must be"),
        (
            lambda: (
                Quadratic()
                .sample(1, seeded())
                .load_state_dict(small_mlp().sample(1, seeded()).state_dict())
            ),
            "restore it into a run of the task",
        ),
    ],
)
def test_impossible_arguments_are_named(make: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def write_mnist(path: Path, **changes: Any) -> Path:
    """A tiny file with MNIST's arrays, some replaced (None: left out)."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        "train_images": rng.integers(0, 256, (30, 28, 28), dtype=np.uint8),
        "train_labels": rng.integers(0, 10, 30, dtype=np.uint8),
        "test_images": rng.integers(0, 256, (12, 28, 28), dtype=np.uint8),
        "test_labels": rng.integers(0, 10, 12, dtype=np.uint8),
        **changes,
    }
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


def test_mnist_from_path_directory_and_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_mnist(tmp_path / "mnist.npz")
    by_path = MLPClassification(path)
    assert by_path.dim == 15_910
    assert by_path.config()["data"] == "mnist"
    for task in (by_path, ConvClassification(path), Autoencoder(path), DrawnMLP(path)):
        assert task.held_out().images is by_path.images
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    for task in (MLPClassification(tmp_path), MLPClassification("mnist")):
        assert task.images is by_path.images
    monkeypatch.setenv(DATA_VARIABLE, str(path))
    assert MLPClassification("mnist").images is by_path.images
    run = by_path.sample(2, seeded(), F64)
    (indices,) = batch = run.next_batch()
    losses, _ = run.loss_and_grad(run.params, batch)
    loss, _ = module_loss_and_grad(by_path, run.params[0], indices[0])
    torch.testing.assert_close(losses[0], loss)
    keras = tmp_path / "keras.npz"
    with np.load(path) as arrays:
        np.savez(
            keras,
            x_train=arrays["train_images"],
            y_train=arrays["train_labels"],
            x_test=arrays["test_images"],
            y_test=arrays["test_labels"],
        )
    assert torch.equal(MLPClassification(keras).examples()[0], by_path.examples()[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_labels": None}, "it holds the arrays"),
        ({"train_images": np.zeros((30, 32, 32), np.uint8)}, r"of shape \(30, 32, 32\)"),
        ({"train_images": np.zeros((30, 28, 28), np.float32)}, "train_images is float32"),
        ({"train_labels": np.zeros(29, np.uint8)}, "train_labels is uint8 of shape"),
        ({"test_labels": np.full(12, 10, np.uint8)}, "label 0..9"),
        ({"test_labels": np.zeros(12)}, "test_labels is float64"),
        ({"train_images": np.array([[1, "x"]], dtype=object)}, "holds Python objects, which are"),
    ],
)
def test_data_that_is_not_mnist(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write_mnist(tmp_path / "other.npz", **changes)
    with pytest.raises(ValueError, match=message) as caught:
        MLPClassification(path)
    assert str(path) in str(caught.value)
    assert "pass the path of an mnist.npz" in str(caught.value)
    assert "pickle" not in str(caught.value)


def test_files_that_are_no_archive(tmp_path: Path) -> None:
    whole = write_mnist(tmp_path / "whole.npz").read_bytes()
    for name, content in {"text": b"hello", "empty": b"", "cut": whole[: len(whole) // 2]}.items():
        path = tmp_path / f"{name}.npz"
        path.write_bytes(content)
        with pytest.raises(ValueError, match="file of arrays: it is no zip archive"):
            MLPClassification(path)
    array = tmp_path / "array.npy"
    np.save(array, np.zeros(3))
    with pytest.raises(ValueError, match="file of arrays"):
        MLPClassification(array)


def test_missing_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    with pytest.raises(FileNotFoundError, match="FASTL2O_DATA is not set; pass the path"):
        MLPClassification("mnist")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        MLPClassification(tmp_path / "nowhere.npz")
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    with pytest.raises(FileNotFoundError, match="FASTL2O_DATA = "):
        MLPClassification("mnist")


@pytest.mark.skipif(not MNIST.is_file(), reason="MNIST is not at ../shared/data/mnist.npz")
def test_the_real_mnist() -> None:
    task = MLPClassification(MNIST)
    assert [
        len(task.with_options(split=s).examples()[1]) for s in ("train", "meta_train", "test")
    ] == [
        60_000,
        30_000,
        10_000,
    ]
    run = task.sample(2, seeded())
    losses, _ = run.loss_and_grad(run.params, run.next_batch())
    # Parameters of 0.01 give nearly equal odds: ln 10.
    torch.testing.assert_close(losses, torch.full((2,), float(np.log(10))), rtol=0.01, atol=0)
