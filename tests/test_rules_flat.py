"""The copy of the meta-parameters that ops read, after every way to change them."""

from __future__ import annotations

import torch

from fastl2o import HierarchicalRule


def test_the_flat_buffer_follows_every_way_to_change_meta_parameters() -> None:
    rule = HierarchicalRule(4, 4, 4, 2)
    cpu = torch.device("cpu")
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
            assert torch.equal(rule.flat_buffer(cpu), expected)
        assert torch.equal(rule.flat_buffer(cpu, torch.float64), expected.double())
        assert torch.equal(rule.flat_buffer(cpu), expected)
