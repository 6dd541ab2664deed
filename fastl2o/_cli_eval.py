"""``fastl2o eval``: its options, and the optimizers that they name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ._cli_checks import MAX_SEED, check_file, load_rules, nearest
from ._cli_tasks import make_tasks

if TYPE_CHECKING:
    from .evaluate import Entrant

__all__ = ["evaluate"]


def evaluate(
    rules: Annotated[
        list[str],
        typer.Argument(
            help="Rules (shipped names or .safetensors paths) and hand-designed optimizers: sgd, "
            "momentum, nesterov, rmsprop and adam get the best rate of the grid, adam:1e-3 is not "
            "tuned."
        ),
    ],
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="quadratic (default), digits, mnist; ensemble, families or held_out, or one of "
            "their families (ensemble/bowl); or the tasks of a recipe (shipped name or .toml "
            "path), on what they hold out of meta-training. Repeatable."
        ),
    ] = None,
    horizon: Annotated[int, typer.Option(min=1, help="Inner steps.")] = 100,
    seeds: Annotated[int, typer.Option(min=1, help="Runs reported.")] = 16,
    tuning_seeds: Annotated[
        int, typer.Option(min=1, help="Other runs, for choosing learning rates.")
    ] = 8,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the reported runs.")] = 0,
    criterion: Annotated[
        str, typer.Option(help="Learning rates by the 'sum' of losses or by the 'final' loss.")
    ] = "sum",
    baselines: Annotated[
        bool, typer.Option(help="Tune and run SGD, Nesterov, RMSprop and Adam too.")
    ] = True,
    baseline: Annotated[
        str | None,
        typer.Option(help="Tuned optimizer whose loss is to be reached; default the best tuned."),
    ] = None,
    learning_rate: Annotated[
        list[float] | None,
        typer.Option(help="A rate of the grid, instead of 1e-5 to 10 in half decades; repeatable."),
    ] = None,
    step: Annotated[
        list[int] | None, typer.Option(help="Report the loss after this many; repeatable.")
    ] = None,
    generalisation: Annotated[
        bool,
        typer.Option(
            "--generalisation",
            help="Also the gap to the test loss, and the distance of runs whose training sets "
            "differ in one example (arXiv 1509.01240).",
        ),
    ] = False,
    data: Annotated[str | None, typer.Option(help="MNIST .npz; default $FASTL2O_DATA.")] = None,
    hidden: Annotated[
        str | None, typer.Option(help="Hidden widths of the network, such as 20 or 20,20.")
    ] = None,
    activation: Annotated[str | None, typer.Option(help="sigmoid, tanh, relu or elu.")] = None,
    init_scale: Annotated[
        str | None, typer.Option(help="Standard deviation of the initial parameters, or torch.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images a minibatch.")] = None,
    split: Annotated[
        str | None,
        typer.Option(help="Images trained on: meta_valid (default), train, meta_train or test."),
    ] = None,
    dim: Annotated[int | None, typer.Option(min=1, help="Size of the quadratics.")] = None,
    num_threads: Annotated[
        int, typer.Option("--threads", min=1, help="Threads; one is best for small tasks.")
    ] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, not tables.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for report.md, report.json and curves.png (needs matplotlib); a name that "
            "ends in .json gets the JSON alone."
        ),
    ] = None,
) -> None:
    """Compare rules with hand-designed optimizers, each at its best learning rate, on tasks.

    Losses at given steps, steps and seconds to the best tuned optimizer's loss, and divergences.
    """
    from tqdm import tqdm

    from ._files import atomic_write
    from .evaluate import (
        LEARNING_RATES,
        Setting,
        check_entrants,
        check_generalisation,
        compare,
        document,
        render,
        steps_of,
        threads,
        write_report,
    )

    options = {
        "data": data,
        "hidden": None if hidden is None else _parse_widths(hidden),
        "activation": activation,
        "init_scale": _parse_scale(init_scale),
        "batch_size": batch_size,
        "split": split,
        "dim": dim,
    }
    setting = Setting(
        horizon=horizon,
        runs=seeds,
        tuning_runs=tuning_seeds,
        seed=seed,
        criterion=criterion,
        steps=tuple(step or ()),
        learning_rates=tuple(learning_rate or LEARNING_RATES),
    )
    chosen = {key: value for key, value in options.items() if value is not None}
    tasks = make_tasks(task or ["quadratic"], chosen)
    entrants = _make_entrants(rules, baselines)
    reference = None if baseline is None else _optimizer_name(baseline) or baseline
    check_entrants(entrants, setting, reference)
    if generalisation:
        for one in tasks.values():
            check_generalisation(one, setting)
    folder = None if out is None else _check_out(out)
    total = len(tasks) * steps_of(entrants, setting, generalisation)
    with (
        threads(num_threads),
        tqdm(total=total, disable=None, unit="step", unit_scale=True, leave=False) as bar,
    ):
        comparisons = []
        for name, one in tasks.items():
            bar.set_description(name)
            comparisons.append(
                compare(
                    one,
                    entrants,
                    setting,
                    name=name,
                    baseline=reference,
                    generalisation=generalisation,
                    bar=bar,
                )
            )
        text = json.dumps(document(comparisons), indent=2, allow_nan=False)
    written = [] if folder is None else write_report(comparisons, folder)
    if out is not None and folder is None:
        atomic_write(out, f"{text}\n".encode())
    if as_json:
        typer.echo(text)
    else:
        typer.echo(render(comparisons))
        if written:
            typer.echo(f"report: {written[0]}")


def _check_out(out: Path) -> Path | None:
    """The folder of the report, or None where only JSON is asked for; refused before the work."""
    from .evaluate import check_report

    if out.suffix == ".json":
        check_file(out, "--out")
        return None
    check_report()
    if out.exists() and not out.is_dir():
        raise ValueError(
            f"--out {out} is a file; give a folder for the report, or a name that ends in .json"
        )
    check_file(out / "report.json", "--out")
    return out


def _make_entrants(given: Sequence[str], baselines: bool) -> list[Entrant]:
    """What the arguments name, in their order, and then the baselines that are not among it."""
    from .evaluate import HAND_DESIGNED, Entrant

    rules = [text for text in given if _optimizer_name(text) is None]
    for text in rules:
        _check_rule_name(text)
    loaded = dict(zip(rules, load_rules(rules).items(), strict=True))
    entrants = []
    for text in given:
        name = _optimizer_name(text)
        if name is None:
            entrants.append(Entrant.learned(*loaded[text]))
        elif ":" in text:
            entrants.append(Entrant.fixed(name, _parse_rate(text)))
        else:
            entrants.append(Entrant.tuned(name))
    names = {entrant.name for entrant in entrants}
    return entrants + [
        Entrant.tuned(name) for name in HAND_DESIGNED if baselines and name not in names
    ]


def _optimizer_name(text: str) -> str | None:
    """The hand-designed optimizer that an argument names, with a rate behind a colon or without."""
    from .evaluate import OPTIMIZERS

    by_name = {name.lower(): name for name in OPTIMIZERS}
    return by_name.get(text.partition(":")[0].lower())


def _parse_rate(text: str) -> float:
    rate = text.partition(":")[2]
    try:
        return float(rate)
    except ValueError:
        raise ValueError(
            f"{text!r}: behind the colon stands a learning rate, such as adam:1e-3; got {rate!r}"
        ) from None


def _check_rule_name(text: str) -> None:
    from . import zoo
    from .evaluate import OPTIMIZERS

    if text in zoo.names() or text.endswith(".safetensors"):
        return
    designed = [name.lower() for name in OPTIMIZERS]
    raise ValueError(
        f"there is no rule or optimizer {text!r}; {nearest(text, [*zoo.names(), *designed])}give "
        f"a shipped rule ({', '.join(zoo.names())}), a path that ends in .safetensors, or a "
        f"hand-designed optimizer ({', '.join(designed)}, with a rate: adam:1e-3)"
    )


def _parse_widths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(width) for width in text.split(","))
    except ValueError:
        raise ValueError(f"--hidden takes widths such as 20 or 20,20; got {text!r}") from None


def _parse_scale(text: str | None) -> float | str | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return text
