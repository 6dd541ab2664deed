"""LearnedOptimizer: a torch.optim.Optimizer whose update is a learned rule.

Thin on purpose. What a rule computes is in ``rules/``, how a list of tensors is stepped in
``ops.py``; here are param groups, state and checkpoints, and everything torch expects of an
optimizer (closures, hooks, schedulers, gradient scaling).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT, _use_grad_for_differentiable

from ._optim_attention import follow_lr, refuse_evaluating, set_evaluating
from ._optim_capture import refuse_capture
from ._optim_differentiable import differentiable_step
from ._optim_nonfinite import refuse, unchecked
from ._optim_plan import Plan, create_missing, gather
from ._optim_problem import PREFIX, place_globals, restored_globals
from ._optim_run import Amp, run
from ._optim_saved import check_state_dict, saved_groups, with_dtypes
from ._optim_state import (
    CHECKED_OPTIONS,
    GROUP_DEFAULTS,
    OWN_ENTRIES,
    check_options,
    check_state_dtype,
    laid_out,
    new_step,
    plain_numbers,
    resolve_rule,
    uses_reference,
    without_hooks,
)
from .rules import Rule

__all__ = ["LearnedOptimizer"]

RuleLike = Rule | str | os.PathLike[str]


class LearnedOptimizer(Optimizer):
    """Train parameters with a learned rule, as a drop-in for any ``torch.optim`` optimizer.

    Each step does ``param <- (1 - lr * weight_decay) * param + lr * update`` with the update that
    the rule computes from the gradient and its own state; ``lr`` multiplies the learned update, so
    1.0 is what the rule was trained with and every lr scheduler works.

    Args:
        params: parameters, ``(name, parameter)`` pairs or param groups (dicts). A group may carry
            its own ``lr``, ``weight_decay``, ``rule`` and every other option below. Parameters may
            be float32, float64, bfloat16, float16 or complex, of any shape and memory layout;
            also DTensors (FSDP2), whose ``planes`` are split like them. As in torch, integer
            tensors are taken as long as they have no gradient, and what else a group holds is kept.
        rule: a `fastl2o.Rule`, the name of a shipped one or a path to a .safetensors file.
        lr: a finite number >= 0, not a bool, or a tensor of one element.
        weight_decay: decoupled, multiplied by ``lr``; a finite number >= 0.
        maximize: follow the negated gradient.
        nonfinite: what to do about a gradient that holds NaN or Inf (RNNprop squares gradients in
            float32: a finite one beyond 1.8e19 stalls its coordinate unseen). "raise":
            RuntimeError that names the parameter, nothing is changed; "skip": leave that parameter
            and its state alone (a first step makes its state all the same, as torch does where
            a GradScaler skips: that of no step taken); "pass": feed it to the rule.
        state_dtype: float32; bfloat16 to halve the memory; float64 (reference path only).
        stochastic_rounding: of bfloat16 state, so that changes below its precision add up instead
            of being lost; not within a CUDA graph. ``seed`` and the number of the step, which the
            state_dict holds, decide the random bits, the same on every backend.
        foreach, fused: True or None use the list kernels of the current
            `fastl2o.backend`, False (without the other) the reference loop.
        capturable: allow the step to be captured in a CUDA graph, after one step outside of it and
            with ``nonfinite`` other than "raise"; replays use the numbers (``lr`` and so on) that
            were captured. A step on the CPU has nothing to capture and works with either value.
        differentiable: let autograd run through the step, also to the rule's meta-parameters; a
            hierarchical rule then steps in plain torch.

    State: ``state[p]["planes"]`` is (S, *p.shape), with a last dimension of two added for a complex
    parameter; rules that count steps also have ``state[p]["step"]``, a 0-dim float32 tensor; a
    hierarchical rule has ``state[p]["tensor"]`` (tensor_size + 1,), whose last number is the mean
    of the log rates, and ``state["global/<n>"]["hidden"]``, which all its parameters share and the
    first of them holds as ``state[p]["global"]``. ``seed`` draws the rates that it starts with.
    ``state_dict()`` holds tensors, numbers and strings only and notes the rule's family, config and
    a digest of its meta-parameters; loading it with another rule is refused. The rule itself is
    not in the state_dict (save it with ``rule.save``), but in copies and pickles of the optimizer.

    Raises:
        ValueError: an impossible option; stochastic rounding of other than bfloat16 state.
        TypeError: ``rule`` is none of the accepted kinds.
        RuntimeError: flags that exclude each other; in ``step``, sparse or ill-typed gradients and,
            by default, gradients with NaN or Inf. A step that raises has changed nothing.

    Example:
        >>> import torch, fastl2o
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(4, 1)
        >>> rule = fastl2o.LSTMRule.as_sgd(lr=0.1)  # or the name of a shipped rule
        >>> optimizer = fastl2o.LearnedOptimizer(model.parameters(), rule)
        >>> inputs, targets = torch.randn(32, 4), torch.ones(32, 1)
        >>> for _ in range(50):
        ...     optimizer.zero_grad()
        ...     loss = torch.nn.functional.mse_loss(model(inputs), targets)
        ...     loss.backward()
        ...     optimizer.step()
        >>> bool(loss < 1e-3)
        True
    """

    def __init__(
        self,
        params: ParamsT,
        rule: RuleLike,
        lr: float | Tensor = 1.0,
        weight_decay: float = 0.0,
        maximize: bool = False,
        *,
        nonfinite: str = "raise",
        state_dtype: torch.dtype = torch.float32,
        stochastic_rounding: bool = False,
        seed: int = 0,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "nonfinite": nonfinite,
            "state_dtype": state_dtype,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
            "rounding_step": 0,
            "ahead": 0.0,
            "evaluating": False,
            "foreach": foreach,
            "fused": fused,
            "capturable": capturable,
            "differentiable": differentiable,
        }
        check_options(defaults)
        plain_numbers(defaults)
        self._plan: Plan | None = None
        self._checked_options: list[tuple[Any, ...]] = []
        super().__init__(params, {**defaults, "rule": resolve_rule(rule)})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with any options of its own.

        Raises:
            ValueError: an impossible option, or a parameter given twice.
        """
        if isinstance(param_group, dict):
            check_options({**self.defaults, **param_group})
            plain_numbers(param_group)
            if "rule" in param_group:
                param_group["rule"] = resolve_rule(param_group["rule"])
            params = param_group["params"]
            if not isinstance(params, (Tensor, set)):
                params = param_group["params"] = list(params)
                tensors = [p[1] if isinstance(p, tuple) else p for p in params]
                # torch only warns; a list op would step the two at the same time
                if len({id(p) for p in tensors}) != len(tensors):
                    raise ValueError("a parameter group holds a parameter more than once")
        super().add_param_group(param_group)

    @_use_grad_for_differentiable
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """Take one inner step; parameters whose gradient is None are skipped.

        Args:
            closure: re-evaluates the model and returns the loss; called with gradients enabled.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: see the class. Nothing is changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.defaults["differentiable"]:
            differentiable_step(self.param_groups, self.state)
        elif torch.compiler.is_compiling():
            # it breaks the graph at step(), but would go on to trace the planning
            torch.compiler.disable(self._step_lists)()
        else:
            self._step_lists()
        return loss

    def _step_lists(self) -> None:
        groups = self.param_groups
        self._check_assigned_options()
        refuse_evaluating(groups)
        plan, grads = gather(groups, self.state, self._plan)
        self._plan = plan
        if not grads:
            return
        refuse_capture(type(self).__name__, plan.active, groups)
        amp = Amp(getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        first_step = bool(plan.missing)
        to_check = unchecked(plan, groups)
        # the op itself honours found_inf; on other devices than the CPU reading it is a wait
        if (
            amp.found_inf is not None
            and (to_check or plan.split or amp.found_inf.device.type == "cpu")
            and amp.found_inf.item() != 0
        ):
            return
        skipped = refuse(plan, groups, grads, to_check) if to_check else frozenset[int]()
        follow_lr(groups, self.state)
        known = set(self.state) if first_step else set()
        try:
            if first_step:
                create_missing(plan, groups, self.state, grads)
            run(plan, groups, grads, amp, checked=first_step, skipped=skipped)
        except Exception:
            # Only the first bucket's op can have refused, so nothing has been stepped.
            self._plan = None
            if first_step:
                for key in set(self.state) - known:
                    del self.state[key]
                raise
            # names the parameter, where one does not fit
            fresh, grads = gather(groups, self.state, None)
            if not plan.left_to_op or fresh.left_to_op:
                raise
            # The op saw what it was left to see: that a tensor is laid out otherwise than before.
            run(fresh, groups, grads, amp, checked=False)
            self._plan = fresh
        for group in groups:
            if group["stochastic_rounding"]:
                group["rounding_step"] += 1

    def eval(self) -> None:
        """Take parameters to where the model is to be evaluated or saved.

        Only rules with attention take gradients elsewhere; for others this does nothing. Call
        `train` before the next step.
        """
        set_evaluating(self.param_groups, self.state, True)

    def train(self) -> None:
        """Take parameters back to where the rule wants the next gradient (up to rounding)."""
        set_evaluating(self.param_groups, self.state, False)

    def _check_assigned_options(self) -> None:
        """Check options that were assigned to the groups since the last step."""
        options = [tuple(map(group.get, CHECKED_OPTIONS)) for group in self.param_groups]
        try:
            if options == self._checked_options:
                return
        except (RuntimeError, ValueError):
            pass  # a tensor or an array of several numbers, which is refused below
        for index, group in enumerate(self.param_groups):
            check_options(group)
            check_state_dtype(group, index, self.state)
            plain_numbers(group)
            if not isinstance(group["rule"], Rule):
                group["rule"] = resolve_rule(group["rule"])
        self._checked_options = options

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether GradScaler may leave unscaling to the step: the kernels do it in registers."""
        return not any(g["differentiable"] or uses_reference(g) for g in self.param_groups)

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the state and options as torch does, each rule as its identity.

        ``param_groups[i]["rule"]`` is ``{"family", "config", "digest"}`` and ``"state_dtype"`` a
        name, so that the result can be read with ``torch.load(..., weights_only=True)`` and goes
        through ``torch.distributed.checkpoint``.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        place_globals(self.param_groups, self.state)
        with without_hooks(self):
            state_dict = super().state_dict()
        for key in [k for k in state_dict["state"] if str(k).startswith(PREFIX)]:
            del state_dict["state"][key]  # a parameter's state has it
        state_dict["param_groups"] = saved_groups(state_dict["param_groups"])
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            result = post_hook(self, state_dict)
            if result is not None:
                state_dict = result
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned; the states are copied, bit for bit.

        Options come from the checkpoint, as in torch; the rules stay this optimizer's.

        Raises:
            ValueError: the checkpoint is of another rule, shape or number of parameters, or holds
                an impossible option. The message names the parameter; nothing is changed.
        """
        if not isinstance(state_dict, dict):
            raise TypeError(
                f"Invalid state_dict: {type(state_dict).__name__}. Give what an optimizer's "
                "state_dict() returned"
            )
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = pre_hook(self, state_dict)
            if result is not None:
                state_dict = result
        groups = self.param_groups
        state_dict = with_dtypes(state_dict)
        check_state_dict(state_dict, groups)
        checkpoint: list[dict[str, Any]] = state_dict["param_groups"]
        # The base class would cast the planes to the parameter's dtype, and share the tensors with
        # the checkpoint, so that two optimizers that load the same one step each other's state.
        completed: list[dict[str, Any]] = [
            {**{name: group[name] for name in GROUP_DEFAULTS}, **saved, "rule": None}
            for group, saved in zip(groups, checkpoint, strict=True)
        ]
        restored: dict[Any, dict[str, Any]] = {
            **restored_globals(state_dict["state"], completed, groups)
        }
        # Shared states go in below: torch would share their dictionaries with the checkpoint.
        others = {k: v for k, v in state_dict["state"].items() if k not in restored}
        for group, saved in zip(groups, checkpoint, strict=True):
            dtype = saved.get("state_dtype", group["state_dtype"])
            for param_id, p in zip(saved["params"], group["params"], strict=True):
                entry = others.get(param_id)
                if not entry:
                    continue
                others[param_id] = {k: v for k, v in entry.items() if k not in OWN_ENTRIES}
                restored[p] = {"planes": laid_out(entry["planes"], group["rule"], p, dtype)}
                if "tensor" in entry:
                    wide = torch.promote_types(dtype, torch.float32)
                    restored[p]["tensor"] = entry["tensor"].detach().to(p.device, wide, copy=True)
                if "step" in entry:
                    restored[p]["step"] = new_step(entry["step"], p.device)
        with without_hooks(self):
            super().load_state_dict({**state_dict, "state": others, "param_groups": completed})
        for before, group in zip(groups, self.param_groups, strict=True):
            group["rule"] = before["rule"]
        for p, entry in restored.items():
            self.state[p].update(entry)
        place_globals(self.param_groups, self.state)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    # Copies

    def __getstate__(self) -> dict[str, Any]:
        # A scheduler puts a wrapped, unpicklable `step` on the instance; hooks are not copied, as
        # in torch.
        return {k: v for k, v in self.__dict__.items() if not k.startswith("_") and k != "step"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plan = None
        self._checked_options = []
        for options in (self.defaults, *self.param_groups):
            for name, value in GROUP_DEFAULTS.items():
                options.setdefault(name, value)
        for p, entry in self.state.items():
            if isinstance(p, Tensor) and isinstance(entry.get("step"), (int, float)):
                entry["step"] = new_step(entry["step"], p.device)
