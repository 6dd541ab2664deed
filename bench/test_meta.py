"""Meta-training, with its gate; what is measured is in ``bench/meta.py``."""

from __future__ import annotations

from collections.abc import Callable

from . import meta


def test_meta_training_against_eager_autograd(
    take: Callable[..., None], publish: Callable[..., None]
) -> None:
    suite, gated, notes = meta.training()
    publish(gated)
    take(suite, notes)
