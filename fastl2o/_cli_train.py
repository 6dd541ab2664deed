"""``fastl2o train``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ._cli_checks import MAX_SEED, make_folder

if TYPE_CHECKING:
    from .meta import MetaTrainer
    from .meta.distributed import Ranks
    from .meta.recipe import Recipe

__all__ = ["train"]


def train(
    recipe: Annotated[str, typer.Argument(help="Shipped recipe's name, or path of a .toml.")],
    data: Annotated[str | None, typer.Option(help="MNIST .npz; default $FASTL2O_DATA.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of checkpoints and result; default runs/RECIPE.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Continue from the folder's checkpoint.")] = False,
    outer_steps: Annotated[
        int | None, typer.Option(min=1, help="Instead of the recipe's number.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=MAX_SEED, help="Instead of the recipe's seed.")
    ] = None,
    checkpoint_every: Annotated[
        int, typer.Option(min=1, help="Outer steps between checkpoints.")
    ] = 200,
    tensorboard: Annotated[
        bool, typer.Option(help="Write TensorBoard events too (needs tensorboard).")
    ] = False,
    curves: Annotated[
        bool, typer.Option(help="Draw curves.png with every checkpoint (needs matplotlib).")
    ] = False,
) -> None:
    """Meta-train a rule by a recipe, and save the one with the best validation score.

    Started by torchrun, the processes share the windows of each outer step: the recipe's
    trainer.accumulate must be a multiple of their number.
    """
    from .meta.distributed import from_torchrun
    from .meta.recipe import build_trainer, load_recipe

    loaded = load_recipe(recipe)
    loaded = replace(
        loaded,
        outer_steps=loaded.outer_steps if outer_steps is None else outer_steps,
        seed=loaded.seed if seed is None else seed,
    )
    tasks = [*loaded.tasks, *(loaded.validation or {}).get("tasks", ())]
    if data is not None and not any(task.get("data") == "mnist" for task in tasks):
        raise ValueError(f"recipe {loaded.name!r} has no task on MNIST; leave --data out")
    folder = out if out is not None else Path("runs") / loaded.name
    logs = [name for name, chosen in (("tensorboard", tensorboard), ("curves", curves)) if chosen]
    with from_torchrun() as ranks:
        trainer = build_trainer(
            loaded, data, checkpoint_dir=folder, checkpoint_every=checkpoint_every, logs=logs
        )
        _train(loaded, trainer, folder, resume, ranks)


def _train(recipe: Recipe, trainer: MetaTrainer, folder: Path, resume: bool, ranks: Ranks) -> None:
    """Run the training in its folder, and save its rule there."""
    from .meta.checkpoint import has_checkpoint

    if resume and not has_checkpoint(folder):
        raise RuntimeError(
            f"there is no checkpoint in {folder}: leave --resume out to begin there, or name the "
            "folder that has one by --out"
        )
    make_folder(folder, "--out")
    with _alone_in(folder) if ranks.main else nullcontext():
        if has_checkpoint(folder) and not resume:
            raise RuntimeError(
                f"{folder} holds a checkpoint: continue it with --resume, or choose another --out"
            )
        trainer.resume()
        if ranks.main:
            begun = f", continued after {trainer.outer_step}" if resume else ""
            shared = f", {ranks.size} processes" if ranks.size > 1 else ""
            typer.echo(
                f"{recipe.name}: {trainer.rule}, {recipe.outer_steps} outer steps{begun}{shared}, "
                f"in {folder}"
            )
            if trainer.outer_step >= recipe.outer_steps:
                typer.echo(
                    f"nothing is left to do: {trainer.outer_step} of {recipe.outer_steps} outer "
                    "steps are done; give more by --outer-steps"
                )
        try:
            trainer.fit(recipe.outer_steps)
        except KeyboardInterrupt:
            if ranks.main:
                typer.echo(
                    f"interrupted at outer step {trainer.outer_step}; continue from the last "
                    "checkpoint with --resume",
                    err=True,
                )
            raise
        if ranks.main:
            _save(recipe, trainer, folder)


def _save(recipe: Recipe, trainer: MetaTrainer, folder: Path) -> None:
    from . import __version__

    best = trainer.best_step
    card = {
        **recipe.card,
        "name": recipe.name,
        "description": recipe.description,
        "recipe": recipe.to_card(),
        "trained": {
            "outer_steps": trainer.outer_step,
            "best_step": best,
            "best_score": trainer.best_score if best is not None else None,
            "skipped": trainer.skipped,
            "fastl2o": __version__,
        },
    }
    path = folder / f"{recipe.name}.safetensors"
    trainer.best_rule.save(path, card)
    if best is None:
        typer.echo(f"last rule: {path} (outer step {trainer.outer_step}; none was validated)")
    else:
        typer.echo(f"best rule: {path} (outer step {best}, validation {trainer.best_score:.5g})")


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep a second training out of the folder; a killed process frees it too."""
    descriptor = os.open(folder, os.O_RDONLY)  # of the folder itself: no file is left behind
    try:
        try:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(
                f"another training is running in {folder}: wait for it, or choose another --out"
            ) from None
        except (ImportError, OSError):
            pass  # no such locks on this system
        yield
    finally:
        os.close(descriptor)
