"""Networks as optimizees: loss and gradient are those of the torch module that a task names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from fastl2o import meta
from fastl2o.meta.tasks import Autoencoder, ConvClassification, Task
from tests.test_meta_tasks import F64, seeded
from tests.test_meta_trainer import small_rule

NETWORKS: dict[str, Any] = {
    "conv": ConvClassification("digits", channels=(3, 4), batch_size=5),
    "conv-wide": ConvClassification("digits", (2,), kernel_size=5, activation="tanh"),
    "conv-signals": ConvClassification("signals", (3, 2, 4), 7, "sigmoid", batch_size=5),
    "autoencoder": Autoencoder("digits", hidden=(6, 3), batch_size=5),
    "autoencoder-odds": Autoencoder("digits", (4,), "sigmoid", loss="cross_entropy"),
    "autoencoder-signals": Autoencoder("signals", (5,), "elu", batch_size=5),
}
over_networks = pytest.mark.parametrize("task", NETWORKS.values(), ids=NETWORKS.keys())


def module_loss(task: Any, module: torch.nn.Module, indices: Tensor) -> Tensor:
    """The loss that the task's documentation states, at the examples ``indices`` of one run."""
    images, labels = (tensor[indices] for tensor in task.examples())
    pixels = images.double() * task.images.scale
    outputs = module(pixels)
    if isinstance(task, ConvClassification):
        return F.cross_entropy(outputs, labels)
    if task.loss == "squared":
        return F.mse_loss(outputs, pixels)
    return F.binary_cross_entropy(outputs.sigmoid(), pixels)


@over_networks
def test_loss_and_gradient_are_the_modules(task: Any) -> None:
    run = task.sample(3, seeded(), F64)
    batch = run.next_batch()
    losses, grads = run.loss_and_grad(run.params, batch)
    torch.testing.assert_close(run.losses(run.params, batch), losses, rtol=1e-12, atol=0)
    for r in range(3):
        module = task.module().double()
        assert tuple(p.numel() for p in module.parameters()) == run.tensor_sizes
        vector_to_parameters(run.params[r], module.parameters())
        loss = module_loss(task, module, batch[0][r])
        loss.backward()
        grad = parameters_to_vector([p.grad for p in module.parameters()])
        torch.testing.assert_close(losses[r], loss.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(grads[r], grad, rtol=1e-9, atol=1e-14)


@over_networks
def test_runs_start_as_the_module_does(task: Any) -> None:
    params = task.sample(30, seeded()).params
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = torch.stack(
            [parameters_to_vector(task.module().parameters()).detach() for _ in range(30)]
        )
    sizes = task.sample(1, seeded()).tensor_sizes
    for mine, torchs in zip(params.split(sizes, dim=1), theirs.split(sizes, dim=1), strict=True):
        reach = torchs.abs().max().item()
        assert mine.abs().max().item() == pytest.approx(reach, rel=0.1, abs=1e-6)
        # Of means and deviations over n draws, some errors of 1 / sqrt(n).
        error = 4 * torchs.numel() ** -0.5 * reach
        assert mine.mean().item() == pytest.approx(torchs.mean().item(), abs=error)
        assert mine.std().item() == pytest.approx(torchs.std().item(), abs=error)


@over_networks
def test_runs_resume_from_their_state(task: Any) -> None:
    first, again, other = (task.sample(2, seeded(s)) for s in (3, 3, 4))
    assert torch.equal(first.params, again.params)
    assert not torch.equal(first.params, other.params)
    first.next_batch()
    other.load_state_dict(first.state_dict())
    mine, theirs = first.next_batch(), other.next_batch()
    for a, b in zip(
        first.loss_and_grad(first.params, mine),
        other.loss_and_grad(other.params, theirs),
        strict=True,
    ):
        assert torch.equal(a, b)


@over_networks
def test_full_batches_are_all_examples_of_the_split(task: Any) -> None:
    run = task.sample(1, seeded(), F64)
    module = task.module().double()
    vector_to_parameters(run.params[0], module.parameters())
    (everything,) = run.full_batch()
    assert len(everything[0].unique()) == len(task.examples()[1])
    expected = module_loss(task, module, everything[0])
    torch.testing.assert_close(run.losses(run.params, run.full_batch())[0], expected)


@over_networks
def test_held_out_is_data_that_meta_training_does_not_see(task: Any) -> None:
    other = task.held_out()
    assert type(other) is type(task)
    assert other.config() == {**task.config(), "split": "meta_valid"}
    assert other.held_out() is other


def test_rules_train_on_networks_to_second_order() -> None:
    tasks: list[Task] = list(NETWORKS.values())
    estimator = meta.TruncatedBPTT(2, objective="log", second_order=True)
    trainer = meta.MetaTrainer(small_rule(), tasks, estimator, horizon=2, runs=2, progress=False)
    assert trainer.fit(outer_steps=2 * len(tasks)).skipped == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConvClassification(channels=8), r"channels must be a sequence .* \(8, 16\)"),
        (lambda: ConvClassification(channels=()), "channels must be a sequence of at least one"),
        (lambda: ConvClassification(channels=(0,)), "channels must be an int of at least 1"),
        (lambda: ConvClassification(kernel_size=4), "kernel_size must be odd, got 4"),
        (lambda: ConvClassification(activation="swish"), "activation must be one of"),
        (lambda: ConvClassification(split="valid"), "split must be one of"),
        (lambda: Autoencoder(loss="bce"), "loss must be one of 'squared', 'cross_entropy'"),
        (lambda: Autoencoder("signals", loss="cross_entropy"), "signals are not bounded; use"),
        (lambda: Autoencoder(hidden=8), "hidden must be a sequence"),
    ],
)
def test_impossible_arguments_are_named(make: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()
