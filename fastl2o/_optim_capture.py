"""Steps that are captured in a CUDA graph: what keeps one from being replayed later."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ._optim_plan import Groups


def capturing(params: Iterable[Tensor]) -> bool:
    """Whether a graph is being captured that a step of these parameters would become part of."""
    # the cheapest question first; a parameter on a GPU means that CUDA is initialised
    return (
        torch.cuda.is_initialized()
        and torch.cuda.is_current_stream_capturing()
        and any(p.is_cuda for p in params)
    )


def refuse_capture(name: str, params: Iterable[Tensor], groups: Groups) -> None:
    """Raise RuntimeError where a step is being captured and may not be.

    Args:
        name: the optimizer's class, for the message.
        params: those with gradients.
        groups: the optimizer's groups.
    """
    if not capturing(params):
        return
    if not all(group["capturable"] for group in groups):
        raise RuntimeError(
            f"Attempting CUDA graph capture of step() for an instance of {name} but param_groups' "
            "capturable is False. Build the optimizer with capturable=True"
        )
    if any(group["nonfinite"] == "raise" for group in groups):
        raise RuntimeError(
            "nonfinite='raise' cannot be captured in a CUDA graph: the step would have to wait for "
            "what it finds. Build the optimizer with nonfinite='skip' or 'pass'"
        )
