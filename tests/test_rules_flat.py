"""The vector of the meta-parameters that ops read, after every way to change them."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model

from fastl2o import HierarchicalRule

CPU = torch.device("cpu")


def test_the_flat_buffer_follows_every_way_to_change_meta_parameters() -> None:
    rule = HierarchicalRule(4, 4, 4, 2)
    square = next(p for p in rule.parameters() if p.dim() == 2 and p.shape[0] == p.shape[1] > 1)

    def exchange(data: torch.Tensor) -> None:
        square.data = data

    changes = (
        lambda: square.data.add_(1),  # leaves no trace in a version counter
        lambda: exchange(square.data.clone() * 2),
        lambda: exchange(square.data.t()),  # the same address, other strides
        lambda: exchange(square.data.contiguous()),
        lambda: rule.double(),
        lambda: rule.float(),
    )
    for change in (lambda: None, *changes):
        change()
        expected = torch.cat([p.detach().float().reshape(-1) for p in rule.parameters()])
        for _ in range(2):
            assert torch.equal(rule.flat_buffer(CPU), expected)
        assert torch.equal(rule.flat_buffer(CPU, torch.float64), expected.double())
        assert torch.equal(rule.flat_buffer(CPU), expected)


def _current(rule: HierarchicalRule) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in rule.parameters()])


def test_the_flat_buffer_follows_arrays_that_share_the_meta_parameters_memory() -> None:
    rule = HierarchicalRule(4, 4, 4, 2)
    array = rule.direction.detach().numpy()
    rule.flat_buffer(CPU)
    array[0] = 7.0
    assert rule.direction[0] == 7.0
    assert torch.equal(rule.flat_buffer(CPU), _current(rule))


def test_the_flat_buffer_follows_meta_parameters_that_exchange_their_memory() -> None:
    rule = HierarchicalRule(4, 4, 4, 2)
    rule.flat_buffer(CPU)
    one, other = rule.param_start, rule.tensor_start
    one.data, other.data = other.data, one.data
    before = _current(rule)
    for _ in range(2):
        assert torch.equal(rule.flat_buffer(CPU), before)
        assert torch.equal(_current(rule), before)


def test_the_flat_buffer_leaves_meta_parameters_in_shared_memory() -> None:
    rule = HierarchicalRule(4, 4, 4, 2)
    rule.flat_buffer(CPU)
    rule.share_memory()
    rule.flat_buffer(CPU)
    assert all(p.is_shared() for p in rule.parameters())


def test_the_flat_buffer_copies_nothing_where_meta_parameters_are_views_of_it() -> None:
    rule = HierarchicalRule(4, 4, 4, 2)
    flat = rule.flat_buffer(CPU)
    with torch.no_grad():
        rule.direction.fill_(3.0)
    assert torch.equal(flat, _current(rule))
    assert rule.flat_buffer(CPU) is flat


def test_a_pickle_holds_the_meta_parameters_once() -> None:
    rule = HierarchicalRule(4, 4, 4, 2)
    assert rule.layout  # kept, and so pickled
    size = len(pickle.dumps(rule))
    rule.flat_buffer(CPU)
    assert len(pickle.dumps(rule)) == size
    assert torch.equal(pickle.loads(pickle.dumps(rule)).flat_buffer(CPU), _current(rule))


def test_other_libraries_save_a_rule_that_has_stepped(tmp_path: Path) -> None:
    rule = HierarchicalRule(4, 4, 4, 2)
    before = _current(rule)
    rule.flat_buffer(CPU)
    save_model(rule, str(tmp_path / "rule.safetensors"))
    twin = HierarchicalRule(4, 4, 4, 2)
    load_model(twin, str(tmp_path / "rule.safetensors"))
    assert torch.equal(_current(twin), before)
    held = rule.state_dict()
    rule.flat_buffer(CPU)
    held["direction"].fill_(5.0)  # a state_dict shares its module's memory
    assert torch.equal(rule.flat_buffer(CPU), _current(rule))
    assert rule.direction[0] == 5.0
