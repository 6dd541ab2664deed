"""What each process does in tests of torch's ways to train in parallel."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fastl2o import LearnedOptimizer
from tests.ranks import join, leave
from tests.sharded_child import RULES, seeded

BATCH, BEFORE, STEPS = 24, 3, 6
OPTIONS: dict[str, Any] = {"lr": 0.5, "weight_decay": 0.1}


def network() -> nn.Sequential:
    """A small network, the same in every process; its tensors do not divide evenly."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def optimizer_of(model: nn.Module, name: str) -> LearnedOptimizer:
    """Two groups: biases have no weight decay."""
    weights = [p for p in model.parameters() if p.dim() > 1]
    biases = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": weights}, {"params": biases, "weight_decay": 0.0}]
    return LearnedOptimizer(groups, seeded(name), seed=7, **OPTIONS)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Steps on the mean loss of the two halves of each step's batch.

    A rank of two takes one half, and FSDP and DDP the mean over ranks; another number of ranks
    takes both halves everywhere. So the gradients have the same bits, however it is done.
    """
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(BATCH, 6, generator=generator)
        labels = torch.randint(3, (BATCH,), generator=generator)
        halves = list(zip(inputs.chunk(2), labels.chunk(2), strict=True))
        mine = [halves[dist.get_rank()]] if ranks == 2 else halves
        optimizer.zero_grad()
        for half, its_labels in mine:
            (nn.functional.cross_entropy(model(half), its_labels) / len(mine)).backward()
        optimizer.step()


def whole(tensor: Tensor) -> Tensor:
    """A copy in one piece."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def everything(model: nn.Module, optimizer: LearnedOptimizer) -> dict[str, Tensor]:
    """Parameters and their states in one piece, by name."""
    found = {}
    for name, param in model.named_parameters():
        name = name.removeprefix("module.")
        found[name] = whole(param)
        for entry, tensor in sorted(optimizer.state[param].items()):
            found[f"{name}/{entry}"] = whole(tensor)
    return found


def loaded(model: nn.Module, name: str, folder: Path) -> LearnedOptimizer:
    """A fresh optimizer with what a distributed checkpoint holds, put into the model as well."""
    with torch.no_grad():  # as a fresh process has other parameters
        for param in model.parameters():
            param.zero_()
    optimizer = optimizer_of(model, name)
    weights, states = get_state_dict(model, optimizer)
    saved = {"model": weights, "optimizer": states}
    dcp.load(saved, checkpoint_id=folder / name, no_dist=not dist.is_initialized())
    set_state_dict(
        model,
        optimizer,
        model_state_dict=saved["model"],
        optim_state_dict=saved["optimizer"],
    )
    return optimizer


class Ranks:
    """The scenarios, each of which gives what rank 0 saves."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def sharded(self) -> nn.Sequential:
        """The network, split by FSDP2."""
        model = network()
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=self.mesh)
        return model

    def replicated(self, name: str) -> dict[str, Any]:
        """DDP, and whether the ranks hold the same bits."""
        model = DistributedDataParallel(network())
        optimizer = optimizer_of(model, name)
        train(model, optimizer, range(STEPS))
        found = everything(model, optimizer)
        others: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(others, found)
        same = [all(map(torch.equal, found.values(), other.values())) for other in others]
        return {"found": found, "same": same}

    def checkpoint(self, name: str) -> dict[str, Any]:
        """Write a distributed checkpoint of FSDP2 in the middle, read it back, and train on."""
        model = self.sharded()
        optimizer = optimizer_of(model, name)
        train(model, optimizer, range(BEFORE))
        weights, states = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": states}, checkpoint_id=self.folder / name)
        saved, other = everything(model, optimizer), self.sharded()
        taken_up = loaded(other, name, self.folder)
        read = everything(other, taken_up)
        for each, its in ((model, optimizer), (other, taken_up)):
            train(each, its, range(BEFORE, STEPS))
        return {
            "saved": saved,
            "read": read,
            "straight": everything(model, optimizer),
            "again": everything(other, taken_up),
        }

    def gathered(self, name: str, **options: Any) -> dict[str, Any]:
        """States through get_ and set_optimizer_state_dict, with one of their options."""
        model, other = self.sharded(), self.sharded()
        optimizer, copied = optimizer_of(model, name), optimizer_of(other, name)
        train(model, optimizer, range(BEFORE))
        states = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(**options))
        set_optimizer_state_dict(
            other, copied, optim_state_dict=states, options=StateDictOptions(**options)
        )
        other.load_state_dict(model.state_dict())
        for each, its in ((model, optimizer), (other, copied)):
            train(each, its, range(BEFORE, STEPS))
        return {"found": everything(model, optimizer), "copied": everything(other, copied)}

    def full(self, name: str) -> dict[str, Any]:
        """In one piece on every rank."""
        return self.gathered(name, full_state_dict=True)

    def flattened(self, name: str) -> dict[str, Any]:
        """Without nested dictionaries, as pipelines need it."""
        return self.gathered(name, flatten_optimizer_state_dict=True)

    def redundant(self, name: str) -> dict[str, Any]:
        """ZeroRedundancyOptimizer, consolidated in the middle and taken up by another."""
        # Here, because importing it warns (of what it compiles).
        from torch.distributed.optim import ZeroRedundancyOptimizer

        def build() -> tuple[nn.Module, Any]:
            model = DistributedDataParallel(network())
            return model, ZeroRedundancyOptimizer(
                model.parameters(), LearnedOptimizer, rule=seeded(name), **OPTIONS
            )

        (model, optimizer), (other, taken_up) = build(), build()
        train(model, optimizer, range(BEFORE))
        kept = len(optimizer.optim.param_groups[0]["params"])
        optimizer.consolidate_state_dict(to=0)
        if dist.get_rank() == 0:
            states = optimizer.state_dict()
            for group in states["param_groups"]:
                del group["rule"]
            torch.save(states, self.folder / "zero.pt")
        dist.barrier()
        other.load_state_dict(model.state_dict())
        taken_up.load_state_dict(torch.load(self.folder / "zero.pt", weights_only=True))
        for each, its in ((model, optimizer), (other, taken_up)):
            train(each, its, range(BEFORE, STEPS))
        return {
            "found": dict(model.module.state_dict()),
            "taken up": dict(other.module.state_dict()),
            "saved": torch.load(self.folder / "zero.pt", weights_only=True),
            "kept": kept,
        }


def main(folder: str, rank: str, size: str) -> None:
    """Two ranks do everything; other numbers of ranks load what those wrote."""
    join(folder, rank, size)
    ranks = Ranks(Path(folder))
    results: dict[str, Any] = {}
    if size == "2":
        for scenario in ("replicated", "checkpoint", "full", "flattened", "redundant"):
            results[scenario] = {name: getattr(ranks, scenario)(name) for name in RULES}
    else:
        for name in RULES:
            model = ranks.sharded()
            optimizer = loaded(model, name, ranks.folder)
            results[name] = everything(model, optimizer)
    if rank == "0":
        torch.save(results, ranks.folder / "results.pt")
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
