"""What a recipe may hold: its keys, their types, and the checks that name what is wrong."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from ._checks import check_number
from ._recipe_tasks import TASK_KEYS, TASK_LISTS, TASKS, Keys
from .estimators import Estimator, TruncatedBPTT
from .evolution import ES, PES
from .optimizers import MuonAdam

__all__ = ["ESTIMATORS", "OPTIMIZERS", "RecipeError", "check_recipe", "check_tasks", "naming"]


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names the file, the key and what is accepted."""


OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], Keys]] = {
    "adam": (torch.optim.Adam, {"lr": (int, float), "betas": (list,), "eps": (int, float)}),
    "adamw": (
        torch.optim.AdamW,
        {"lr": (int, float), "betas": (list,), "eps": (int, float), "weight_decay": (int, float)},
    ),
    "muon_adam": (
        MuonAdam,
        {
            "lr": (int, float),
            "momentum": (int, float),
            "adam_lr": (int, float),
            "betas": (list,),
        },
    ),
    "sgd": (torch.optim.SGD, {"lr": (int, float), "momentum": (int, float)}),
}
_SCHEDULE_KEYS: Keys = {
    "kind": (str,),
    "warmup": (int,),
    "final": (int, float),
    "total": (int,),
}
_EVOLUTION_KEYS: Keys = {
    "unroll": (int, str),
    "sigma": (int, float),
    "objective": (str,),
    "held_out": (bool,),
}
ESTIMATORS: dict[str, tuple[Callable[..., Estimator], Keys]] = {
    "bptt": (
        TruncatedBPTT,
        {
            "unroll": (int, str),
            "objective": (str,),
            "final_term": (bool,),
            "second_order": (bool,),
            "full_data": (bool,),
            "held_out": (bool,),
            "segments": (int, str),
        },
    ),
    "es": (ES, _EVOLUTION_KEYS),
    "pes": (PES, {**_EVOLUTION_KEYS, "unroll": (int,)}),
}
_TRAINER_KEYS: Keys = {
    "horizon": (int, list, dict),
    "unroll": (int, list, dict),
    "runs": (int,),
    "accumulate": (int,),
    "groups": (int,),
    "clip_grad": (int, float),
    "average": (int, float),
    "log_snr": (bool,),
    "divergence": (int, float),
}
_VALIDATION_KEYS: Keys = {
    "every": (int,),
    "runs": (int,),
    "horizon": (int,),
    "metric": (str,),
    "seed": (int,),
    "tasks": (list,),
}
_IMITATION_KEYS: Keys = {
    "probability": (int, float),
    "lr": (int, float),
    "betas": (list,),
    "decay": (int, float),
    "relative": (bool,),
    "own_path": (int, float),
    "coordinates": (int,),
    "schedule": (str,),
    "nesterov": (bool,),
    "cautious": (bool,),
}
_TOP_KEYS: Keys = {
    "name": (str,),
    "description": (str,),
    "seed": (int,),
    "outer_steps": (int,),
    "start": (str,),
    "timescales": (list,),
    "rule": (dict,),
    "tasks": (list,),
    "estimator": (dict,),
    "trainer": (dict,),
    "optimizer": (dict,),
    "schedule": (dict,),
    "validation": (dict,),
    "imitation": (dict,),
    "card": (dict,),
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_REQUIRED = ("name", "outer_steps", "rule", "tasks")
_NAMES = {
    str: "text",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "a table",
}


def check_recipe(source: str, table: dict[str, Any]) -> None:
    """Check a parsed recipe's keys and types, and that nothing it needs is missing.

    Raises:
        RecipeError: naming the recipe, the key and what is accepted.
    """
    _check_table(source, "", table, _TOP_KEYS)
    for key in _REQUIRED:
        if key not in table:
            raise RecipeError(
                f"{source}: the key {key!r} is missing; a recipe needs {', '.join(_REQUIRED)}"
            )
    _check_rule(source, table["rule"])
    check_tasks(source, "tasks", table["tasks"])
    _check_trained(source, table["tasks"])
    tables = {
        "trainer": _TRAINER_KEYS,
        "schedule": _SCHEDULE_KEYS,
        "validation": _VALIDATION_KEYS,
        "imitation": _IMITATION_KEYS,
    }
    for name, known in tables.items():
        if name in table:
            _check_table(source, name, table[name], known)
    if "tasks" in table.get("validation", {}):
        check_tasks(source, "validation.tasks", table["validation"]["tasks"])
    _check_named(source, "optimizer", "name", "adam", table.get("optimizer", {}), OPTIMIZERS)
    if len(table.get("optimizer", {}).get("betas", (0, 0))) != 2:
        raise RecipeError(
            f"{source}: optimizer.betas must be a list of two, got {table['optimizer']['betas']!r}"
        )
    estimator = table.get("estimator", {})
    _check_named(source, "estimator", "kind", "bptt", estimator, ESTIMATORS)
    if isinstance(estimator.get("unroll"), str) and estimator["unroll"] != "horizon":
        raise RecipeError(
            f'{source}: estimator.unroll must be an integer, or "horizon" for windows as long '
            f"as the runs; got {estimator['unroll']!r}"
        )
    if len(table.get("timescales", (0, 0))) != 2:
        raise RecipeError(
            f"{source}: timescales must be [shortest, longest], got {table['timescales']!r}"
        )
    for key, minimum in (("seed", 0), ("outer_steps", 1)):
        with naming(source, key):
            check_number(key, table.get(key, minimum), minimum=minimum, integer=True)
            if table.get(key, minimum) >= 2**63:
                raise ValueError(f"{key} must be below 2**63, got {table[key]}")
    if table.get("schedule", {}).get("warmup", 0) > table["outer_steps"]:
        raise RecipeError(
            f"{source}: schedule.warmup must be at most outer_steps = {table['outer_steps']}, or "
            f"the rate never gets to what optimizer.lr says; got {table['schedule']['warmup']}"
        )
    if not _NAME.fullmatch(table["name"]):
        raise RecipeError(
            f"{source}: name is that of the rule's file: letters, digits, '.', '_' and '-', "
            f"beginning with a letter or digit; got {table['name']!r}"
        )
    try:
        json.dumps(table.get("card", {}), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f"{source}: card holds what a rule file cannot ({error}); accepted are text, finite "
            "numbers, true, false, lists and tables"
        ) from error


@contextmanager
def naming(source: str, where: str) -> Iterator[None]:
    """Make refusals of values inside the block say where in the recipe the value stands."""
    try:
        yield
    except RecipeError:
        raise
    except (ValueError, TypeError) as error:
        raise RecipeError(f"{source}, {where}: {error}") from error


def _check_rule(source: str, rule: dict[str, Any]) -> None:
    from ..rules import FAMILIES

    family = rule.get("family")
    if family not in FAMILIES:
        raise RecipeError(
            f"{source}: rule.family must be one of {', '.join(sorted(FAMILIES))}; got {family!r}"
        )
    known = {key: (object,) for key in FAMILIES[family].__init__.__annotations__ if key != "return"}
    _check_table(source, "rule", rule, {"family": (str,), **known})


def check_tasks(source: str, where: str, tasks: list[Any]) -> None:
    """Check a list of tasks that stands at ``where``: kinds, keys and types.

    Raises:
        RecipeError: naming the recipe, the key and what is accepted.
    """
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
        if kind not in TASKS and kind not in TASK_LISTS:
            raise RecipeError(
                f"{source}: {place}.kind must be one of {', '.join([*TASKS, *TASK_LISTS])}; "
                f"got {kind!r}"
            )
        known = TASK_LISTS[kind] if kind in TASK_LISTS else {**TASK_KEYS, **TASKS[kind][1]}
        _check_table(source, place, task, known)


def _check_trained(source: str, tasks: list[dict[str, Any]]) -> None:
    for index, task in enumerate(tasks):
        if task["kind"] == "families" and task.get("held_out", False):
            raise RecipeError(
                f"{source}: tasks[{index}] asks for held-out families, which no rule is "
                "meta-trained on; put them under [[validation.tasks]]"
            )


def _check_named(
    source: str,
    where: str,
    key: str,
    default: str,
    table: Mapping[str, Any],
    kinds: Mapping[str, tuple[Callable[..., Any], Keys]],
) -> None:
    """A table whose other keys depend on which of ``kinds`` its ``key`` names."""
    name = table.get(key, default)
    if name not in kinds:
        raise RecipeError(
            f"{source}: {where}.{key} must be one of {', '.join(kinds)}; got {name!r}"
        )
    _check_table(source, where, table, {key: (str,), **kinds[name][1]})


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
