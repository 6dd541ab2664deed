"""Run by torchrun: a small training shared by the processes, continued once."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import fastl2o
from fastl2o import meta
from fastl2o.meta.distributed import from_torchrun
from fastl2o.meta.tasks import Quadratic, RandomMLP


def train(folder: Path, outer_steps: int, estimator: meta.Estimator) -> meta.MetaTrainer:
    """The training: four windows an update, of two tasks, validated; eight batches in flight."""
    rule = fastl2o.RNNPropRule(hidden_size=4, num_layers=1)
    rule.reset_parameters(torch.Generator().manual_seed(0))
    trainer = meta.MetaTrainer(
        rule,
        [Quadratic(dim=3), RandomMLP(4, (3,), 8)],
        estimator,
        horizon=(6, 12),
        optimizer=torch.optim.Adam(rule.parameters(), lr=1e-2),
        accumulate=4,
        groups=8,
        runs=2,
        average=0.9,
        log_snr=True,
        validation=meta.Validation(every=5, runs=2, horizon=6),
        checkpoint_dir=folder,
        checkpoint_every=7,
        progress=False,
    )
    trainer.fit(outer_steps)
    return trainer


ESTIMATORS = {"bptt": meta.TruncatedBPTT(unroll=4), "pes": meta.PES(unroll=4)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    with from_torchrun() as ranks:
        assert ranks.size == 2
        for name, estimator in ESTIMATORS.items():
            folder = Path(sys.argv[1]) / name
            train(folder, 9, estimator)
            rule = train(folder, 20, estimator).best_rule  # goes on from the checkpoint
            if ranks.main:
                rule.save(folder / "rule.safetensors")
