"""A meta-training in a process of its own, which kills itself where it is told to.

Run as ``python -m tests.meta_child DIRECTORY MODE``; see test_meta_trainer.py.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

import fastl2o
from fastl2o import meta

OUTER_STEPS = 30
CHECKPOINT_EVERY = 4
KILL_AT = 18
MODES = ("between-checkpoints", "writing", "renaming")


def make_trainer(directory: Path | None) -> meta.MetaTrainer:
    """The training that is killed and continued: every part of the state that can be carried."""
    rule = fastl2o.RNNPropRule(hidden_size=3, num_layers=1)
    rule.reset_parameters(torch.Generator().manual_seed(7))
    mlp = meta.tasks.MLPClassification("digits", hidden=(3,), batch_size=4)
    quadratic = meta.tasks.RandomScaling(meta.tasks.Quadratic(dim=3), 1.0)
    return meta.MetaTrainer(
        rule,
        [meta.tasks.WithConvex(quadratic, 2), mlp],
        meta.TruncatedBPTT(3),
        horizon={"mean": 8, "minimum": 5, "maximum": 20},
        unroll=(2, 4),
        optimizer=torch.optim.Adam(rule.parameters(), lr=1e-2),
        seed=11,
        runs=2,
        groups=2,
        clip_grad=0.5,
        schedule=meta.LRSchedule("cosine", total=OUTER_STEPS),
        task_weights=[1.0, 2.0],
        validation=meta.Validation(every=3, runs=2, horizon=6),
        imitation=meta.Imitation(probability=0.4),
        checkpoint_dir=directory,
        checkpoint_every=CHECKPOINT_EVERY,
        progress=False,
    )


def die(*_: Any) -> None:
    """What a power cut does: no handlers, no flushing."""
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    torch.set_num_threads(1)
    directory, mode = Path(sys.argv[1]), sys.argv[2]
    trainer = make_trainer(directory)
    trainer.fit(KILL_AT)
    if mode == "writing":
        os.fsync = die
    elif mode == "renaming":
        rename = os.replace
        os.replace = lambda source, target: (rename(source, target), die())[0]
    else:
        window = trainer.estimator.window
        trainer.estimator.window = lambda *args, **kwargs: (window(*args, **kwargs), die())[0]
    trainer.fit(OUTER_STEPS)


if __name__ == "__main__":
    main()
