"""What each of two processes does in tests of parameters that are split over ranks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from fastl2o import HierarchicalRule, LearnedOptimizer, LSTMRule, RNNPropRule
from fastl2o.rules import Rule
from tests.ranks import join, leave

# Uneven parts, a part that is empty, one split by columns, one that every rank holds.
SHAPES = [((5, 3), 0), ((1,), 0), ((4, 7), 1), ((3,), None), ((0, 2), 0)]
STEPS = 4
RULES: dict[str, Callable[[], Rule]] = {
    "lstm": lambda: LSTMRule(5, 2),
    "rnnprop": lambda: RNNPropRule(4, 1),
    "hierarchical": lambda: HierarchicalRule(4, 5, 6, 3),
}


def seeded(name: str) -> Rule:
    """The rule of that name, the same in every process."""
    torch.manual_seed(0)
    return RULES[name]()


def whole_params() -> list[nn.Parameter]:
    """The parameters in one piece."""
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape, _ in SHAPES]


def whole_grads(step: int) -> list[Tensor]:
    """The gradients of a step in one piece."""
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator) for shape, _ in SHAPES]


def train(
    optimizer: LearnedOptimizer, place: Callable[[int, Tensor], Tensor], steps: range
) -> None:
    """Steps with the gradients that `place` makes of the whole ones."""
    params = optimizer.param_groups[0]["params"]
    for step in steps:
        for index, (param, grad) in enumerate(zip(params, whole_grads(step), strict=True)):
            param.grad = place(index, grad)
        optimizer.step()


def states(optimizer: LearnedOptimizer) -> list[Tensor]:
    """Parameters and all states, in one piece."""
    params = optimizer.param_groups[0]["params"]
    owners = [*params, *(key for key in optimizer.state if isinstance(key, str))]
    entries = [*params]
    for owner in owners:
        entries += [v for _, v in sorted(optimizer.state[owner].items()) if isinstance(v, Tensor)]
    return [
        (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
        for tensor in entries
    ]


def digits_model() -> nn.Sequential:
    """A small network, the same in every process."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def train_model(model: nn.Module, optimizer: LearnedOptimizer) -> list[float]:
    """Losses of a few steps on one batch."""
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(16, 6, generator=generator)
    labels = torch.randint(3, (16,), generator=generator)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


class Ranks:
    """The scenarios, each of which gives what rank 0 saves."""

    def __init__(self) -> None:
        self.mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def place(self, index: int, tensor: Tensor) -> Tensor:
        """The DTensor of one of SHAPES."""
        dim = SHAPES[index][1]
        placement = Replicate() if dim is None else Shard(dim)
        return distribute_tensor(tensor.detach(), self.mesh, [placement])

    def optimizer(self, name: str, **options: Any) -> LearnedOptimizer:
        """Over the split parameters."""
        params = [nn.Parameter(self.place(i, p)) for i, p in enumerate(whole_params())]
        return LearnedOptimizer(params, seeded(name), lr=0.5, weight_decay=0.1, seed=7, **options)

    def split(self, name: str) -> dict[str, Any]:
        """Steps on split parameters, with the collectives of each policy counted."""
        optimizer = self.optimizer(name)
        train(optimizer, self.place, range(STEPS))
        counts = {}
        for policy in ("pass", "skip", "raise"):
            optimizer.param_groups[0]["nonfinite"] = policy
            calls, reduce = [], dist.all_reduce
            dist.all_reduce = lambda rows, *rest: (calls.append(rows.numel()), reduce(rows, *rest))  # noqa: B023
            train(optimizer, self.place, range(STEPS, STEPS + 1))
            dist.all_reduce = reduce
            counts[policy] = calls
        return {"tensors": states(optimizer), "counts": counts}

    def resumed(self, name: str) -> dict[str, Any]:
        """A checkpoint of whole tensors, loaded into split ones, and one of parts."""
        whole = LearnedOptimizer(whole_params(), seeded(name), lr=0.5, weight_decay=0.1, seed=7)
        train(whole, lambda _, grad: grad, range(2))
        results = []
        for checkpoint in (whole.state_dict(), None):
            optimizer = self.optimizer(name)
            if checkpoint is None:
                before = self.optimizer(name)
                train(before, self.place, range(2))
                checkpoint = before.state_dict()
            with torch.no_grad():
                params = optimizer.param_groups[0]["params"]
                for i, (param, own) in enumerate(
                    zip(params, whole.param_groups[0]["params"], strict=True)
                ):
                    param.copy_(self.place(i, own))
            optimizer.load_state_dict(checkpoint)
            train(optimizer, self.place, range(2, STEPS))
            results.append(states(optimizer))
        return {"tensors": results}

    def poisoned(self, name: str) -> dict[str, Any]:
        """NaN in one rank's part only: each rank raises alike, or skips alike."""
        optimizer = self.optimizer(name)
        train(optimizer, self.place, range(2))
        before = states(optimizer)

        def place(index: int, grad: Tensor) -> Tensor:
            if index == 2:
                grad[3, 6] = torch.nan
            return self.place(index, grad)

        message = ""
        try:
            train(optimizer, place, range(2, 3))
        except RuntimeError as error:
            message = str(error)
        messages: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(messages, message)
        unchanged = all(map(torch.equal, before, states(optimizer)))
        optimizer.param_groups[0]["nonfinite"] = "skip"
        train(optimizer, place, range(2, 3))
        return {"messages": messages, "unchanged": unchanged, "skipped": states(optimizer)}

    def fsdp(self, name: str) -> dict[str, Any]:
        """A model sharded by FSDP2."""
        model = digits_model()
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=self.mesh)
        optimizer = LearnedOptimizer(model.parameters(), seeded(name), seed=7)
        losses = train_model(model, optimizer)
        planes = optimizer.state[model[0].weight]["planes"]
        return {"losses": losses, "placements": str(planes.placements), "shape": planes.shape}

    def refused(self, name: str) -> dict[str, Any]:
        """Placements that a step does not take."""
        whole = torch.ones(4, 3)
        partial = DTensor.from_local(whole, self.mesh, [Partial()])
        rows, columns = (distribute_tensor(whole, self.mesh, [Shard(dim)]) for dim in (0, 1))
        messages = {}
        for what, param, grad in (("partial", partial, partial), ("grad", rows, columns)):
            param.requires_grad_()
            optimizer = LearnedOptimizer([param], seeded(name))
            param.grad = grad.detach()
            try:
                optimizer.step()
            except RuntimeError as error:
                messages[what] = str(error)
        return messages


def main(folder: str, rank: str, size: str) -> None:
    """One process: every scenario for every rule."""
    join(folder, rank, size)
    ranks = Ranks()
    results = {
        scenario: {name: getattr(ranks, scenario)(name) for name in RULES}
        for scenario in ("split", "resumed", "poisoned", "fsdp", "refused")
    }
    if rank == "0":
        torch.save(results, Path(folder) / "results.pt")
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
