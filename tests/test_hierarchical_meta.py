"""Meta-training of the hierarchical rule: learned starts, second order, tasks' tensors."""

from __future__ import annotations

import pytest
import torch

from fastl2o import meta
from tests.test_hierarchical_rule import F64, make


@pytest.mark.parametrize("objective", ["sum", "log"])
def test_meta_gradient_reaches_the_learned_starts(objective: str) -> None:
    rule = make(4, 5, 6, 3)
    task = meta.tasks.RandomMLP(features=5, hidden=(4,), batch_size=8, points=50)
    results = {}
    for path in ("fused", "autograd"):
        progress = meta.start(rule, task.sample(2, torch.Generator().manual_seed(1), F64))
        estimator = meta.TruncatedBPTT(unroll=4, objective=objective, path=path)
        results[path] = [estimator.window(rule, progress) for _ in range(2)]
    for fused, autograd in zip(results["fused"], results["autograd"], strict=True):
        torch.testing.assert_close(fused.gradient, autograd.gradient)
        torch.testing.assert_close(fused.losses, autograd.losses)
    first, second = (rule.unflatten(result.gradient) for result in results["fused"])
    assert bool(first["param_start"].any())
    assert not second["param_start"].any()


def test_second_order_is_another_gradient() -> None:
    rule = make(4, 5, 6, 3)
    task = meta.tasks.Quadratic(dim=3)
    found = []
    for second_order in (False, True):
        progress = meta.start(rule, task.sample(2, torch.Generator().manual_seed(1), F64))
        estimator = meta.TruncatedBPTT(unroll=4, second_order=second_order)
        found.append(estimator.window(rule, progress).gradient)
    assert bool(found[1].isfinite().all())
    assert not torch.allclose(found[0], found[1])


@pytest.mark.parametrize(
    ("task", "sizes"),
    [
        (meta.tasks.Quadratic(dim=3), (3,)),
        (meta.tasks.RandomMLP(features=5, hidden=(4,), points=50), (20, 4, 8, 2)),
        (meta.tasks.MLPClassification("digits", hidden=(20,)), (1280, 20, 200, 10)),
        (meta.tasks.WithConvex(meta.tasks.Quadratic(dim=3), num=4), (3, 4)),
        (
            meta.tasks.SumOf([meta.tasks.Bowl(), meta.tasks.SoftmaxRegression(features=3)]),
            (2, 6, 2),
        ),
    ],
    ids=repr,
)
def test_tasks_name_the_sizes_of_their_tensors(
    task: meta.tasks.Task, sizes: tuple[int, ...]
) -> None:
    run = meta.tasks.GradientNoise(task).sample(2, torch.Generator().manual_seed(0))
    assert run.tensor_sizes == sizes
    assert sum(sizes) == run.dim
