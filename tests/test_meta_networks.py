"""Networks as optimizees: loss and gradient are those of the torch module that a task names."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from fastl2o.meta.tasks import Autoencoder, CharRNN, CharTransformer, ConvClassification
from fastl2o.meta.tasks._text import ALPHABET, TextTask, draw_text, load_text
from tests.test_meta_tasks import F64, seeded

NETWORKS: dict[str, Any] = {
    "conv": ConvClassification("digits", channels=(3, 4), batch_size=5),
    "conv-wide": ConvClassification("digits", (2,), kernel_size=5, activation="tanh"),
    "conv-signals": ConvClassification("signals", (3, 2, 4), 7, "sigmoid", batch_size=5),
    "autoencoder": Autoencoder("digits", hidden=(6, 3), batch_size=5),
    "autoencoder-odds": Autoencoder("digits", (4,), "sigmoid", loss="cross_entropy"),
    "autoencoder-signals": Autoencoder("signals", (5,), "elu", batch_size=5),
    "rnn": CharRNN(hidden_size=5, length=6, batch_size=4, fraction=0.01),
    "gru": CharRNN("gru", 4, length=5, batch_size=4, language=1, fraction=0.01),
    "transformer": CharTransformer(8, 2, 1, 6, length=5, batch_size=3, fraction=0.01),
    "transformer-deep": CharTransformer(6, 3, 2, 9, length=7, batch_size=3, fraction=0.01),
}
over_networks = pytest.mark.parametrize("task", NETWORKS.values(), ids=NETWORKS.keys())


def module_loss(task: Any, module: torch.nn.Module, indices: Tensor) -> Tensor:
    """The loss that the task's documentation states, at the examples ``indices`` of one run."""
    if isinstance(task, TextTask):
        windows = torch.stack([task.examples()[i : i + task.length + 1] for i in indices])
        return F.cross_entropy(module(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
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
    if isinstance(task, TextTask):
        # Windows side by side: every character but the first, and the last if no window is left.
        missing = len(task.examples()) - 1 - everything.shape[1] * task.length
        assert 0 <= missing < task.length
        assert (everything[0].diff() == task.length).all()
    else:
        assert len(everything[0].unique()) == len(task.examples()[1])
    expected = module_loss(task, module, everything[0])
    torch.testing.assert_close(run.losses(run.params, run.full_batch())[0], expected)


@over_networks
def test_held_out_is_data_that_meta_training_does_not_see(task: Any) -> None:
    other = task.held_out()
    assert type(other) is type(task)
    assert other.config() == {**task.config(), "split": "meta_valid"}
    assert other.held_out() is other


@over_networks
def test_second_derivatives_are_symmetric(task: Any) -> None:
    # Meta-gradients of second order go through a second backward.
    run = task.sample(2, seeded(), F64)
    params, batch = run.params.clone().requires_grad_(), run.next_batch()
    left, right = torch.randn(2, 2, run.dim, generator=seeded(1), dtype=F64)
    (grads,) = torch.autograd.grad(run.losses(params, batch).sum(), params, create_graph=True)
    (right_product,) = torch.autograd.grad(grads, params, right, retain_graph=True)
    (left_product,) = torch.autograd.grad(grads, params, left)
    first, second = (left * right_product).sum(dim=1), (right * left_product).sum(dim=1)
    assert first.abs().min() > 1e-6
    torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["rnn", "gru", "transformer-deep"])
def test_a_character_is_predicted_from_those_before_it(name: str) -> None:
    module = NETWORKS[name].module()
    window = NETWORKS[name].examples()[:5].unsqueeze(0)
    other = window.clone()
    other[0, 3] = (window[0, 3] + 1) % len(ALPHABET)
    change = (module(other) - module(window)).abs().amax(dim=2)[0]
    assert (change[:3] == 0).all()
    assert (change[3:] > 0).all()


def test_text_is_the_languages_own() -> None:
    assert draw_text(2000) == draw_text(3000)[:2000]
    assert draw_text(2000) != draw_text(2000, language=1)
    train, test = load_text(0)
    assert (len(train), len(test)) == (90_000, 10_000)
    assert "".join(ALPHABET[place] for place in train[:2000].tolist()) == draw_text(2000)
    assert len(train.unique()) == len(ALPHABET) == 29


def test_verbs_agree_with_the_noun_before_them() -> None:
    sentences = draw_text(30_000).split(". ")[:-1]
    assert len(sentences) > 500
    for sentence in sentences:
        # Determiner, perhaps an adjective, noun, verb: so one of these pairs is noun and verb.
        words = sentence.replace(",", "").split()[1:4]
        assert any(
            verb.endswith("s" if noun[-1] in "aeiou" else "n") for noun, verb in pairwise(words)
        ), sentence


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
        (lambda: CharRNN("lstm"), "cell must be one of 'tanh', 'gru'; got 'lstm'"),
        (lambda: CharRNN(hidden_size=0), "hidden_size must be an int of at least 1"),
        (lambda: CharRNN(language=-1), "language must be an int of at least 0"),
        (lambda: CharRNN(length=10_000, split="test").examples(), "choose a shorter length"),
        (lambda: CharTransformer(width=9), "width must be a multiple of num_heads = 2, got 9"),
        (lambda: CharTransformer(num_layers=0), "num_layers must be an int of at least 1"),
    ],
)
def test_impossible_arguments_are_named(make: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()
