"""Optimizers that step at the same time in several threads: the same bits as one after another."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from fastl2o import LearnedOptimizer
from fastl2o.rules import HierarchicalRule, LSTMRule, RNNPropRule, Rule
from tests.optimizers import assert_same_bits

THREADS, STEPS = 4, 30


def _train(rule: Rule, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    params = [torch.randn(n, generator=generator).requires_grad_() for n in (1, 7, 300)]
    optimizer = LearnedOptimizer(params, rule)
    for _ in range(STEPS):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return [*params, *(entry["planes"] for entry in optimizer.state.values() if "planes" in entry)]


@pytest.mark.parametrize("make", [LSTMRule, RNNPropRule, HierarchicalRule])
@pytest.mark.parametrize("shared", [True, False], ids=["one rule", "a rule each"])
def test_threads_step_as_they_would_alone(make: Callable[[], Rule], shared: bool) -> None:
    def rule() -> Rule:
        made = make()
        made.reset_parameters(torch.Generator().manual_seed(0))
        return made

    alone = [_train(rule(), seed) for seed in range(THREADS)]
    rules = [rule()] * THREADS if shared else [rule() for _ in range(THREADS)]
    together: list[list[torch.Tensor]] = [[] for _ in range(THREADS)]
    start = threading.Barrier(THREADS)

    def work(index: int) -> None:
        start.wait()
        together[index] = _train(rules[index], index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, expected in zip(together, alone, strict=True):
        assert_same_bits(ours, expected)
