"""Our optimizers described to torch's machinery: how to build them, what they must refuse.

``torch.testing._internal.common_optimizers`` has a database of ``OptimizerInfo``, one for each of
torch's optimizers. These are ours. Adam and SGD of that database are run beside them: a check that
torch's own optimizers fail would say nothing about ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import SGD, Adam, lr_scheduler
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
    optim_db,
)

import fastl2o
from fastl2o import LearnedOptimizer
from tests.optimizers import RULES, OptimizerCase

RATE = 0.02  # of the rules that are a known optimizer

SCHEDULERS: tuple[list[Callable[[Any], Any]], ...] = (
    [lambda opt: lr_scheduler.ExponentialLR(opt, gamma=0.9)],
    [lambda opt: lr_scheduler.LinearLR(opt, start_factor=0.4, total_iters=4)],
    [
        lambda opt: lr_scheduler.ConstantLR(opt, factor=0.4, total_iters=4),
        lambda opt: lr_scheduler.ExponentialLR(opt, gamma=0.9),
    ],
    [lambda opt: lr_scheduler.PolynomialLR(opt, power=0.9, total_iters=4)],
    [
        lambda opt: lr_scheduler.StepLR(opt, gamma=0.9, step_size=10),
        lambda opt: lr_scheduler.ReduceLROnPlateau(opt),
    ],
)


def _inputs(device: Any, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
    """Options that go with every implementation; torch's helper adds foreach, fused and so on."""
    options: list[tuple[dict[str, Any], str]] = [
        ({}, "default"),
        ({"lr": 0.5}, "other lr"),
        ({"lr": torch.tensor(0.5), "capturable": True}, "Tensor lr"),
        ({"weight_decay": 1e-3}, "weight_decay"),
        ({"weight_decay": 1e-3, "maximize": True}, "weight_decay, maximize"),
        ({"nonfinite": "skip"}, "nonfinite skip"),
        ({"nonfinite": "pass", "lr": 0.5}, "nonfinite pass"),
        ({"state_dtype": torch.bfloat16}, "bfloat16 state"),
    ]
    return [OptimizerInput(params=None, kwargs=kwargs, desc=desc) for kwargs, desc in options]


def _refused(
    options: dict[str, Any], error: type[Exception], message: str, params: Any = None
) -> ErrorOptimizerInput:
    wrong = OptimizerInput(params=params, kwargs=options, desc=str(options))
    return ErrorOptimizerInput(wrong, error_type=error, error_regex=message)


def _error_inputs(device: Any, dtype: torch.dtype) -> list[ErrorOptimizerInput]:
    """What torch has every optimizer refuse, and what it has Adam refuse, less its own options."""
    errors: list[ErrorOptimizerInput] = get_error_inputs_for_all_optims(device, dtype)
    for error in errors:
        # torch warns that this will become an error; a list kernel must not step a tensor twice
        # at the same time, so here it is one
        if error.error_type is UserWarning:
            error.error_type = ValueError
            error.error_regex = "holds a parameter more than once"
    missing_lr = torch.tensor(0.5)
    sparse = torch.nn.Parameter(torch.ones(2, 2, device=device, dtype=dtype))
    sparse.grad = torch.eye(2, device=device, dtype=dtype).to_sparse()
    return [
        *errors,
        _refused({"lr": -1.0}, ValueError, "Invalid lr: -1.0"),
        _refused({"weight_decay": -1}, ValueError, "Invalid weight_decay: -1"),
        _refused(
            {"lr": missing_lr, "foreach": True},
            ValueError,
            "lr as a Tensor is not supported for capturable=False and foreach=True",
        ),
        _refused(
            {"foreach": True, "fused": True},
            RuntimeError,
            "`fused` and `foreach` cannot be `True` together",
        ),
        _refused(
            {"fused": True, "differentiable": True},
            RuntimeError,
            "`fused` does not support `differentiable`",
        ),
        _refused(
            {"foreach": True, "differentiable": True},
            RuntimeError,
            "`foreach` does not support `differentiable`",
        ),
        ErrorOptimizerInput(
            OptimizerInput(params=[sparse], kwargs={}, desc="sparse gradient"),
            error_on=OptimizerErrorEnum.STEP_ERROR,
            error_type=RuntimeError,
            error_regex="sparse gradient",
        ),
    ]


def _info(optimizer: type[LearnedOptimizer]) -> OptimizerInfo:
    return OptimizerInfo(
        optimizer,
        optim_inputs_func=_inputs,
        optim_error_inputs_func=_error_inputs,
        scheduler_inputs=SCHEDULERS,
        supported_impls=("foreach", "differentiable", "fused"),
        not_og_supported_flags=("foreach", "differentiable", "fused", "maximize", "capturable"),
        has_capturable_arg=True,
        supports_fused_on=("cpu", "cuda"),
    )


def _with_rule(case: OptimizerCase) -> type[LearnedOptimizer]:
    """A class that needs nothing but parameters, as torch's machinery wants them."""
    rule = case.rule(RATE)

    def init(self: LearnedOptimizer, params: Any, **options: Any) -> None:
        LearnedOptimizer.__init__(self, params, rule, **options)

    name = "".join(part.capitalize() for part in case.name.split("-"))
    made: type[LearnedOptimizer] = type(f"{name}Rule", (LearnedOptimizer,), {"__init__": init})
    return made


# Rules that are a known optimizer, and rules with drawn meta-parameters.
EXACT = [_info(_with_rule(case)) for case in RULES if case.oracle is not None]
DRAWN = [_info(_with_rule(case)) for case in RULES if case.oracle is None]
SHIPPED = [_info(drop_in) for drop_in in (fastl2o.LSTM, fastl2o.RNNProp, fastl2o.Hierarchical)]
OURS = [*EXACT, *DRAWN, *SHIPPED]
TORCHS = [info for info in optim_db if info.optim_cls in (Adam, SGD)]
ALL = [*OURS, *TORCHS]

# Row by row what torch expects of an optimizer and a rule does not keep, with the reason; what is
# tested in its place is in tests/test_contract.py (test_zero_gradients, the tests with oracles).
EXEMPT: dict[str, dict[str, str]] = {
    "zero gradients leave parameters alone": {
        info.name: "biases and recurrent state give an update at a zero gradient"
        for info in (*DRAWN, *SHIPPED)
        if info.name != "RnnpropRule"  # its fresh biases are zeros
    },
    "the loss goes down": {
        info.name: "depends on the meta-parameters" for info in (*DRAWN, *SHIPPED)
    },
}


def held_to(expectation: str) -> list[OptimizerInfo]:
    """All optimizers less those that are exempt from an expectation."""
    return [info for info in ALL if info.name not in EXEMPT[expectation]]
