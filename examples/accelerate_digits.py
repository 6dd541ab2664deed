"""A learned optimizer with Hugging Face accelerate: prepare() takes it as it is.

    python examples/accelerate_digits.py --steps 200
    accelerate launch --cpu --num_processes 2 examples/accelerate_digits.py

Halfway the state of everything is saved and loaded back, as after an interruption.
"""

from __future__ import annotations

import itertools
import tempfile

from accelerate import Accelerator
from common import arguments, digits, report
from torch import nn
from torch.optim.lr_scheduler import LinearLR
from tqdm import tqdm

import fastl2o


def main() -> None:
    """Train and print the losses."""
    options = arguments(__doc__.splitlines()[0], steps=200)
    accelerator = Accelerator()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Sigmoid(), nn.Linear(32, 10))
    optimizer = fastl2o.LSTM(model.parameters(), lr=options.lr)
    schedule = LinearLR(optimizer, 1.0, 0.1, options.steps)
    model, optimizer, batches, schedule = accelerator.prepare(
        model, optimizer, digits(options.batch_size), schedule
    )
    endless = itertools.chain.from_iterable(itertools.repeat(batches))
    losses: list[float] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        tqdm(total=options.steps, disable=not accelerator.is_main_process) as progress,
    ):
        for images, labels in itertools.islice(endless, options.steps):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
            schedule.step()
            losses.append(accelerator.reduce(loss.detach(), "mean").item())
            progress.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            progress.update()
            if len(losses) == options.steps // 2:
                accelerator.save_state(folder)
                accelerator.load_state(folder)
    if accelerator.is_main_process:
        report(losses)
    accelerator.end_training()


if __name__ == "__main__":
    main()
