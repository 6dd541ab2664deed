"""Rule: the learned optimizer itself, an architecture with its meta-parameters."""

from __future__ import annotations

import abc
import os
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ._flat_vector import MOVING, FlatVector, owns_memory

Weights = Mapping[str, Tensor]
# Kernels hold config numbers in float32.
SMALLEST, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


class Rule(nn.Module, abc.ABC):
    """Base of all rules: a network, shared by all coordinates, that turns gradients into updates.

    A rule holds meta-parameters and defines, in plain torch, what is computed; `fastl2o.ops`
    decides how. The update u of a step is **added**:
    theta' = (1 - lr * weight_decay) * theta + lr * u.

    Attributes:
        family: name of the architecture, as written in rule files.
        needs_step: whether the rule needs the number of steps already taken.
        learned_start: whether the state before the first step depends on the meta-parameters.
        runs_axis: the dimension of the runs in the state that `init_runs` makes.
        card: what is known about the meta-parameters (how trained, on what); filled by
            `fastl2o.load`.

    Subclasses give `config`, `state_planes`, `reset_parameters` and the reference step: those whose
    coordinates do not talk to each other through `CoordinateRule`.

    Example:
        >>> import fastl2o
        >>> rule = fastl2o.LSTMRule(hidden_size=4, num_layers=1)
        >>> isinstance(rule, fastl2o.Rule), rule.family, rule.state_planes
        (True, 'lstm', 8)
        >>> rule.flat_parameters().shape[0] == rule.num_meta_parameters
        True
    """

    family: ClassVar[str]
    needs_step: ClassVar[bool] = False
    learned_start: ClassVar[bool] = False
    runs_axis: ClassVar[int]
    card: dict[str, Any]

    def __init__(self) -> None:
        super().__init__()
        self.card = {}
        self._layout: tuple[tuple[str, torch.Size], ...] = ()
        self._tables: list[dict[str, Any]] | None = None
        self._flat: FlatVector | None = None
        self.register_state_dict_pre_hook(_separate)

    # What a family defines
    # ------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as numbers and strings that JSON can hold."""

    @property
    @abc.abstractmethod
    def state_planes(self) -> int:
        """Number S of state numbers per coordinate."""

    @abc.abstractmethod
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh meta-parameters from the family's published initialisation."""

    @abc.abstractmethod
    def init_runs(
        self, params: Tensor, sizes: Sequence[int], generator: torch.Generator | None = None
    ) -> Tensor:
        """State before the first step of R training runs, one tensor in a layout of the family.

        Args:
            params: `(R, D)`, the runs' parameters; their dtype is the state's.
            sizes: how many of a run's D coordinates each of its tensors has, in order.
            generator: decides what is random about the state, if anything is, and is left as it
                was: what is drawn from it afterwards is the same whatever the rule.
        """

    @abc.abstractmethod
    def runs_shape(self, runs: int, sizes: Sequence[int]) -> tuple[int, ...]:
        """Shape of the state that `init_runs` makes."""

    @abc.abstractmethod
    def reference_runs_step(
        self, grads: Tensor, state: Tensor, step: int, sizes: Sequence[int], meta: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Updates `(R, D)` and new state of R runs after `step` steps, in plain torch.

        Differentiable in `grads`, `state` and `meta`.
        """

    def start_gradient(self, d_state: Tensor, sizes: Sequence[int]) -> Tensor:
        """Gradient `(M,)` of the meta-parameters through the state that `init_runs` made."""
        return d_state.new_zeros(self.num_meta_parameters)

    def shift_start(self, state: Tensor, offsets: Tensor, sizes: Sequence[int]) -> None:
        """Add to the state that `init_runs` made what a change of the meta-parameters adds to it.

        Args:
            state: changed in place.
            offsets: `(R, M)`, the change of the flat meta-parameters for each run.
            sizes: as for `init_runs`.
        """

    def draw_timescales(
        self, low: float, high: float, generator: torch.Generator | None = None
    ) -> None:
        """Start some units with memories of ``low`` to ``high`` steps.

        Raises:
            ValueError: the family has no such units.
        """
        raise ValueError(f"a rule of family {self.family!r} has no units with memories to draw")

    # Meta-parameters as one vector
    # ----------------------------------------------------------------------------------

    @property
    def layout(self) -> tuple[tuple[str, torch.Size], ...]:
        """Names and shapes of the meta-parameters in the order of the flat vector."""
        if not self._layout:
            self._layout = tuple(
                (name, parameter.shape) for name, parameter in self.named_parameters()
            )
        return self._layout

    @property
    def num_meta_parameters(self) -> int:
        """Length M of the flat vector of meta-parameters."""
        return sum(shape.numel() for _, shape in self.layout)

    def flat_parameters(self) -> Tensor:
        """All meta-parameters as one vector `(M,)`, differentiable, in the order of `layout`."""
        return torch.cat([parameter.reshape(-1) for parameter in self.parameters()])

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """Split a flat vector `(M,)` into views named and shaped like the meta-parameters.

        Raises:
            ValueError: `flat` is not one-dimensional with `num_meta_parameters` elements.
        """
        if flat.shape != (self.num_meta_parameters,):
            raise ValueError(
                f"flat: expected shape ({self.num_meta_parameters},) for {self!r}, got "
                f"{tuple(flat.shape)}; pass a vector laid out as flat_parameters() of a rule with "
                "the same config"
            )
        parts = flat.split([shape.numel() for _, shape in self.layout])
        return {
            name: part.view(shape) for (name, shape), part in zip(self.layout, parts, strict=True)
        }

    def flat_buffer(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """The flat vector `(M,)`, detached, which the kernels read: only to be read.

        On the CPU, in their own dtype, the meta-parameters become views of this vector, as the
        weights of `torch.nn.RNN` do, and it is up to date by itself. Elsewhere, and where their
        memory is shared with others or was exchanged, each call copies them: writes through
        `parameter.data` leave no trace in a version counter, and a stale copy would be a silent
        error.
        """
        if self._tables is None:
            self._tables = [module._parameters for module in self.modules() if module._parameters]
        parameters: list[Tensor] = list(chain.from_iterable(map(dict.values, self._tables)))
        flat = self._flat
        if flat is None or not flat.holds(parameters, device, dtype):
            # Another thread may step with this rule: while one moves them, none may read them.
            with MOVING, torch.no_grad():
                flat = self._refill(parameters, device, dtype)
        return flat.vector

    def _refill(
        self, parameters: list[Tensor], device: torch.device, dtype: torch.dtype
    ) -> FlatVector:
        flat = self._flat
        if flat is not None and flat.holds(parameters, device, dtype):
            return flat
        # Parameters may still be views of a vector that does not hold them all: none is copied to.
        if flat is None or flat.addresses or not flat.is_on(device, dtype):
            flat = self._flat = self._flatten(parameters, device, dtype)
        if not flat.addresses:
            torch._foreach_copy_(flat.views, parameters)
        return flat

    def _flatten(
        self, parameters: list[Tensor], device: torch.device, dtype: torch.dtype
    ) -> FlatVector:
        vector = torch.empty(self.num_meta_parameters, dtype=dtype, device=device)
        views = list(self.unflatten(vector).values())
        if device.type != "cpu" or not all(
            p.dtype == dtype and p.device == device and owns_memory(p) for p in parameters
        ):
            return FlatVector(vector, views, [])
        torch._foreach_copy_(views, parameters)
        for parameter, view in zip(parameters, views, strict=True):
            parameter.data = view
        return FlatVector(vector, views, list(map(Tensor.data_ptr, views)))

    def _separate(self) -> None:
        """Give each meta-parameter memory of its own again.

        Pickle would write the memory of all for each of several views of it, and other libraries
        refuse to save views.
        """
        if self._flat is not None and self._flat.addresses:
            with MOVING:
                self._flat = None
                for parameter in self.parameters():
                    parameter.data = parameter.data.clone()

    # Files, copies, printing
    # ----------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str], card: Mapping[str, Any] | None = None) -> None:
        """Write a file that `fastl2o.load(path)` reads; see `fastl2o._files.save_rule`."""
        from .._files import (
            save_rule,  # here, because _files builds rules and so imports this package
        )

        save_rule(self, path, card)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        card: Mapping[str, Any] | None = None,
        license: str | None = None,
        private: bool = False,
        revision: str | None = None,
        commit_message: str | None = None,
        token: str | None = None,
    ) -> str:
        """Share the rule on the Hugging Face Hub (extra `hub`), with a model card.

        One commit writes `rule.safetensors`, as `save` does, and a README.md made from the card.

        Args:
            repo_id: `"owner/name"`; created if it is not there.
            card: what to say about the meta-parameters, a JSON-able mapping; by default the rule's
                own `card`. `description`, `task` and `limits` are shown first.
            license: the Hub's identifier of a licence, such as `"apache-2.0"`.
            private: whether a repository that is created is private.
            revision: the branch to write to, by default the main one.
            commit_message: what the commit says.
            token: of a user who may write there; by default that of `hf auth login`.

        Returns:
            The address that `fastl2o.load` takes, with the commit.

        Raises:
            ValueError: an impossible repo_id, or a rule or card that `save` refuses. Nothing is
                sent then.
            TypeError: `repo_id` is no text, or `card` no mapping.
            ImportError: huggingface_hub is not installed.
            huggingface_hub.errors.HfHubHTTPError: the Hub refuses.

        Example:
            >>> import fastl2o
            >>> fastl2o.LSTMRule().push_to_hub("a name without owner")
            Traceback (most recent call last):
            ...
            ValueError: Invalid repo_id: 'a name without owner'; accepted is 'owner/name'
        """
        from .._hub import push_rule  # here, as for save

        return push_rule(
            self,
            repo_id,
            card=card,
            license=license,
            private=private,
            revision=revision,
            commit_message=commit_message,
            token=token,
        )

    def __getstate__(self) -> dict[str, Any]:
        self._separate()
        # scratch is not part of a copy
        return {**self.__dict__, "_tables": None, "_flat": None}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.config().items())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


def _separate(rule: Rule, prefix: str, keep_vars: bool) -> None:
    rule._separate()


def check_integer(name: str, value: object, low: int, high: int) -> int:
    """Return `value` if it is an int in [low, high], else raise naming the argument."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"Invalid {name}: {value!r}; pass an int from {low} to {high}")
    if not low <= value <= high:
        raise ValueError(f"Invalid {name}: {value}; pass an int from {low} to {high}")
    return value


def check_number(name: str, value: object, accepted: str, low: float, high: float) -> float:
    """Return `value` as a float if it is in [low, high], else raise; `accepted` words that."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"Invalid {name}: {value!r}; pass a number {accepted}")
    if not low <= value <= high:  # NaN and infinities are outside of finite bounds
        raise ValueError(f"Invalid {name}: {value}; pass a number {accepted}")
    return float(value)
