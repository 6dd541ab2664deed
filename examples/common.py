"""What the examples share: the digits of scikit-learn, and options every one of them has."""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset


def arguments(description: str, steps: int) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--steps", type=int, default=steps, help="inner steps (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--lr", type=float, default=1.0, help="scales the learned update")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    return options


def digits(batch_size: int) -> DataLoader:
    """Batches of 8 x 8 images (batch, 1, 8, 8) in [0, 1] and their labels, in a new order."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    dataset = TensorDataset(images, torch.tensor(data.target))
    return DataLoader(dataset, batch_size, shuffle=True, drop_last=True)


def report(losses: list[float]) -> None:
    """Print where the training began and ended."""
    tenth = max(len(losses) // 10, 1)
    first, last = (sum(part) / tenth for part in (losses[:tenth], losses[-tenth:]))
    print(f"loss of the first {tenth} steps {first:.3f}, of the last {last:.3f}")
