"""Gap to the test loss, and stability: exact on a mean, and on networks' data sets."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch.nn.functional import cross_entropy

from fastl2o import meta
from fastl2o.evaluate import (
    Entrant,
    Setting,
    check_generalisation,
    compare,
    generalise,
    threads,
)

RATE = 0.25


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small networks: two threads on a busy machine would wait for each other."""
    with threads(1):
        yield


class MeanRun:
    """Fit w to numbers by full-batch gradient descent on mean (w - z)^2 / 2."""

    tensor_sizes = (1,)
    test = torch.tensor([0.0, 6.0])

    def __init__(self, train: torch.Tensor, runs: int) -> None:
        self.train = train
        self.params = torch.zeros(runs, 1)
        self.generator = torch.Generator()

    def next_batch(self) -> tuple[()]:
        return ()

    def loss_and_grad(self, params, batch):
        residual = params - self.train
        return residual.square().mean(1) / 2, residual.mean(1, keepdim=True)

    def example_losses(self, params, held_out):
        return (params - (self.test if held_out else self.train)).square() / 2

    def twin(self, generator):
        return MeanRun(torch.tensor([1.0, 2.0, 3.0, 14.0]), len(self.params))


class MeanTask:
    def sample(self, num_runs: int, generator: torch.Generator) -> MeanRun:
        return MeanRun(torch.tensor([1.0, 2.0, 3.0, 6.0]), num_runs)


def on_means(horizon: int, **rates: float):
    makes = {name: Entrant.fixed("SGD", rate).at(rate) for name, rate in rates.items()}
    setting = Setting(horizon=horizon, runs=2)
    return generalise(MeanTask(), makes, setting, baseline=next(iter(rates)))


def test_losses_distance_and_loss_difference_of_a_mean_are_exact() -> None:
    result = on_means(6, sgd=RATE)
    (row,) = result.rows
    # w_t = (1 - (1 - rate)^t) mean(z): the means are 3 and 5.
    progress = [1 - (1 - RATE) ** t for t in result.points]
    ours, twins = [3 * p for p in progress], [5 * p for p in progress]
    for run in range(2):
        # Numbers 1, 2, 3, 6 have variance 3.5, the test numbers 0, 6 have mean 3 and variance 9.
        assert row.train_loss[run] == pytest.approx([((w - 3) ** 2 + 3.5) / 2 for w in ours])
        assert row.test_loss[run] == pytest.approx([((w - 3) ** 2 + 9) / 2 for w in ours])
        assert row.distance[run] == pytest.approx([2 * p for p in progress])
        normalised = [0.0] + [2 / math.sqrt(34)] * (len(progress) - 1)
        assert row.normalised_distance[run] == pytest.approx(normalised)
        differences = [
            sum(abs((w - z) ** 2 - (v - z) ** 2) / 2 for z in (0.0, 6.0)) / 2
            for w, v in zip(ours, twins, strict=True)
        ]
        assert row.loss_difference[run] == pytest.approx(differences)
    assert row.separated == 2


def test_gap_at_equal_training_loss_does_not_depend_on_the_speed() -> None:
    # Test minus training loss is 2.75 wherever w is.
    result = on_means(20, slow=0.05, fast=0.5)
    for row in result.rows:
        assert list(row.gap_at_equal_loss) == ["step 2", "step 5", "step 10", "step 20"]
        for gap in row.gap_at_equal_loss.values():
            assert gap == pytest.approx((2.75, 0.0, 2), abs=1e-6)


def test_a_loss_that_is_never_reached_has_no_gap() -> None:
    fast, slow = on_means(20, fast=0.5, slow=0.01).rows
    assert fast.gap_at_equal_loss["step 20"].reached == 2
    assert slow.gap_at_equal_loss["step 20"].reached == 0
    header, cells = on_means(20, fast=0.5, slow=0.01).cells()
    assert cells[1][header.index("gap at fast's loss of step 20")] == "not reached"


def digits(**options) -> meta.tasks.MLPClassification:
    return meta.tasks.MLPClassification(
        **{"hidden": (4,), "split": "meta_valid", "init_scale": 0.3, **options}
    )


def sample(runs: int, **options):
    return digits(**options).sample(runs, torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "task",
    [
        partial(meta.tasks.MLPClassification, hidden=(4,), init_scale=0.3),
        partial(meta.tasks.ConvClassification, channels=(3, 2)),
        partial(meta.tasks.Autoencoder, hidden=(3,)),
        partial(meta.tasks.Autoencoder, hidden=(3,), loss="cross_entropy"),
    ],
    ids=["mlp", "conv", "autoencoder", "autoencoder-cross-entropy"],
)
def test_example_losses_have_the_tasks_losses_as_means(task) -> None:
    run = task(split="meta_valid").sample(2, torch.Generator().manual_seed(0))
    runs = [run, run.twin(torch.Generator().manual_seed(1))]
    means = [one.example_losses(run.params, held_out=False).mean(1) for one in runs]
    for one, mean in zip(runs, means, strict=True):
        expected = one.losses(run.params, run.full_batch())
        torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-6)
    assert (means[0] != means[1]).all()


def test_held_out_losses_are_those_of_the_network_on_test_images() -> None:
    run = sample(2)
    task, network = run.task, run.task.module()
    torch.nn.utils.vector_to_parameters(run.params[1], network.parameters())
    # The first two test images are for twins.
    images, labels = task.images.test_images[2:] * task.images.scale, task.images.test_labels[2:]
    with torch.no_grad():
        expected = cross_entropy(network(images), labels, reduction="none")
    found = run.example_losses(run.params, held_out=True)
    assert found.shape == (2, 358)
    torch.testing.assert_close(found[1], expected, rtol=1e-5, atol=1e-6)


def test_twins_differ_in_one_example_which_is_a_test_image() -> None:
    run = sample(3)
    images, labels = (tensor.clone() for tensor in run.gather(run.full_batch()))
    twin = run.twin(torch.Generator().manual_seed(1))
    assert torch.equal(twin.params, run.params)
    twin_images, twin_labels = twin.gather(twin.full_batch())
    for row in range(3):
        differs = (images[row] != twin_images[row]).any(1).nonzero()
        assert differs.tolist() == [[twin.tensors["replaced"][row].item()]]
        position = differs.item()
        task = run.task
        assert torch.equal(
            twin_images[row, position], task.images.test_images[row] * task.images.scale
        )
        assert twin_labels[row, position] == task.images.test_labels[row]
        others = torch.arange(labels.shape[1]) != position
        assert torch.equal(labels[row, others], twin_labels[row, others])
    assert torch.equal(run.next_batch()[0], twin.next_batch()[0])  # same minibatches


def test_runs_come_apart_from_their_twins_once_they_meet_the_example() -> None:
    horizon, runs = 150, 12
    task = digits(batch_size=1)
    setting = Setting(horizon=horizon, runs=runs)
    (row,) = generalise(task, {"SGD": Entrant.fixed("SGD", 0.5).at(0.5)}, setting).rows
    run = task.sample(runs, torch.Generator().manual_seed(setting.seed))
    replaced = run.twin(torch.Generator().manual_seed(setting.tuning_seed)).tensors["replaced"]
    drawn = torch.cat([run.next_batch()[0] for _ in range(horizon)], dim=1)
    met = (drawn == replaced.unsqueeze(1)).any(1)
    assert 0 < int(met.sum()) < runs
    assert [distance[-1] > 0 for distance in row.distance] == met.tolist()
    assert [difference[-1] > 0 for difference in row.loss_difference] == met.tolist()
    assert row.separated == int(met.sum())
    assert row.gap_at_equal_loss == {}


def test_compare_reports_generalisation_beside_the_losses() -> None:
    setting = Setting(horizon=4, runs=2, tuning_runs=1, learning_rates=(0.1,))
    entrants = [Entrant.fixed("SGD", 1.0), Entrant.tuned("Adam")]
    result = compare(digits(), entrants, setting, generalisation=True)
    assert result.generalisation is not None
    assert [row.name for row in result.generalisation.rows] == ["SGD, lr 1", "Adam"]
    gap = result.generalisation.rows[1].gap_at_equal_loss["step 4"]
    last = [
        test[-1] - train[-1]
        for test, train in zip(
            result.generalisation.rows[1].test_loss,
            result.generalisation.rows[1].train_loss,
            strict=True,
        )
    ]
    assert gap.mean == pytest.approx(sum(last) / 2)
    assert "apart" in result.table()


@pytest.mark.parametrize(
    ("task", "runs", "message"),
    [
        (meta.tasks.Quadratic, 2, r"Quadratic\(.* has no training and test data"),
        (lambda: meta.tasks.RandomScaling(digits(), 1.0), 2, "without transforms"),
        (partial(digits, split="test"), 2, "choose split 'train', 'meta_train' or 'meta_valid'"),
        (digits, 360, "360 runs need a test image each.*there are 360: take fewer runs"),
    ],
)
def test_tasks_without_test_data_are_refused(task, runs: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_generalisation(task(), Setting(runs=runs))
