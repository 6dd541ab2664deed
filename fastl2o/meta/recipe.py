"""Recipes: a whole meta-training as one TOML file, checked before anything runs.

The committed recipes (``fastl2o/recipes/*.toml``) reproduce the shipped rules; their fields are
``Recipe``'s.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from ._checks import check_number
from ._recipe_schema import ESTIMATORS, OPTIMIZERS, RecipeError, check_recipe, check_tasks, naming
from ._recipe_tasks import TASK_LISTS, TASKS, listed_families, transformed
from .imitation import Imitation
from .schedules import LRSchedule, as_horizon
from .tasks import Task
from .trainer import MetaTrainer
from .validation import Validation

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "Recipe",
    "RecipeError",
    "build_trainer",
    "load_recipe",
    "load_tasks",
    "parse_recipe",
    "recipe_names",
]


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. Tables are kept as the keyword arguments of what they configure.

    Attributes:
        name: of the recipe, and of the rule that it makes.
        outer_steps: N of ``trainer.fit(outer_steps=N)``.
        rule: ``family`` and the rule's constructor arguments.
        tasks: each with ``kind`` ("quadratic", "mlp", "drawn_mlp", "conv", "autoencoder",
            "char_rnn" or "char_transformer"), optional ``weight``, the task's arguments, and the
            transforms, from the inside out: ``batch_sizes`` ([low, high] of DrawnBatchSize),
            ``weight_normalization = true``, ``tensor_scaling`` (bound of TensorScaling),
            ``scaling`` (bound of RandomScaling), ``convex`` (num of WithConvex) and
            ``convex_scaling``, ``noise`` (sd of GradientNoise), ``sparse`` (fraction of
            SparseGradients). The kinds "ensemble" and "families" stand for all tasks of
            ``tasks.ensemble`` and ``tasks.families``, or those of the ``families`` listed, which
            share the ``weight`` equally; with ``held_out = true`` for the held-out ones, of
            ``tasks.held_out_families`` only to validate.
        estimator, trainer, optimizer, schedule, validation, imitation: arguments of those classes.
            A schedule's ``total`` is ``outer_steps`` unless given. ``validation`` and ``imitation``
            are None where left out.
        card: text for the rule's card, any keys.
        seed: of the rule's initialisation, the tasks and the validation runs.
        start: shipped name or path of the rule to continue from, instead of a fresh one; it must
            have the configuration of ``rule``.
        timescales: [shortest, longest] memory, in steps, that half of the units of LSTM layers, or
            of tensor and global GRUs, start with; see the rule's ``draw_timescales``.
        description: one line for people.
        source: what errors call it, the path of its file; not part of the recipe itself.
    """

    name: str
    outer_steps: int
    rule: dict[str, Any]
    tasks: list[dict[str, Any]]
    estimator: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] | None = None
    validation: dict[str, Any] | None = None
    imitation: dict[str, Any] | None = None
    card: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    start: str | None = None
    timescales: list[float] | None = None
    description: str = ""
    source: str = field(default="", compare=False, repr=False)

    def to_card(self) -> dict[str, Any]:
        """What a rule's card says of the recipe: all but where it lay."""
        return {key: value for key, value in asdict(self).items() if key != "source"}


def recipe_names() -> list[str]:
    """Names of the recipes that come with fastl2o."""
    folder = resources.files("fastl2o.recipes")
    return sorted(
        entry.name[: -len(".toml")] for entry in folder.iterdir() if entry.name.endswith(".toml")
    )


def load_recipe(name_or_path: str | os.PathLike[str]) -> Recipe:
    """Read and check a recipe: a committed name, or the path of a .toml file.

    Raises:
        FileNotFoundError: if there is no such recipe or file.
        RecipeError: if it cannot be used.

    Example:
        >>> load_recipe("lstm-quadratic").rule["family"]
        'lstm'
    """
    name = os.fspath(name_or_path)
    return parse_recipe(_read(name), f"recipe {name!r}" if name in recipe_names() else name)


def _read(name_or_path: str | os.PathLike[str]) -> bytes:
    given = os.fspath(name_or_path)
    if given in recipe_names():
        return resources.files("fastl2o.recipes").joinpath(f"{given}.toml").read_bytes()
    path = Path(given)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no recipe {given!r}: pass the path of a .toml file, or one of "
            f"{', '.join(recipe_names())}"
        )
    return path.read_bytes()


def parse_recipe(text: str | bytes, source: str = "") -> Recipe:
    """Check a recipe's TOML text; ``source`` names it in errors, those of ``build_trainer`` too.

    Raises:
        RecipeError: for text that is not TOML, unknown keys (with the nearest known one), wrong
            types or missing keys. Values that a rule, task or trainer refuses are found by
            ``build_trainer``.
    """
    called = source or "recipe"
    table = _parse(text, called)
    check_recipe(called, table)
    return Recipe(**table, source=source or f"recipe {table['name']!r}")


def _parse(text: str | bytes, source: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text.decode("utf-8") if isinstance(text, bytes) else text)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{source} is not valid TOML: {error}") from error


def load_tasks(
    name_or_path: str | os.PathLike[str], data: str | os.PathLike[str] | None = None
) -> list[Task]:
    """The tasks of a recipe, or of a .toml file of ``[[tasks]]`` tables alone.

    Args:
        name_or_path: what ``load_recipe`` accepts; a list of tasks may leave out all else.
        data: the MNIST .npz for tasks with ``data = "mnist"``; ``$FASTL2O_DATA`` by default.

    Raises:
        FileNotFoundError: if there is no such recipe, file or data.
        RecipeError: if a table cannot be used.

    Example:
        >>> load_tasks("lstm-quadratic")
        [Quadratic(dim=10, distribution='normal', init_scale=0.0)]
    """
    source = os.fspath(name_or_path)
    table = _parse(_read(name_or_path), source)
    if "tasks" not in table:
        raise RecipeError(f"{source} has no tasks; give at least one [[tasks]] table with a kind")
    if len(table) > 1:
        check_recipe(source, table)
    elif isinstance(table["tasks"], list):
        check_tasks(source, "tasks", table["tasks"])
    else:
        raise RecipeError(f"{source}: tasks must be tables, written [[tasks]]")
    return _build_tasks(source, "tasks", table["tasks"], data)[0]


def build_trainer(
    recipe: Recipe | str | os.PathLike[str],
    data: str | os.PathLike[str] | None = None,
    *,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    **overrides: Any,
) -> MetaTrainer:
    """The trainer of a recipe; its rule is initialised from the seed, or read from ``start``.

    Args:
        recipe: a ``Recipe``, or what ``load_recipe`` accepts.
        data: the MNIST .npz for tasks with ``data = "mnist"``; ``$FASTL2O_DATA`` by default.
        checkpoint_dir: of the trainer.
        overrides: further ``MetaTrainer`` arguments, such as ``progress`` or ``checkpoint_every``.

    Raises:
        RecipeError: if a value is impossible; the message names the recipe's file, the table, the
            key and what is accepted.
        FileNotFoundError: if the rule to start from or the data is missing.
        ValueError: if the data is not MNIST.

    Example:
        >>> trainer = build_trainer("lstm-quadratic")
        >>> trainer.rule.family
        'lstm'
    """
    from .._files import load
    from ..rules import from_config

    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    source = recipe.source or f"recipe {recipe.name!r}"
    with naming(source, "rule"):
        arguments = dict(recipe.rule)
        rule = from_config(arguments.pop("family"), arguments)
        generator = torch.Generator().manual_seed(recipe.seed)
        rule.reset_parameters(generator)
    if recipe.timescales is not None:
        with naming(source, "timescales"):
            if recipe.start is not None:
                raise ValueError(
                    f"they are of a fresh rule, and this one starts from {recipe.start!r}; leave "
                    "timescales or start out"
                )
            low, high = recipe.timescales
            rule.draw_timescales(low, high, generator)
    if recipe.start is not None:
        with _naming_files(source, "start"):
            first = load(recipe.start, family=rule.family)
            if first.config() != rule.config():
                raise ValueError(
                    f"{recipe.start!r} is {first}, but [rule] asks for {rule}; they must agree"
                )
            rule.load_state_dict(first.state_dict())
    tasks, weights = _build_tasks(source, "tasks", recipe.tasks, data)
    with naming(source, "estimator"):
        arguments = dict(recipe.estimator)
        if arguments.get("unroll") == "horizon":
            arguments["unroll"] = None
        estimator = ESTIMATORS[arguments.pop("kind", "bptt")][0](**arguments)
    with naming(source, "optimizer"):
        arguments = {"lr": 1e-3, **recipe.optimizer}
        make = OPTIMIZERS[arguments.pop("name", "adam")][0]
        arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
        check_number("lr", arguments["lr"], minimum=0)
        optimizer = make(rule.parameters(), **arguments)
    with naming(source, "schedule"):
        total = {"total": recipe.outer_steps}
        schedule = None if recipe.schedule is None else LRSchedule(**{**total, **recipe.schedule})
    validation = None
    if recipe.validation is not None:
        arguments = {"seed": recipe.seed, **recipe.validation}
        if "tasks" in arguments:
            place = "validation.tasks"
            arguments["tasks"], _ = _build_tasks(source, place, arguments["tasks"], data)
        with naming(source, "validation"):
            validation = Validation(**arguments)
    with naming(source, "imitation"):
        imitation = None
        if recipe.imitation is not None:
            arguments = dict(recipe.imitation)
            if "betas" in arguments:
                arguments["betas"] = tuple(arguments["betas"])
            imitation = Imitation(**arguments)
    for name in ("horizon", "unroll"):
        with naming(source, f"trainer.{name}"):  # parts of either are called the same
            as_horizon(recipe.trainer.get(name, 100), name)
    with naming(source, "trainer"):
        return MetaTrainer(
            rule,
            tasks,
            estimator,
            optimizer=optimizer,
            seed=recipe.seed,
            schedule=schedule,
            task_weights=weights,
            validation=validation,
            imitation=imitation,
            checkpoint_dir=checkpoint_dir,
            **{**recipe.trainer, **overrides},
        )


def _build_tasks(
    source: str,
    where: str,
    tables: list[dict[str, Any]],
    data: str | os.PathLike[str] | None,
) -> tuple[list[Task], list[float]]:
    """The tasks of a list of tables, and how often each is drawn."""
    tasks: list[Task] = []
    weights: list[float] = []
    for index, table in enumerate(tables):
        place = f"{where}[{index}]"
        with naming(source, place):
            check_number("weight", table.get("weight", 1.0), minimum=0, exclusive=True)
        weight = float(table.get("weight", 1.0))
        if table["kind"] not in TASK_LISTS:
            tasks.append(_build_task(source, place, table, data))
            weights.append(weight)
            continue
        with _naming_files(source, place):
            families = listed_families(_with_data(table, data))
        for family in families.values():
            tasks += family
            weights += [weight / len(families) / len(family)] * len(family)
    return tasks, weights


def _build_task(
    source: str, where: str, table: Mapping[str, Any], data: str | os.PathLike[str] | None
) -> Task:
    make, known = TASKS[table["kind"]]
    table = _with_data(table, data)
    with _naming_files(source, where):
        return transformed(make(**{key: table[key] for key in known if key in table}), table)


def _with_data(table: Mapping[str, Any], data: str | os.PathLike[str] | None) -> Mapping[str, Any]:
    """The table, with the images that the caller gives in place of those to be found."""
    wanted = table.get("data") == "mnist" and data is not None
    return {**table, "data": data} if wanted else table


@contextmanager
def _naming_files(source: str, where: str) -> Iterator[None]:
    """``naming``, also of files that are not there."""
    try:
        with naming(source, where):
            yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{source}, {where}: {error}") from None
