"""Meta-training of rules: tasks, unrolls, gradient estimators and the trainer."""

from . import tasks
from .checkpoint import CheckpointError
from .estimators import Estimator, MetaGradient, TruncatedBPTT, unroll_gradient
from .evolution import ES, PES
from .imitation import Imitation
from .optimizers import MuonAdam
from .schedules import Curriculum, Exponential, LRSchedule
from .trainer import FitResult, MetaTrainer
from .unroll import Progress, Window, run_window, start
from .validation import Validation, run_losses

__all__ = [
    "ES",
    "PES",
    "CheckpointError",
    "Curriculum",
    "Estimator",
    "Exponential",
    "FitResult",
    "Imitation",
    "LRSchedule",
    "MetaGradient",
    "MetaTrainer",
    "MuonAdam",
    "Progress",
    "TruncatedBPTT",
    "Validation",
    "Window",
    "run_losses",
    "run_window",
    "start",
    "tasks",
    "unroll_gradient",
]
