"""The command line: ``fastl2o demo | train | eval | bench | info``."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ._cli_checks import MAX_SEED, check_file, load_rules, make_folder
from ._cli_eval import evaluate

__all__ = ["app", "main"]

app = typer.Typer(
    help="Learned optimizers for PyTorch: apply, evaluate and meta-train them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
DEMO_RULES = ("lstm-mnist", "rnnprop-mnist")


def _version(asked: bool) -> None:
    from . import __version__

    if asked:
        typer.echo(f"fastl2o {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    # Its docstring would take the place of the app's help.
    pass


@app.command()
def demo(
    rule: Annotated[
        list[str] | None, typer.Option(help="Shipped name or .safetensors path; repeatable.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each run.")] = 200,
    seeds: Annotated[int, typer.Option(min=1, help="Runs reported for each optimizer.")] = 5,
    activation: Annotated[str, typer.Option(help="sigmoid, tanh, relu or elu.")] = "sigmoid",
    out: Annotated[Path, typer.Option(help="Where to save the picture.")] = Path("runs/demo.png"),
    picture: Annotated[bool, typer.Option(help="Draw the curves (needs matplotlib).")] = True,
) -> None:
    """Train a digits classifier with learned and with tuned hand-designed optimizers."""
    from . import _demo, zoo
    from .evaluate import threads

    names = list(rule or [name for name in DEMO_RULES if name in zoo.names()])
    if not names:
        raise RuntimeError(
            "this installation ships no rule: train one with 'fastl2o train RECIPE' and give it "
            "by --rule PATH"
        )
    setting = _demo.DemoSetting(steps=steps, seeds=seeds, activation=activation)
    rules = load_rules(names)
    if picture:
        check_file(out, "--out")
    typer.echo(
        f"scikit-learn digits, 64-{setting.hidden}-10 {activation} network, batch "
        f"{setting.batch_size}, {steps} steps, mean ±std over {seeds} seeds. The learned rules run "
        f"as shipped;\nthe others at the best of {len(setting.learning_rates)} learning rates, "
        f"chosen on {setting.tuning_seeds} seeds of their own."
    )
    with threads(1):
        results = _demo.run(rules, setting, progress=True)
    typer.echo(_demo.table(results, setting))
    if picture:
        typer.echo(f"curves: {_demo.plot(results, setting, out)}")


@app.command()
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
) -> None:
    """Meta-train a rule by a recipe, and save the one with the best validation score."""
    from dataclasses import asdict, replace

    from . import __version__
    from .meta.checkpoint import has_checkpoint
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
    trainer = build_trainer(loaded, data, checkpoint_dir=folder, checkpoint_every=checkpoint_every)
    if resume and not has_checkpoint(folder):
        raise RuntimeError(
            f"there is no checkpoint in {folder}: leave --resume out to begin there, or name the "
            "folder that has one by --out"
        )
    make_folder(folder, "--out")
    with _alone_in(folder):
        if has_checkpoint(folder) and not resume:
            raise RuntimeError(
                f"{folder} holds a checkpoint: continue it with --resume, or choose another --out"
            )
        trainer.resume()
        begun = f", continued after {trainer.outer_step}" if resume else ""
        typer.echo(
            f"{loaded.name}: {trainer.rule}, {loaded.outer_steps} outer steps{begun}, in {folder}"
        )
        try:
            result = trainer.fit(loaded.outer_steps)
        except KeyboardInterrupt:
            typer.echo(
                f"interrupted at outer step {trainer.outer_step}; continue from the last "
                "checkpoint with --resume",
                err=True,
            )
            raise
        card = {
            **loaded.card,
            "name": loaded.name,
            "description": loaded.description,
            "recipe": asdict(loaded),
            "trained": {
                "outer_steps": result.outer_steps,
                "best_step": result.best_step,
                "best_score": result.best_score if result.best_step is not None else None,
                "skipped": result.skipped,
                "fastl2o": __version__,
            },
        }
        path = folder / f"{loaded.name}.safetensors"
        trainer.best_rule.save(path, card)
        if result.best_step is None:
            typer.echo(f"last rule: {path} (outer step {result.outer_steps}; none was validated)")
        else:
            typer.echo(
                f"best rule: {path} (outer step {result.best_step}, validation "
                f"{result.best_score:.5g})"
            )


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


app.command("eval")(evaluate)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context) -> None:
    """Run the microbenchmarks; further arguments go to pytest (for example -k step)."""
    folder = Path(__file__).resolve().parent.parent / "bench"
    if not folder.is_dir():
        raise RuntimeError(
            f"there are no benchmarks at {folder}: they are part of the source tree, not of the "
            "package; run 'make bench' in a clone"
        )
    command = [sys.executable, "-m", "pytest", str(folder), *context.args]
    raise typer.Exit(subprocess.run(command, cwd=folder.parent, check=False).returncode)


@app.command()
def info() -> None:
    """Show version, build, backends, instruction sets and shipped rules."""
    from . import info as describe

    typer.echo(str(describe()))


def main() -> None:
    """Entry point of the ``fastl2o`` script: expected errors are one line, not a traceback."""
    try:
        app()
    except (
        *(ValueError, TypeError, RuntimeError, OSError, ImportError),
        *(ArithmeticError, MemoryError),
    ) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        typer.echo(f"fastl2o: {message}", err=True)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
