"""The command line: ``fastl2o demo | train | eval | bench | info``."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from ._cli_checks import check_file, load_rules
from ._cli_eval import evaluate
from ._cli_train import train

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


app.command()(train)
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
    missing = [name for name in ("pytest", "pytest_benchmark") if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"the benchmarks need {' and '.join(missing)}; install what they need with: "
            "pip install 'fastl2o[bench]' (in a clone: "
            "pip install --no-build-isolation -e '.[bench]')"
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
