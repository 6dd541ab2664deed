"""A learned optimizer with timm: its parameter groups, schedule and averaged model.

    python examples/timm_digits.py --steps 200

timm's groups leave biases and normalisation out of the weight decay, as its recipes have it.
"""

from __future__ import annotations

import itertools

import timm
import torch
from common import arguments, digits, report
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn
from tqdm import tqdm

import fastl2o


def main() -> None:
    """Train and print the losses."""
    options = arguments(__doc__.splitlines()[0], steps=200)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        pretrained=False,
        num_classes=10,
        in_chans=1,
        img_size=8,
        patch_size=2,
        embed_dim=48,
        depth=2,
        num_heads=4,
    )
    optimizer = fastl2o.RNNProp(param_groups_weight_decay(model, 1e-4), lr=options.lr)
    schedule = CosineLRScheduler(optimizer, t_initial=options.steps, lr_min=0.1 * options.lr)
    average = ModelEmaV3(model, decay=0.9)
    endless = itertools.chain.from_iterable(itertools.repeat(digits(options.batch_size)))
    losses: list[float] = []
    with tqdm(total=options.steps) as progress:
        for step, (images, labels) in enumerate(itertools.islice(endless, options.steps)):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            schedule.step_update(step)
            schedule.step(step)
            average.update(model)
            losses.append(loss.item())
            progress.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            progress.update()
    report(losses)
    images, labels = next(iter(digits(1000)))
    with torch.no_grad():
        found = average.module.eval()(images).argmax(dim=1)
    print(f"averaged model: {float((found == labels).float().mean()):.1%} of 1,000 images right")


if __name__ == "__main__":
    main()
