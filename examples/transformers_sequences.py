"""A learned optimizer in Hugging Face's Trainer: optimizer_cls_and_kwargs names it.

    python examples/transformers_sequences.py --steps 150

A small GPT-2, made from a config, learns to continue sequences that count up in steps of their own.
"""

from __future__ import annotations

import tempfile

import torch
from common import arguments, report
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import fastl2o

SYMBOLS, LENGTH = 16, 12


class Counting(Dataset):
    """Sequences start, start + stride, start + 2 stride ... modulo the number of symbols."""

    def __len__(self) -> int:
        return SYMBOLS * SYMBOLS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start, stride = divmod(index, SYMBOLS)
        sequence = (start + stride * torch.arange(LENGTH)) % SYMBOLS
        return {"input_ids": sequence, "labels": sequence}


def main() -> None:
    """Train and print the losses."""
    options = arguments(__doc__.splitlines()[0], steps=150)
    config = GPT2Config(
        vocab_size=SYMBOLS,
        n_positions=LENGTH,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=None,
        eos_token_id=None,
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            GPT2LMHeadModel(config),
            TrainingArguments(
                output_dir=folder,
                max_steps=options.steps,
                per_device_train_batch_size=options.batch_size,
                lr_scheduler_type="cosine",
                max_grad_norm=1.0,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                seed=options.seed,
            ),
            train_dataset=Counting(),
            # Named here, so that the Trainer gives it parameters without decay as its own groups.
            optimizer_cls_and_kwargs=(fastl2o.Hierarchical, {"lr": options.lr}),
        )
        trainer.train()
    report([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


if __name__ == "__main__":
    main()
