"""The ensemble of small problems: known minima, transforms, and that rules train on all of it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import fastl2o
from fastl2o import meta
from fastl2o.meta.tasks import (
    BenchmarkFunction,
    Bowl,
    GradientNoise,
    LogObjective,
    Norm,
    Quadratic,
    RandomMLP,
    Rescaled,
    SoftmaxRegression,
    SparseGradients,
    SumOf,
    Task,
    ensemble,
)

F64 = torch.float64

# Minimisers and minima from the functions' literature; Michalewicz with m = 5 by a fine grid.
MINIMA = {
    "ackley": ((0.0, 0.0), 0.0),
    "beale": ((3.0, 0.5), 0.0),
    "booth": ((1.0, 3.0), 0.0),
    "branin": ((math.pi, 2.275), 0.397887),
    "log_sum_exp": ((-math.log(2) / 2, 0.0), math.log(2 * math.sqrt(2)) - 0.1),
    "matyas": ((0.0, 0.0), 0.0),
    "michalewicz": ((2.185312, 1.570796), 0.193377),
    "rosenbrock": ((1.0, 1.0), 0.0),
    "styblinski_tang": ((-2.903534, -2.903534), 80 - 2 * 39.16617),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", MINIMA)
def test_functions_have_their_known_minima(name: str) -> None:
    run = BenchmarkFunction(name).sample(500, seeded(), F64)
    point, value = MINIMA[name]
    found = run.losses(torch.tensor([point], dtype=F64).expand(500, 2), ())[0]
    tolerance = 1e-5
    assert found.item() == pytest.approx(value, abs=tolerance)
    assert (run.losses(run.params, ()) >= value - tolerance).all()


def test_bowls_are_turned_about_the_origin() -> None:
    run = Bowl(condition=5.0, angle=90.0).sample(2, seeded(), F64)
    at = torch.tensor([[0.0, 2.0], [2.0, 0.0]], dtype=F64)
    expected = torch.tensor([10.0, 2.0], dtype=F64)
    torch.testing.assert_close(run.losses(at, ()), expected, rtol=1e-12, atol=1e-12)


def test_norm_is_the_vector_norm() -> None:
    run = Norm(dim=5, p=3.0).sample(2, seeded(), F64)
    residual = torch.einsum("rij,rj->ri", run.tensors["matrix"], run.params) - run.tensors["target"]
    expected = torch.linalg.vector_norm(residual, ord=3, dim=1)
    torch.testing.assert_close(run.losses(run.params, ()), expected, rtol=1e-9, atol=0.0)


def test_softmax_regression_is_the_linear_model() -> None:
    task = SoftmaxRegression(features=3, batch_size=7, points=40, weight_decay=0.1)
    run = task.sample(2, seeded(), F64)
    (indices,) = batch = run.next_batch()
    losses = run.losses(run.params, batch)
    for r in range(2):
        weight, bias = run.params[r, :6].view(2, 3), run.params[r, 6:]
        logits = run.tensors["inputs"][r, indices[r]] @ weight.T + bias
        labels = run.tensors["labels"][r, indices[r]]
        expected = F.cross_entropy(logits, labels) + 0.1 * run.params[r].square().mean()
        torch.testing.assert_close(losses[r], expected, rtol=1e-12, atol=0.0)


def test_classes_lie_apart_as_asked() -> None:
    run = SoftmaxRegression(features=6, separation=4.0, points=4000).sample(3, seeded())
    inputs, labels = run.tensors["inputs"], run.tensors["labels"]
    for r in range(3):
        centres = [inputs[r][labels[r] == c].mean(dim=0) for c in (0, 1)]
        distance = torch.linalg.vector_norm(centres[1] - centres[0]).item()
        assert distance == pytest.approx(4.0, abs=0.25)


def test_random_networks_label_both_classes_alike() -> None:
    run = RandomMLP(features=5, hidden=(4, 4), points=200).sample(4, seeded())
    share = run.tensors["labels"].double().mean(dim=1)
    torch.testing.assert_close(share, torch.full((4,), 0.5, dtype=F64), rtol=0.0, atol=0.01)


def test_noise_is_of_its_size_and_repeats_with_the_batch() -> None:
    inner = Bowl()
    run = GradientNoise(inner, sd=0.5).sample(400, seeded(), F64)
    batch = run.next_batch()
    losses, grads = run.loss_and_grad(run.params, batch)
    again, other = run.loss_and_grad(run.params, batch)[1], run.next_batch()
    assert torch.equal(grads, again)
    assert not torch.equal(grads, run.loss_and_grad(run.params, other)[1])
    clean = inner.sample(400, seeded(), F64).loss_and_grad(run.params, ())
    assert torch.equal(losses, clean[0])
    assert (grads - clean[1]).std().item() == pytest.approx(0.5, rel=0.1)


def test_sparse_gradients_keep_their_share_of_entries() -> None:
    run = SparseGradients(Quadratic(dim=50), fraction=0.9).sample(40, seeded())
    grads = run.loss_and_grad(run.params, run.next_batch())[1]
    assert (grads != 0).double().mean().item() == pytest.approx(0.1, abs=0.02)


def test_log_and_scale_change_losses_as_they_say() -> None:
    at = torch.tensor([[1.0, 2.0]])
    plain = Bowl().sample(1, seeded())
    value = plain.losses(at, ())
    log = LogObjective(Bowl()).sample(1, seeded()).losses(at, ())
    torch.testing.assert_close(log, torch.log((value + 1e-6) / 1e-6))
    scaled = Rescaled(Bowl(), factor=3.0).sample(1, seeded()).losses(at, ())
    torch.testing.assert_close(scaled, 3 * value)


def test_sum_adds_up_tasks_on_their_own_coordinates() -> None:
    parts = [Quadratic(dim=3), Bowl(2.0), SoftmaxRegression(2, points=9, batch_size=4)]
    run = SumOf(parts).sample(2, seeded(), F64)
    batch = run.next_batch()
    losses, grads = run.loss_and_grad(run.params, batch)
    generator = seeded()
    runs = [part.sample(2, generator, F64) for part in parts]
    values = [
        part.loss_and_grad(piece, own)
        for part, piece, own in zip(
            runs, run.params.split([3, 2, 6], dim=1), ((), (), batch), strict=True
        )
    ]
    torch.testing.assert_close(losses, sum(value for value, _ in values))
    torch.testing.assert_close(grads, torch.cat([grad for _, grad in values], dim=1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BenchmarkFunction("rastrigin"), "name must be one of 'ackley'"),
        (lambda: Bowl(condition=0.0), "condition must be a finite number above 0"),
        (lambda: Norm(p=0.5), "p must be a finite number of at least 1"),
        (lambda: SparseGradients(Bowl(), 1.0), "fraction must be .* below 1"),
        (lambda: GradientNoise(3), "task must be a fastl2o.meta.tasks.Task"),  # type: ignore[arg-type]
        (lambda: SumOf([]), "tasks must be a sequence of at least one task"),
        (lambda: RandomMLP(hidden=(0,)), "hidden must be an int of at least 1"),
    ],
)
def test_impossible_arguments_are_named(make: object, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("networks", [False, True])
def test_a_rule_trains_on_every_problem_of_the_ensemble(networks: bool) -> None:
    families = ensemble(networks)
    assert ("mlp" in families) == networks
    tasks: list[Task] = [task for family in families.values() for task in family]
    assert len({repr(task) for task in tasks}) == len(tasks)
    rule = fastl2o.LSTMRule(hidden_size=3, num_layers=1, output_scale=0.01)
    for task in tasks:
        run = task.sample(2, seeded())
        losses, grads = run.loss_and_grad(run.params, run.next_batch())
        assert (losses >= 0).all(), task
        assert torch.isfinite(grads).all(), task
    trainer = meta.MetaTrainer(
        rule, tasks, meta.TruncatedBPTT(3, objective="log"), horizon=3, runs=2, progress=False
    )
    result = trainer.fit(outer_steps=20)
    assert result.skipped == 0


def test_held_out_problems_are_none_of_the_published() -> None:
    published, held_out = meta.tasks.ensemble(), meta.tasks.ensemble(held_out=True)
    assert list(published) == list(held_out)
    for family, tasks in held_out.items():
        known = {repr(task) for task in published[family]}
        shared = [task for task in tasks if repr(task) in known]
        # Test functions of two variables have no size, and two sums are of those alone.
        assert len(shared) == {"function": len(tasks), "sum": 2}.get(family, 0)
        for task in tasks:
            run = task.sample(2, seeded())
            losses, grads = run.loss_and_grad(run.params, run.next_batch())
            assert bool(losses.isfinite().all())
            assert bool((losses >= 0).all())
            assert grads.shape == run.params.shape
