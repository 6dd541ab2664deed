"""Tasks: families of optimizees with data (see ``Task``), and tasks made from tasks."""

from ._autoencoder import Autoencoder
from ._base import Batch, BatchedRun, Task, TaskRun, VmapRun
from ._char_rnn import CharRNN
from ._char_transformer import CharTransformer
from ._conv import ConvClassification
from ._data import DATA_VARIABLE, find_mnist
from ._drawn import DrawnBatchSize, DrawnMLP, DrawnTask
from ._ensemble import ensemble
from ._families import families, held_out_families
from ._functions import BenchmarkFunction, Bowl, Norm
from ._mlp import MLPClassification
from ._objectives import GradientNoise, LogObjective, Rescaled, SparseGradients, SumOf
from ._quadratic import Quadratic
from ._reparametrise import TensorScaling, WeightNormalization
from ._synthetic import RandomMLP, SoftmaxRegression
from ._text import draw_text
from ._transforms import RandomScaling, WithConvex

__all__ = [
    "DATA_VARIABLE",
    "Autoencoder",
    "Batch",
    "BatchedRun",
    "BenchmarkFunction",
    "Bowl",
    "CharRNN",
    "CharTransformer",
    "ConvClassification",
    "DrawnBatchSize",
    "DrawnMLP",
    "DrawnTask",
    "GradientNoise",
    "LogObjective",
    "MLPClassification",
    "Norm",
    "Quadratic",
    "RandomMLP",
    "RandomScaling",
    "Rescaled",
    "SoftmaxRegression",
    "SparseGradients",
    "SumOf",
    "Task",
    "TaskRun",
    "TensorScaling",
    "VmapRun",
    "WeightNormalization",
    "WithConvex",
    "draw_text",
    "ensemble",
    "families",
    "find_mnist",
    "held_out_families",
]
