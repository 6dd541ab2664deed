"""Tasks by the names that ``fastl2o eval`` takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._cli_checks import nearest

if TYPE_CHECKING:
    from .meta.tasks import Task

__all__ = ["make_tasks"]

_NETWORK = {"hidden", "activation", "init_scale", "batch_size", "split"}
_TASK_OPTIONS = {
    "quadratic": {"dim", "init_scale"},
    "digits": _NETWORK,
    "mnist": {*_NETWORK, "data"},
}
_LISTS = ("ensemble", "families", "held_out")


def make_tasks(names: Sequence[str], options: dict[str, Any]) -> dict[str, Task]:
    """The tasks by the names to report them under; those of a list are numbered.

    Args:
        names: as given to ``--task``.
        options: arguments of the tasks, such as ``hidden``; each must be of use to one of them.

    Raises:
        ValueError: for names that stand for nothing, options without use, and recipes that cannot
            be used.
        FileNotFoundError: for files that are not there.
    """
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
            listed = [task.held_out() for task in _listed_tasks(name, mine.get("data"))]
            for index, task in enumerate(listed, 1):
                tasks[label if len(listed) == 1 else f"{label}/{index}"] = task
    return tasks


def _listed_tasks(name: str, data: str | None) -> list[Task]:
    """The tasks of a family, of all families of a list, or of a recipe."""
    from .meta.recipe import load_tasks

    first, _, chosen = name.partition("/")
    if first not in _LISTS:
        return load_tasks(name, data)
    families = _families(first)
    if not chosen:
        return [task for tasks in families.values() for task in tasks]
    if chosen not in families:
        raise ValueError(
            f"--task: {first} has no family {chosen!r}; {nearest(chosen, list(families))}give one "
            f"of {', '.join(f'{first}/{family}' for family in families)}, or {first} for all"
        )
    return families[chosen]


def _families(name: str) -> dict[str, list[Task]]:
    from .meta import tasks

    if name == "ensemble":
        return tasks.ensemble(held_out=True)
    return tasks.held_out_families() if name == "held_out" else tasks.families(small_problems=False)


def _options_of(name: str) -> set[str]:
    """Task options that a ``--task`` takes; refuses names that stand for nothing."""
    from .meta.recipe import recipe_names

    if name in _TASK_OPTIONS:
        return _TASK_OPTIONS[name]
    if name.partition("/")[0] in _LISTS:
        return set()
    if name.endswith(".toml") or name in recipe_names():
        return {"data"}
    known = [*_TASK_OPTIONS, *_LISTS, *recipe_names()]
    raise ValueError(
        f"--task: there is no task {name!r}; {nearest(name, known)}give one of "
        f"{', '.join(known)}, a family of a list such as ensemble/bowl, or the path of a .toml "
        "file with [[tasks]]"
    )
