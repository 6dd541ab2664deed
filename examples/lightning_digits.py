"""A learned optimizer in PyTorch Lightning: configure_optimizers returns it.

    python examples/lightning_digits.py --steps 200

Lightning's checkpoints hold its state, as that of any torch.optim optimizer.
"""

from __future__ import annotations

from typing import Any

import lightning
import torch
from common import arguments, digits, report
from torch import Tensor, nn

import fastl2o


class Classifier(lightning.LightningModule):
    """A small network for the digits, trained by the shipped LSTM rule."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.lr = lr
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Sigmoid(), nn.Linear(32, 10))
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self.model(images), labels)
        self.log("loss", loss, prog_bar=True)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = fastl2o.LSTM(self.parameters(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, int(self.trainer.estimated_stepping_batches)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def main() -> None:
    """Train and print the losses."""
    options = arguments(__doc__.splitlines()[0], steps=200)
    classifier = Classifier(options.lr)
    trainer = lightning.Trainer(
        max_steps=options.steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        gradient_clip_val=10.0,
    )
    trainer.fit(classifier, digits(options.batch_size))
    report(classifier.losses)


if __name__ == "__main__":
    main()
