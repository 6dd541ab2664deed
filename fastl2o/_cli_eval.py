"""``fastl2o eval``: its options, and the tasks and optimizers that they name."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._cli_checks import MAX_SEED, check_file, load_rules

if TYPE_CHECKING:
    from .evaluate import Entrant
    from .meta.tasks import Task

__all__ = ["evaluate"]

_NETWORK = {"hidden", "activation", "init_scale", "batch_size", "split"}
_TASK_OPTIONS = {
    "quadratic": {"dim", "init_scale"},
    "digits": _NETWORK,
    "mnist": {*_NETWORK, "data"},
}
_ALL_FAMILIES = "ensemble"


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
            help="quadratic (default), digits, mnist, ensemble, ensemble/FAMILY, or the [[tasks]] "
            "of a recipe (shipped name or .toml path), on what they hold out of meta-training; "
            "repeatable."
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
    tasks = _make_tasks(task or ["quadratic"], chosen)
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
        out.write_text(text + "\n", encoding="utf-8")
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
        f"there is no rule or optimizer {text!r}; {_nearest(text, [*zoo.names(), *designed])}give "
        f"a shipped rule ({', '.join(zoo.names())}), a path that ends in .safetensors, or a "
        f"hand-designed optimizer ({', '.join(designed)}, with a rate: adam:1e-3)"
    )


def _nearest(text: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(text, known, n=1)
    return f"did you mean {near[0]!r}? " if near else ""


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


def _make_tasks(names: Sequence[str], options: dict[str, Any]) -> dict[str, Task]:
    """The tasks by the names to report them under; those of a list are numbered."""
    from . import meta

    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"--task {', '.join(twice)} given more than once; give each task once")
    accepted = {name: _options_of(name) for name in names}
    unused = sorted(
        "--" + option.replace("_", "-") for option in set(options).difference(*accepted.values())
    )
    if unused:
        raise ValueError(f"--task {', '.join(names)} has no use for {', '.join(unused)}")
    files = [Path(name).name for name in names]
    tasks: dict[str, Task] = {}
    for name, file in zip(names, files, strict=True):
        mine = {key: value for key, value in options.items() if key in accepted[name]}
        if name == "quadratic":
            tasks[name] = meta.tasks.Quadratic(**mine)
        elif name in _TASK_OPTIONS:
            network = {"data": name, "split": "meta_valid", **mine}
            tasks[name] = meta.tasks.MLPClassification(**network)
        else:
            label = file if name.endswith(".toml") and files.count(file) == 1 else name
            listed = _listed_tasks(name, mine.get("data"))
            for index, task in enumerate(listed, 1):
                tasks[label if len(listed) == 1 else f"{label}/{index}"] = task
    return tasks


def _listed_tasks(name: str, data: str | None) -> list[Task]:
    """The tasks of an ensemble's family, of all of them, or of a recipe."""
    from . import meta
    from .meta.recipe import load_tasks

    first, _, family = name.partition("/")
    if first == _ALL_FAMILIES:
        families = meta.tasks.ensemble(held_out=True)
        return (
            families[family] if family else [task for tasks in families.values() for task in tasks]
        )
    return [task.held_out() for task in load_tasks(name, data)]


def _options_of(name: str) -> set[str]:
    """Task options that a ``--task`` takes; refuses names that stand for nothing."""
    from . import meta
    from .meta.recipe import recipe_names

    if name in _TASK_OPTIONS:
        return _TASK_OPTIONS[name]
    families = [f"{_ALL_FAMILIES}/{family}" for family in meta.tasks.ensemble()]
    if name in (_ALL_FAMILIES, *families):
        return set()
    if name.endswith(".toml") or name in recipe_names():
        return {"data"}
    known = [*_TASK_OPTIONS, _ALL_FAMILIES, *families, *recipe_names()]
    raise ValueError(
        f"--task: there is no task {name!r}; {_nearest(name, known)}give one of "
        f"{', '.join(known)}, or the path of a .toml file with [[tasks]]"
    )
