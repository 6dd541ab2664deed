"""Tasks: families of optimizees with data (see ``Task``), and tasks made from tasks."""

from ._base import Batch, Task, TaskRun
from ._data import DATA_VARIABLE, find_mnist
from ._mlp import MLPClassification
from ._quadratic import Quadratic
from ._transforms import RandomScaling, WithConvex

__all__ = [
    "DATA_VARIABLE",
    "Batch",
    "MLPClassification",
    "Quadratic",
    "RandomScaling",
    "Task",
    "TaskRun",
    "WithConvex",
    "find_mnist",
]
