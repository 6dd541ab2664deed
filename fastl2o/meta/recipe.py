"""Recipes: a whole meta-training as one TOML file, checked before anything runs.

The committed recipes (``fastl2o/recipes/*.toml``) reproduce the shipped rules; their fields are ``Recipe``'s.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from .estimators import TruncatedBPTT
from .imitation import Imitation
from .schedules import LRSchedule, as_horizon
from .tasks import MLPClassification, Quadratic, RandomScaling, Task, WithConvex
from .tasks._base import check_number
from .trainer import MetaTrainer
from .validation import Validation

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["Recipe", "RecipeError", "build_trainer", "load_recipe", "parse_recipe", "recipe_names"]


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names the file, the key and what is accepted."""


_TASKS: dict[str, tuple[Callable[..., Task], dict[str, tuple[type, ...]]]] = {
    "quadratic": (Quadratic, {"dim": (int,), "distribution": (str,), "init_scale": (int, float)}),
    "mlp": (
        MLPClassification,
        {
            "data": (str,),
            "hidden": (list,),
            "activation": (str,),
            "batch_size": (int,),
            "init_scale": (int, float, str),
            "split": (str,),
            "fraction": (int, float),
        },
    ),
}
_TASK_KEYS: dict[str, tuple[type, ...]] = {
    "kind": (str,), "weight": (int, float), "convex": (int,), "convex_scaling": (int, float), "scaling": (int, float),
}  # fmt: skip
_OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, tuple[type, ...]]]] = {
    "adam": (torch.optim.Adam, {"lr": (int, float), "betas": (list,), "eps": (int, float)}),
    "adamw": (
        torch.optim.AdamW,
        {"lr": (int, float), "betas": (list,), "eps": (int, float), "weight_decay": (int, float)},
    ),
    "sgd": (torch.optim.SGD, {"lr": (int, float), "momentum": (int, float)}),
}
_SCHEDULE_KEYS: dict[str, tuple[type, ...]] = {
    "kind": (str,),
    "warmup": (int,),
    "final": (int, float),
    "total": (int,),
}
_ESTIMATOR_KEYS: dict[str, tuple[type, ...]] = {
    "unroll": (int,), "objective": (str,), "final_term": (bool,), "second_order": (bool,),
}  # fmt: skip
_TRAINER_KEYS: dict[str, tuple[type, ...]] = {
    "horizon": (int, list), "runs": (int,), "groups": (int,), "clip_grad": (int, float), "divergence": (int, float),
}  # fmt: skip
_VALIDATION_KEYS: dict[str, tuple[type, ...]] = {
    "every": (int,), "runs": (int,), "horizon": (int,), "metric": (str,), "seed": (int,), "tasks": (list,),
}  # fmt: skip
_IMITATION_KEYS: dict[str, tuple[type, ...]] = {"probability": (int, float), "lr": (int, float)}
_TOP_KEYS: dict[str, tuple[type, ...]] = {
    "name": (str,), "description": (str,), "seed": (int,), "outer_steps": (int,), "rule": (dict,), "tasks": (list,),
    "estimator": (dict,), "trainer": (dict,), "optimizer": (dict,), "schedule": (dict,), "validation": (dict,),
    "imitation": (dict,), "card": (dict,),
}  # fmt: skip
_REQUIRED = ("name", "outer_steps", "rule", "tasks")
_NAMES = {
    str: "text",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "a table",
}


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. Tables are kept as the keyword arguments of what they configure.

    Attributes:
        name: of the recipe, and of the rule that it makes.
        outer_steps: N of ``trainer.fit(outer_steps=N)``.
        rule: ``family`` and the rule's constructor arguments.
        tasks: each with ``kind`` ("quadratic" or "mlp"), optional ``weight``, the task's arguments, and the
            transforms ``scaling`` (bound of RandomScaling), ``convex`` (num of WithConvex), ``convex_scaling``.
        estimator, trainer, optimizer, schedule, validation, imitation: arguments of those classes. A schedule's
            ``total`` is ``outer_steps`` unless given. ``validation`` and ``imitation`` are None where left out.
        card: text for the rule's card, any keys.
        seed: of the rule's initialisation, the tasks and the validation runs.
        description: one line for people.
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
    description: str = ""


def recipe_names() -> list[str]:
    """Names of the recipes that come with fastl2o."""
    folder = resources.files("fastl2o.recipes")
    return sorted(
        entry.name[: -len(".toml")] for entry in folder.iterdir() if entry.name.endswith(".toml")
    )


def load_recipe(name_or_path: str | os.PathLike[str]) -> Recipe:
    """Read and check a recipe: a committed name such as ``"lstm-quadratic"``, or the path of a .toml file.

    Raises:
        FileNotFoundError: if there is no such recipe or file.
        RecipeError: if it cannot be used.

    Example:
        >>> load_recipe("lstm-quadratic").rule["family"]
        'lstm'
    """
    given = os.fspath(name_or_path)
    if given in recipe_names():
        text = resources.files("fastl2o.recipes").joinpath(f"{given}.toml").read_text("utf-8")
        return parse_recipe(text, given)
    path = Path(given)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no recipe {given!r}: pass the path of a .toml file, or one of {', '.join(recipe_names())}"
        )
    return parse_recipe(path.read_bytes(), given)


def parse_recipe(text: str | bytes, source: str = "recipe") -> Recipe:
    """Check a recipe's TOML text; ``source`` names it in errors.

    Raises:
        RecipeError: for text that is not TOML, unknown keys (with the nearest known one), wrong types or missing keys.
            Values that a rule, task or trainer refuses are found by ``build_trainer``.
    """
    try:
        table = tomllib.loads(text.decode("utf-8") if isinstance(text, bytes) else text)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{source} is not valid TOML: {error}") from error
    _check_table(source, "", table, _TOP_KEYS)
    for key in _REQUIRED:
        if key not in table:
            raise RecipeError(
                f"{source}: the key {key!r} is missing; a recipe needs {', '.join(_REQUIRED)}"
            )
    _check_rule(source, table["rule"])
    _check_tasks(source, "tasks", table["tasks"])
    tables = {
        "estimator": _ESTIMATOR_KEYS,
        "trainer": _TRAINER_KEYS,
        "schedule": _SCHEDULE_KEYS,
        "validation": _VALIDATION_KEYS,
        "imitation": _IMITATION_KEYS,
    }
    for name, known in tables.items():
        if name in table:
            _check_table(source, name, table[name], known)
    if "tasks" in table.get("validation", {}):
        _check_tasks(source, "validation.tasks", table["validation"]["tasks"])
    _check_optimizer(source, table.get("optimizer", {}))
    for key in ("seed", "outer_steps"):
        with _naming(source, key):
            check_number(key, table.get(key, 0), minimum=0, integer=True)
    return Recipe(**table)


def build_trainer(
    recipe: Recipe | str | os.PathLike[str],
    data: str | os.PathLike[str] | None = None,
    *,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    **overrides: Any,
) -> MetaTrainer:
    """The trainer of a recipe, with its rule freshly initialised from the recipe's seed.

    Args:
        recipe: a ``Recipe``, or what ``load_recipe`` accepts.
        data: the MNIST .npz for tasks with ``data = "mnist"``; ``$FASTL2O_DATA`` by default.
        checkpoint_dir: of the trainer.
        overrides: further ``MetaTrainer`` arguments, such as ``progress`` or ``checkpoint_every``.

    Raises:
        RecipeError: if a value is impossible; the message names the table and the accepted values.
        FileNotFoundError, ValueError: if the data is missing or not MNIST.

    Example:
        >>> trainer = build_trainer("lstm-quadratic")
        >>> trainer.rule.family
        'lstm'
    """
    from ..rules import from_config

    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    source = f"recipe {recipe.name!r}"
    with _naming(source, "rule"):
        arguments = dict(recipe.rule)
        rule = from_config(arguments.pop("family"), arguments)
        rule.reset_parameters(torch.Generator().manual_seed(recipe.seed))
    tasks = [
        _build_task(source, f"tasks[{i}]", table, data) for i, table in enumerate(recipe.tasks)
    ]
    weights = [float(table.get("weight", 1.0)) for table in recipe.tasks]
    with _naming(source, "estimator"):
        estimator = TruncatedBPTT(**recipe.estimator)
    with _naming(source, "optimizer"):
        arguments = {"lr": 1e-3, **recipe.optimizer}
        make = _OPTIMIZERS[arguments.pop("name", "adam")][0]
        arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
        optimizer = make(rule.parameters(), **arguments)
    with _naming(source, "schedule"):
        total = {"total": max(1, recipe.outer_steps)}
        schedule = None if recipe.schedule is None else LRSchedule(**{**total, **recipe.schedule})
    validation = None
    if recipe.validation is not None:
        arguments = {"seed": recipe.seed, **recipe.validation}
        if "tasks" in arguments:
            tables = enumerate(arguments["tasks"])
            arguments["tasks"] = [
                _build_task(source, f"validation.tasks[{i}]", t, data) for i, t in tables
            ]
        with _naming(source, "validation"):
            validation = Validation(**arguments)
    with _naming(source, "imitation"):
        imitation = None if recipe.imitation is None else Imitation(**recipe.imitation)
    with _naming(source, "trainer"):
        as_horizon(recipe.trainer.get("horizon", 100))
        return MetaTrainer(
            rule, tasks, estimator, optimizer=optimizer, seed=recipe.seed, schedule=schedule, task_weights=weights,
            validation=validation, imitation=imitation, checkpoint_dir=checkpoint_dir, **{**recipe.trainer, **overrides},
        )  # fmt: skip


def _build_task(
    source: str, where: str, table: Mapping[str, Any], data: str | os.PathLike[str] | None
) -> Task:
    make, known = _TASKS[table["kind"]]
    arguments = {key: table[key] for key in known if key in table}
    if arguments.get("data") == "mnist" and data is not None:
        arguments["data"] = data
    try:
        with _naming(source, where):
            task: Task = make(**arguments)
            # The authors scale the task by 3 and the convex part, if at all, by 1: each by its own key.
            if "scaling" in table:
                task = RandomScaling(task, table["scaling"])
            if "convex" in table:
                task = WithConvex(task, table["convex"], table.get("convex_scaling", 0.0))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{source}, {where}: {error}") from None
    return task


class _naming:  # noqa: N801 - reads as a statement: with _naming(source, "rule"): ...
    """Turn refusals of values inside the block into a RecipeError that says where in the recipe they stand."""

    def __init__(self, source: str, where: str) -> None:
        self.prefix = f"{source}, {where}"

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        if isinstance(error, (ValueError, TypeError)) and not isinstance(error, RecipeError):
            raise RecipeError(f"{self.prefix}: {error}") from error


def _check_rule(source: str, rule: dict[str, Any]) -> None:
    from ..rules import FAMILIES

    family = rule.get("family")
    if family not in FAMILIES:
        raise RecipeError(
            f"{source}: rule.family must be one of {', '.join(sorted(FAMILIES))}; got {family!r}"
        )
    known = {key: (object,) for key in FAMILIES[family].__init__.__annotations__ if key != "return"}
    _check_table(source, "rule", rule, {"family": (str,), **known})


def _check_tasks(source: str, where: str, tasks: list[Any]) -> None:
    if not tasks:
        raise RecipeError(
            f"{source}: {where} is empty; give at least one [[{where}]] table with a kind"
        )
    for index, task in enumerate(tasks):
        place = f"{where}[{index}]"
        if not isinstance(task, dict):
            raise RecipeError(
                f"{source}: {place} must be a table, written [[{where}]]; got {task!r}"
            )
        kind = task.get("kind")
        if kind not in _TASKS:
            raise RecipeError(
                f"{source}: {place}.kind must be one of {', '.join(_TASKS)}; got {kind!r}"
            )
        _check_table(source, place, task, {**_TASK_KEYS, **_TASKS[kind][1]})


def _check_optimizer(source: str, table: dict[str, Any]) -> None:
    name = table.get("name", "adam")
    if name not in _OPTIMIZERS:
        raise RecipeError(
            f"{source}: optimizer.name must be one of {', '.join(_OPTIMIZERS)}; got {name!r}"
        )
    _check_table(source, "optimizer", table, {"name": (str,), **_OPTIMIZERS[name][1]})


def _check_table(
    source: str, where: str, table: Mapping[str, Any], known: Mapping[str, tuple[type, ...]]
) -> None:
    for key, value in table.items():
        place = f"{where}.{key}" if where else key
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise RecipeError(
                f"{source}: unknown key {place!r}; {hint}known keys here are {', '.join(known)}"
            )
        kinds = known[key]
        # TOML's true is Python's True, which is an int: it is only a bool here.
        if object not in kinds and (
            not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)
        ):
            accepted = " or ".join(dict.fromkeys(_NAMES[kind] for kind in kinds))
            raise RecipeError(f"{source}: {place} must be {accepted}, got {value!r}")
