"""Drop-ins: a LearnedOptimizer for each rule family, with shipped meta-parameters."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from ._optim_state import resolve_rule
from .optim import LearnedOptimizer, RuleLike

__all__ = ["LSTM", "Hierarchical", "RNNProp"]


class _NamedOptimizer(LearnedOptimizer):
    """A LearnedOptimizer with a shipped rule of one family."""

    family: ClassVar[str]
    shipped: ClassVar[str]

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        weight_decay: float = 0.0,
        maximize: bool = False,
        *,
        rule: RuleLike | None = None,
        **options: Any,
    ) -> None:
        resolved = resolve_rule(self.shipped if rule is None else rule)
        if resolved.family != self.family:
            raise ValueError(
                f"Invalid rule: {resolved!r} is of family {resolved.family!r}, "
                f"{type(self).__name__} takes {self.family!r}. fastl2o.LearnedOptimizer takes any"
            )
        super().__init__(params, resolved, lr, weight_decay, maximize, **options)


class LSTM(_NamedOptimizer):
    """The coordinate-wise LSTM optimizer (arXiv 1606.04474) with shipped meta-parameters.

    Same arguments as `LearnedOptimizer`, but the rule has a default, the shipped
    ``"lstm"``, and is keyword-only: another rule of the family "lstm", its name or path.

    Example:
        >>> import torch, fastl2o
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = fastl2o.LSTM(model.parameters(), rule=fastl2o.LSTMRule(hidden_size=8))
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[model.bias]["planes"].shape
        torch.Size([32, 1])
    """

    family = "lstm"
    shipped = "lstm"


class RNNProp(_NamedOptimizer):
    """RNNprop (arXiv 1703.03633) with shipped meta-parameters.

    Same arguments as `LearnedOptimizer`, but the rule has a default, the shipped
    ``"rnnprop"``, and is keyword-only: another rule of the family "rnnprop", its name or
    path.

    Example:
        >>> import torch, fastl2o
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = fastl2o.RNNProp(model.parameters(), rule=fastl2o.RNNPropRule(hidden_size=8))
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> float(optimizer.state[model.bias]["step"])
        1.0
    """

    family = "rnnprop"
    shipped = "rnnprop"


class Hierarchical(_NamedOptimizer):
    """The hierarchical optimizer (arXiv 1703.04813) with shipped meta-parameters.

    Same arguments as `LearnedOptimizer`, but the rule has a default, the shipped
    ``"hierarchical"``, and is keyword-only: another rule of the family "hierarchical", its
    name or path. ``seed`` decides the initial learning rates of rules that draw them; the shipped
    one starts with the same for all parameters.

    Example:
        >>> import torch, fastl2o
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = fastl2o.Hierarchical(model.parameters(), rule=fastl2o.HierarchicalRule())
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[model.bias]["planes"].shape
        torch.Size([19, 1])
    """

    family = "hierarchical"
    shipped = "hierarchical"
