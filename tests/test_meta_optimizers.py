"""Outer optimizers and the averaging of meta-parameters."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastl2o
from fastl2o import meta
from fastl2o.meta.tasks import Quadratic
from fastl2o.rules import Rule


def make_rule(seed: int = 0, num_layers: int = 1) -> Rule:
    rule = fastl2o.LSTMRule(hidden_size=4, num_layers=num_layers, preprocess="log_sign")
    rule.reset_parameters(torch.Generator().manual_seed(seed))
    return rule


def make_trainer(rule: Rule, **options: Any) -> meta.MetaTrainer:
    return meta.MetaTrainer(
        rule,
        tasks=[Quadratic(dim=3)],
        estimator=meta.TruncatedBPTT(4),
        horizon=12,
        runs=4,
        progress=False,
        **options,
    )


def give_gradients(rule: Rule, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in rule.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def values(rule: Rule) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in rule.parameters()]


@pytest.mark.parametrize("num_layers", [0, 2])
def test_muon_adam_is_muon_on_matrices_and_adam_on_the_rest(num_layers: int) -> None:
    ours, theirs = make_rule(num_layers=num_layers), make_rule(num_layers=num_layers)
    optimizer = meta.MuonAdam(ours.parameters(), lr=0.03, adam_lr=0.01, betas=(0.8, 0.99))
    matrices = [p for p in theirs.parameters() if p.ndim == 2 and min(p.shape) > 1]
    assert len(matrices) == 2 * num_layers
    others = [p for p in theirs.parameters() if all(p is not m for m in matrices)]
    expected: list[torch.optim.Optimizer] = [torch.optim.Adam(others, lr=0.01, betas=(0.8, 0.99))]
    if matrices:
        expected.append(
            torch.optim.Muon(matrices, lr=0.03, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        )
    for seed in range(3):
        for rule in (ours, theirs):
            give_gradients(rule, seed)
        optimizer.step()
        for part in expected:
            part.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_muon_adam_continues_from_its_state_dict() -> None:
    rules = [make_rule(), make_rule()]
    optimizers = [meta.MuonAdam(rule.parameters(), lr=0.03) for rule in rules]
    for seed in range(2):
        give_gradients(rules[0], seed)
        optimizers[0].step()
    rules[1].load_state_dict(rules[0].state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for rule, optimizer in zip(rules, optimizers, strict=True):
        give_gradients(rule, 9)
        optimizer.step()
    for a, b in zip(*map(values, rules), strict=True):
        assert torch.equal(a, b)


def test_a_copied_muon_adam_takes_the_same_steps() -> None:
    """It had lost its parts, and trainings with imitation, which copy the optimizer, failed."""
    rule = make_rule()
    optimizer = meta.MuonAdam(rule.parameters(), lr=0.03)
    for seed in range(2):
        give_gradients(rule, seed)
        optimizer.step()
    results = []
    for mine in (copy.deepcopy(optimizer), optimizer):
        for group in mine.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.ones_like(parameter)
        mine.step()
        results.append([p.detach().clone() for g in mine.param_groups for p in g["params"]])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    imitating = make_trainer(
        rule, optimizer=optimizer, imitation=meta.Imitation(probability=0.5), seed=0
    )
    assert imitating.fit(6).skipped == 0


def test_average_is_an_exponential_moving_average_of_the_updates() -> None:
    rule = make_rule()
    trainer = make_trainer(rule, average=0.75)
    expected: list[Tensor] = []
    for step in range(1, 5):
        trainer.fit(outer_steps=step)
        now = values(rule)
        if step == 1:
            expected = now
        expected = [a.lerp(b, 0.25) for a, b in zip(expected, now, strict=True)]
    for a, b in zip(trainer.best_rule.parameters(), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert not torch.equal(trainer.best_rule.flat_parameters(), rule.flat_parameters())


def test_validation_scores_the_average() -> None:
    rule = make_rule()
    validation = meta.Validation(every=3, runs=2, horizon=12, seed=5)
    trainer = make_trainer(rule, average=0.9, validation=validation)
    result = trainer.fit(outer_steps=3)
    score = validation.score(trainer.best_rule, trainer.tasks, 12, torch.float32)
    assert result.best_score == score
    assert score != validation.score(rule, trainer.tasks, 12, torch.float32)


def test_resumed_training_with_average_and_muon_has_the_same_bits(tmp_path: Path) -> None:
    def fit(*stops: int, directory: Path | None) -> Rule:
        for stop in stops:
            rule = make_rule()
            optimizer = meta.MuonAdam(rule.parameters(), lr=0.02)
            trainer = make_trainer(
                rule, optimizer=optimizer, average=0.5, checkpoint_dir=directory, groups=2
            )
            trainer.fit(outer_steps=stop)
        return trainer.best_rule

    whole = fit(9, directory=None)
    parts = fit(4, 9, directory=tmp_path)
    assert torch.equal(whole.flat_parameters(), parts.flat_parameters())


@pytest.mark.parametrize("average", [-0.1, 1.0, float("nan")])
def test_impossible_average_is_named(average: float) -> None:
    with pytest.raises(ValueError, match="average must be a finite number of at least 0 and below"):
        make_trainer(make_rule(), average=average)


def test_recipe_with_muon_and_average() -> None:
    text = """
name = "small"
outer_steps = 2
[rule]
family = "lstm"
hidden_size = 4
[[tasks]]
kind = "quadratic"
[trainer]
average = 0.9
[optimizer]
name = "muon_adam"
lr = 0.01
momentum = 0.9
"""
    from fastl2o.meta.recipe import build_trainer, parse_recipe

    trainer = build_trainer(parse_recipe(text), progress=False)
    assert isinstance(trainer.optimizer, meta.MuonAdam)
    assert trainer.optimizer.param_groups[0]["momentum"] == 0.9
    assert trainer.fit(outer_steps=2).outer_steps == 2
