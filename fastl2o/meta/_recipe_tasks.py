"""The kinds of tasks that recipes know, the keys of each, and the transforms around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from . import tasks
from .tasks import Task

__all__ = ["TASKS", "TASK_KEYS", "TASK_LISTS", "listed_families", "transformed"]

Keys = dict[str, tuple[type, ...]]

_NUMBER = (int, float)
_DATA: Keys = {
    "data": (str,),
    "batch_size": (int,),
    "split": (str,),
    "fraction": _NUMBER,
}
_MLP: Keys = {
    **_DATA,
    "hidden": (list,),
    "activation": (str,),
    "init_scale": (int, float, str),
}
_TEXT: Keys = {
    "length": (int,),
    "batch_size": (int,),
    "language": (int,),
    "split": (str,),
    "fraction": _NUMBER,
}
TASKS: dict[str, tuple[Callable[..., Task], Keys]] = {
    "quadratic": (
        tasks.Quadratic,
        {"dim": (int,), "distribution": (str,), "init_scale": _NUMBER},
    ),
    "mlp": (tasks.MLPClassification, _MLP),
    "drawn_mlp": (
        tasks.DrawnMLP,
        {
            **_DATA,
            "depth": (int, list),
            "width": (int, list),
            "activations": (list,),
            "init_scale": (int, float, str),
        },
    ),
    "conv": (
        tasks.ConvClassification,
        {**_DATA, "channels": (list,), "kernel_size": (int,), "activation": (str,)},
    ),
    "autoencoder": (tasks.Autoencoder, {**_MLP, "loss": (str,)}),
    "char_rnn": (tasks.CharRNN, {**_TEXT, "cell": (str,), "hidden_size": (int,)}),
    "char_transformer": (
        tasks.CharTransformer,
        {
            **_TEXT,
            "width": (int,),
            "num_heads": (int,),
            "num_layers": (int,),
            "feedforward": (int,),
        },
    ),
}
TASK_KEYS: Keys = {
    "kind": (str,),
    "weight": _NUMBER,
    "batch_sizes": (list,),
    "weight_normalization": (bool,),
    "tensor_scaling": _NUMBER,
    "scaling": _NUMBER,
    "convex": (int,),
    "convex_scaling": _NUMBER,
    "noise": _NUMBER,
    "sparse": _NUMBER,
}
_LIST: Keys = {"kind": (str,), "weight": _NUMBER, "families": (list,), "held_out": (bool,)}
TASK_LISTS: dict[str, Keys] = {
    "ensemble": {**_LIST, "networks": (bool,)},
    "families": {**_LIST, "data": (str,), "small_problems": (bool,)},
}


def listed_families(table: Mapping[str, Any]) -> dict[str, list[Task]]:
    """The families that a table of a kind of ``TASK_LISTS`` stands for, all of them by default.

    Raises:
        ValueError: for unknown families, or arguments that the list does not take.
    """
    options = {k: v for k, v in table.items() if k not in ("kind", "weight", "families")}
    if table["kind"] == "ensemble":
        found = tasks.ensemble(**options)
    elif options.pop("held_out", False):
        if options:
            raise ValueError(f"held-out families take no {', '.join(options)}; leave it out")
        found = tasks.held_out_families()
    else:
        found = tasks.families(**options)
    chosen = table.get("families", list(found))
    if not chosen or any(name not in found for name in chosen):
        raise ValueError(f"families must be a list of some of {', '.join(found)}; got {chosen!r}")
    return {name: found[name] for name in chosen}


def transformed(task: Task, table: Mapping[str, Any]) -> Task:
    """The task with the transforms of a table around it, in the order of ``TASK_KEYS``.

    Raises:
        ValueError, TypeError: for values that a transform refuses.
    """
    if "convex_scaling" in table and "convex" not in table:
        raise ValueError("convex_scaling needs convex, the number of extra coordinates")
    if "batch_sizes" in table:
        if len(table["batch_sizes"]) != 2:
            raise ValueError(f"batch_sizes must be [low, high], got {table['batch_sizes']!r}")
        with _keys({"task": "batch_sizes: task", "low, high": "batch_sizes"}):
            task = tasks.DrawnBatchSize(task, *table["batch_sizes"])
    if table.get("weight_normalization", False):
        task = tasks.WeightNormalization(task)
    if "tensor_scaling" in table:
        with _keys({"bound": "tensor_scaling"}):
            task = tasks.TensorScaling(task, table["tensor_scaling"])
    # RNNprop's authors scale the network by 3 and the convex part by 1, hence two keys.
    if "scaling" in table:
        with _keys({"bound": "scaling"}):
            task = tasks.RandomScaling(task, table["scaling"])
    if "convex" in table:
        with _keys({"num": "convex", "bound": "convex_scaling"}):
            task = tasks.WithConvex(task, table["convex"], table.get("convex_scaling", 0.0))
    if "noise" in table:
        with _keys({"sd": "noise"}):
            task = tasks.GradientNoise(task, table["noise"])
    if "sparse" in table:
        with _keys({"fraction": "sparse"}):
            task = tasks.SparseGradients(task, table["sparse"])
    return task


@contextmanager
def _keys(names: Mapping[str, str]) -> Iterator[None]:
    """Call arguments by the keys that stand for them, in refusals that begin with one."""
    try:
        yield
    except (ValueError, TypeError) as error:
        text = str(error)
        argument = next((name for name in names if text.startswith(f"{name} ")), None)
        if argument is None:
            raise
        raise type(error)(names[argument] + text.removeprefix(argument)) from error
