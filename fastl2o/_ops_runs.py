"""The step of a batch of runs, each by meta-parameters of its own: one op call for all of them."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from . import backends, ops
from ._ops_families import FAMILIES
from .rules import CoordinateRule


def runs_step_(
    rule: CoordinateRule,
    params: Tensor,
    grads: Tensor,
    states: Tensor,
    step: int,
    meta: Tensor,
    *,
    lr: float = 1.0,
    weight_decay: float = 0.0,
) -> None:
    """Take one step of R runs in place; as `fastl2o.ops.step_` on lists of the runs' rows.

    Args:
        rule: says what is computed; its own meta-parameters are not read.
        params, grads: `(R, D)`, contiguous; gradients that are not finite are passed on.
        states: `(R, S, D)`, contiguous: the planes of a run lie together.
        step: steps that the runs have taken.
        meta: `(R, M)`, a row of meta-parameters for each run.
        lr, weight_decay: as for `fastl2o.ops.step_`.

    Raises:
        As `fastl2o.ops.step_`.
    """
    family = FAMILIES.get(rule.family)
    tensors = (params, grads, states, meta)
    # Where the lists of a step are no matter beside it, on GPUs and in the reference, they serve.
    if (
        family is None
        or {tensor.dtype for tensor in tensors} != {torch.float32}
        or backends.choose(params.device, "") != "cpu"
    ):
        counts = torch.full((len(params),), float(step))
        ops.step_(
            rule, list(params), list(grads), list(states), list(counts.unbind()),
            lr=lr, weight_decay=weight_decay, nonfinite="pass", meta=meta,
        )  # fmt: skip
        return
    taken = (int(step),) if rule.needs_step else ()
    # entering no_grad again costs more than asking
    with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
        family.runs_step_(
            params, grads, states, *taken, meta, *family.arguments(rule), lr, weight_decay
        )
    # A kernel writes through raw pointers: autograd must learn of it, as after ops.step_.
    torch.autograd.graph.increment_version([params, states])
