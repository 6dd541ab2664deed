"""Parameters split over two processes are trained as whole ones are in one process."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from fastl2o import HierarchicalRule, LearnedOptimizer
from fastl2o import _ops_hierarchical_parts as parts
from tests import sharded_child as child
from tests.common import over_backends
from tests.ranks import needs_gloo, run_ranks
from tests.test_hierarchical_ops import Problem, close
from tests.test_hierarchical_rule import make

over_rules = pytest.mark.parametrize("name", list(child.RULES))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What two processes found, by scenario and rule."""
    return run_ranks("tests.sharded_child", tmp_path_factory.mktemp("ranks"), 2)


def whole(name: str, steps: int, **options: Any) -> LearnedOptimizer:
    """The same training in this process."""
    optimizer = LearnedOptimizer(
        child.whole_params(), child.seeded(name), lr=0.5, weight_decay=0.1, seed=7, **options
    )
    child.train(optimizer, lambda _, grad: grad, range(steps))
    return optimizer


def alike(found: list[Tensor], expected: list[Tensor]) -> None:
    """Equal up to the order in which a tensor's sums were added."""
    assert len(found) == len(expected)
    for mine, other in zip(found, expected, strict=True):
        assert mine.dtype == other.dtype
        close(mine.double(), other.double(), 2e-6)


@needs_gloo
@over_rules
def test_split_parameters_and_states_are_those_of_one_process(results: Any, name: str) -> None:
    optimizer = whole(name, child.STEPS)
    for _ in range(3):
        child.train(optimizer, lambda _, grad: grad, range(child.STEPS, child.STEPS + 1))
    alike(results["split"][name]["tensors"], child.states(optimizer))


@needs_gloo
@over_rules
def test_a_step_makes_one_small_reduction_where_tensors_talk(results: Any, name: str) -> None:
    """Of the tensors that are split and not empty: three of the five. NaN costs a second."""
    rule = child.seeded(name)
    sums = [3 * rule.num_sums] if isinstance(rule, HierarchicalRule) else []
    flags = [4]
    expected = {"pass": sums, "skip": flags + sums, "raise": flags + sums}
    assert results["split"][name]["counts"] == expected


@needs_gloo
@over_rules
def test_whole_and_split_checkpoints_load_into_split_parameters(results: Any, name: str) -> None:
    expected = child.states(whole(name, child.STEPS))
    for found in results["resumed"][name]["tensors"]:
        alike(found, expected)


@needs_gloo
@over_rules
def test_ranks_agree_on_a_gradient_that_holds_nan_in_one_part(results: Any, name: str) -> None:
    found = results["poisoned"][name]
    first, second = found["messages"]
    assert first == second
    assert "the gradient of parameter 2 of group 0" in first
    assert "holds NaN or Inf; nothing was changed" in first
    assert found["unchanged"]

    def poison(index: int, grad: Tensor) -> Tensor:
        if index == 2:
            grad[3, 6] = torch.nan
        return grad

    optimizer = whole(name, 2, nonfinite="skip")
    child.train(optimizer, poison, range(2, 3))
    alike(found["skipped"], child.states(optimizer))


@needs_gloo
@over_rules
def test_fsdp2_trains_as_one_process_and_splits_the_state(results: Any, name: str) -> None:
    model = child.digits_model()
    optimizer = LearnedOptimizer(model.parameters(), child.seeded(name), seed=7)
    losses = child.train_model(model, optimizer)
    found = results["fsdp"][name]
    assert found["losses"] == pytest.approx(losses, rel=1e-5)
    assert "Shard(dim=1)" in found["placements"]
    assert found["shape"] == optimizer.state[model[0].weight]["planes"].shape


@needs_gloo
@over_rules
def test_other_placements_are_refused(results: Any, name: str) -> None:
    found = results["refused"][name]
    assert re.search("parameter 0 of group 0.*Partial.*Accepted are Shard", found["partial"])
    assert re.search(r"its gradient as.*dim=1.*redistribute", found["grad"])


@over_backends
def test_the_two_halves_of_a_step_are_the_step(backend: str) -> None:
    """Tensors cut in two, the sums of both parts added, against the same in one piece."""
    import fastl2o

    rule = make(4, 5, 6, 3, dtype=torch.float32)
    mine = Problem(rule, [(33,), (8,)])
    other = Problem(rule, [(33,), (8,)])
    cuts = [20, 0]  # the second tensor lies on the second rank alone
    for _ in range(3):
        grads = mine.draw()
        scale = torch.tensor(4.0)
        with fastl2o.backend(backend):
            other.step(rule, [4 * g for g in grads], lr=[0.5, 2.0], weight_decay=[0.1, 0.0],
                       grad_scale=scale)  # fmt: skip
            sums: list[Tensor] = []
            for rank in (0, 1, 0, 1):  # first to learn the sums, then to step with their total
                _step_part(rule, mine, grads, cuts, rank, sums)
        for found, expected in zip(mine.everything(), other.everything(), strict=True):
            close(found.double(), expected.double(), 2e-6)


def _step_part(
    rule: HierarchicalRule,
    problem: Problem,
    grads: list[Tensor],
    cuts: list[int],
    rank: int,
    sums: list[Tensor],
) -> None:
    def part(tensor: Tensor, cut: int) -> Tensor:
        return (tensor[..., :cut] if rank == 0 else tensor[..., cut:]).clone(
            memory_format=torch.contiguous_format
        )

    trial, last = len(sums) < 2, len(sums) == 3
    params = [part(p, cut) for p, cut in zip(problem.params, cuts, strict=True)]
    planes = [part(p, cut) for p, cut in zip(problem.planes, cuts, strict=True)]
    above = [problem.tensors, problem.steps, [problem.hidden]]
    kept = above if last else [[t.clone() for t in tensors] for tensors in above]

    def reduce(found: Tensor) -> None:
        sums.append(found.clone())
        if not trial:
            found.copy_(sums[0] + sums[1])

    parts.step_(
        rule,
        params,
        [part(4 * g, cut) for g, cut in zip(grads, cuts, strict=True)],
        planes,
        kept[0],
        kept[1],
        kept[2][0],
        counts=[p.numel() for p in problem.params],
        reduce=reduce,
        lr=[0.5, 2.0],
        weight_decay=[0.1, 0.0],
        grad_scale=torch.tensor(4.0),
    )
    if trial:
        return
    for tensors, pieces in ((problem.params, params), (problem.planes, planes)):
        for tensor, piece, cut in zip(tensors, pieces, cuts, strict=True):
            (tensor[..., :cut] if rank == 0 else tensor[..., cut:]).copy_(piece)
