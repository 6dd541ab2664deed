"""Comparison of optimizers on tasks: what ``fastl2o eval`` and the demo report.

Rules and hand-designed optimizers train the same runs of a task; ``compare`` gives losses, steps
and seconds to the tuned baseline's loss, divergences and, where asked, generalisation.
"""

from ._compare import Comparison, Reach, Row, check_entrants, compare, steps_of
from ._figures import draw_band
from ._generalisation import (
    Gap,
    Generalisation,
    GeneralisationRow,
    check_generalisation,
    generalise,
)
from ._measures import (
    Spread,
    gap_at_level,
    log_spaced,
    majority,
    mean_std,
    normalised_distance,
    pick_learning_rate,
    steps_to_reach,
)
from ._optimizers import HAND_DESIGNED, OPTIMIZERS, BuildOptimizer, Entrant
from ._report import check_report, document, render, summary_cells, write_report
from ._setting import LEARNING_RATES, Setting
from ._tables import markdown_table, render_table
from ._training import (
    MakeOptimizer,
    Task,
    TaskRun,
    Trained,
    hand_designed_stepper,
    learned_stepper,
    threads,
    train,
)

__all__ = [
    "HAND_DESIGNED",
    "LEARNING_RATES",
    "OPTIMIZERS",
    "BuildOptimizer",
    "Comparison",
    "Entrant",
    "Gap",
    "Generalisation",
    "GeneralisationRow",
    "MakeOptimizer",
    "Reach",
    "Row",
    "Setting",
    "Spread",
    "Task",
    "TaskRun",
    "Trained",
    "check_entrants",
    "check_generalisation",
    "check_report",
    "compare",
    "document",
    "draw_band",
    "gap_at_level",
    "generalise",
    "hand_designed_stepper",
    "learned_stepper",
    "log_spaced",
    "majority",
    "markdown_table",
    "mean_std",
    "normalised_distance",
    "pick_learning_rate",
    "render",
    "render_table",
    "steps_of",
    "steps_to_reach",
    "summary_cells",
    "threads",
    "train",
    "write_report",
]
