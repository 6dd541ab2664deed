"""fastl2o: learned optimizers for PyTorch, to apply in place of torch.optim's and to meta-train.

import fastl2o
opt = fastl2o.LSTM(model.parameters())      # a shipped learned optimizer
from fastl2o import meta                    # tasks, estimators and a trainer to make your own
"""

from __future__ import annotations

from ._load import check_torch_version

check_torch_version()

from . import convert, ops, rules, zoo  # noqa: E402
from ._files import load  # noqa: E402
from ._info import info  # noqa: E402
from ._version import __version__  # noqa: E402
from .backends import backend  # noqa: E402
from .drop_ins import LSTM, Hierarchical, RNNProp  # noqa: E402
from .optim import LearnedOptimizer  # noqa: E402
from .rules import HierarchicalRule, LSTMRule, RNNPropRule, Rule  # noqa: E402

__all__ = [
    "LSTM",
    "Hierarchical",
    "HierarchicalRule",
    "LSTMRule",
    "LearnedOptimizer",
    "RNNProp",
    "RNNPropRule",
    "Rule",
    "__version__",
    "backend",
    "convert",
    "info",
    "load",
    "ops",
    "rules",
    "zoo",
]
