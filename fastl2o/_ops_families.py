"""Schemas, default implementations, fakes and derivatives of the ops of each rule family."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _ops_gpu
from . import _ops_reference as reference
from .rules import CoordinateRule, Rule, from_config

_LIBRARY = torch.library.Library("fastl2o", "DEF")
Named = dict[str, Any]


class Family(NamedTuple):
    """The ops of a rule family, and how a rule's config becomes their arguments."""

    step_: Callable[..., None]
    runs_step_: Callable[..., None]
    step: Callable[..., tuple[Tensor, Tensor]]
    step_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    unroll_backward: Callable[..., tuple[Tensor, Tensor]]
    arguments: Callable[[Any], tuple[Any, ...]]


class _Signature(NamedTuple):
    """How a family's config appears in its ops: the schema's text and both conversions."""

    family: str
    schema: str
    needs_step: bool
    to_arguments: Callable[[Any], tuple[Any, ...]]
    to_config: Callable[..., Named]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the config's arguments, in order."""
        return tuple(argument.split()[1] for argument in self.schema.split(", "))


_SIGNATURES = (
    _Signature(
        "lstm",
        "int hidden_size, int num_layers, bool log_sign, float p, float eps, float output_scale",
        False,
        lambda rule: (
            rule.hidden_size,
            rule.num_layers,
            rule.preprocess == "log_sign",
            rule.p,
            rule.eps,
            rule.output_scale,
        ),
        lambda log_sign, **rest: {**rest, "preprocess": "log_sign" if log_sign else "identity"},
    ),
    _Signature(
        "rnnprop",
        "int hidden_size, int num_layers, float beta1, float beta2, float step_size",
        True,
        lambda rule: (rule.hidden_size, rule.num_layers, rule.beta1, rule.beta2, rule.step_size),
        dict,
    ),
)


@functools.lru_cache(maxsize=256)
def _maths(signature: _Signature, arguments: tuple[Any, ...]) -> CoordinateRule:
    """A rule to run the reference maths with; its own meta-parameters take no memory."""
    config = signature.to_config(**dict(zip(signature.names, arguments, strict=True)))
    with torch.device("meta"):
        rule = from_config(signature.family, config)
    assert isinstance(rule, CoordinateRule)
    return rule


def _rule(signature: _Signature, named: Named) -> CoordinateRule:
    return _maths(signature, tuple(named[name] for name in signature.names))


def define(
    name: str,
    schema: str,
    default: Callable[[Named], Any],
    fake: Callable[[Named], Any],
    gpu: Callable[[Named], Any],
) -> Any:
    """Define an op: its default implementation, fake and GPU kernels, given arguments by name."""
    _LIBRARY.define(name + schema)
    op = getattr(torch.ops.fastl2o, name)
    arguments = op.default._schema.arguments
    names = [argument.name for argument in arguments]
    defaults = {
        argument.name: argument.default_value
        for argument in arguments
        if argument.has_default_value()
    }

    def by_name(function: Callable[[Named], Any]) -> Callable[..., Any]:
        def kernel(*given: Any, **keywords: Any) -> Any:
            return function({**defaults, **dict(zip(names, given, strict=False)), **keywords})

        return kernel

    _LIBRARY.impl(name, by_name(default), "CompositeExplicitAutograd")
    _LIBRARY.impl(name, by_name(gpu), "CUDA")
    torch.library.register_fake(f"fastl2o::{name}", by_name(fake), lib=_LIBRARY)
    # The packet resolves overloads on each call; the overload itself is a microsecond or two
    # faster.
    return op.default


def _on_gpu(
    signature: _Signature,
    function: Callable[[str, Rule, Named], Any],
    default: Callable[[Named], Any],
) -> Callable[[Named], Any]:
    return _ops_gpu.dispatched(function, functools.partial(_rule, signature), default)


def _maths_dtype(state: Tensor) -> torch.dtype:
    return torch.float64 if state.dtype == torch.float64 else torch.float32


def _define_step_(signature: _Signature) -> Any:
    steps = "Tensor(d!)[] steps, " if signature.needs_step else ""
    schema = (
        f"(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] states, {steps}Tensor meta, "
        f"{signature.schema}, float lr, float weight_decay, bool maximize, int nonfinite, Tensor? "
        "grad_scale=None, Tensor? found_inf=None, int? rounding_seed=None) -> ()"
    )

    def default(named: Named) -> None:
        reference.step_(
            _rule(signature, named),
            named["params"],
            named["grads"],
            named["states"],
            named.get("steps", ()),
            named["meta"],
            named["lr"],
            named["weight_decay"],
            named["maximize"],
            named["nonfinite"],
            named["grad_scale"],
            named["found_inf"],
            named["rounding_seed"],
        )

    gpu = _on_gpu(signature, _ops_gpu.step_, default)
    return define(f"{signature.family}_step_", schema, default, lambda named: None, gpu)


def _define_runs_step_(signature: _Signature) -> Any:
    step = "int step, " if signature.needs_step else ""
    schema = (
        f"(Tensor(a!) params, Tensor grads, Tensor(b!) states, {step}Tensor meta, "
        f"{signature.schema}, float lr, float weight_decay) -> ()"
    )

    def default(named: Named) -> None:
        reference.runs_step_(
            _rule(signature, named),
            named["params"],
            named["grads"],
            named["states"],
            named.get("step", 0),
            named["meta"],
            named["lr"],
            named["weight_decay"],
        )

    # GPUs are sent lists, by fastl2o.ops.runs_step_, since they launch run by run.
    name = f"{signature.family}_runs_step_"
    return define(name, schema, default, lambda named: None, default)


def _define_step_backward(signature: _Signature) -> Any:
    step = "int step, " if signature.needs_step else ""
    schema = (
        f"(Tensor d_update, Tensor d_new_state, Tensor grad, Tensor state, {step}Tensor meta, "
        f"{signature.schema}) -> (Tensor, Tensor, Tensor)"
    )

    def default(named: Named) -> tuple[Tensor, Tensor, Tensor]:
        return _rule(signature, named).reference_backward(
            named["d_update"],
            named["d_new_state"],
            named["grad"],
            named["state"],
            named.get("step", 0),
            named["meta"],
        )

    def fake(named: Named) -> tuple[Tensor, ...]:
        return tuple(_empty_like(named[name]) for name in ("grad", "state", "meta"))

    gpu = _on_gpu(signature, _ops_gpu.step_backward, default)
    return define(f"{signature.family}_step_backward", schema, default, fake, gpu)


def _define_step(signature: _Signature, step_backward: Any) -> Any:
    name = f"{signature.family}_step"
    step = "int step, " if signature.needs_step else ""

    def default(named: Named) -> tuple[Tensor, Tensor]:
        return _rule(signature, named).reference_step(
            named["grad"], named["state"], named.get("step", 0), named["meta"]
        )

    def fake(named: Named) -> tuple[Tensor, Tensor]:
        state = named["state"]
        return _empty_like(named["grad"], _maths_dtype(state)), _empty_like(state)

    schema = (
        f"(Tensor grad, Tensor state, {step}Tensor meta, {signature.schema}) -> (Tensor, Tensor)"
    )
    op = define(name, schema, default, fake, _on_gpu(signature, _ops_gpu.step, default))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        is_tensor = [isinstance(value, Tensor) for value in inputs]
        ctx.save_for_backward(
            *(value for value, tensor in zip(inputs, is_tensor, strict=True) if tensor)
        )
        ctx.is_tensor = is_tensor
        ctx.others = [value for value, tensor in zip(inputs, is_tensor, strict=True) if not tensor]

    def backward(ctx: Any, d_update: Tensor, d_new_state: Tensor) -> tuple[Tensor | None, ...]:
        saved, others = iter(ctx.saved_tensors), iter(ctx.others)
        inputs = [next(saved) if tensor else next(others) for tensor in ctx.is_tensor]
        gradients = iter(step_backward(d_update.contiguous(), d_new_state.contiguous(), *inputs))
        return tuple(next(gradients) if tensor else None for tensor in ctx.is_tensor)

    torch.library.register_autograd(
        f"fastl2o::{name}", backward, setup_context=setup_context, lib=_LIBRARY
    )
    return op


def _define_unroll_backward(signature: _Signature) -> Any:
    step = "int step, " if signature.needs_step else ""
    schema = (
        f"(Tensor grads, Tensor state, {step}Tensor meta, Tensor loss_weights, int steps, "
        f"{signature.schema}, float lr, float weight_decay, Tensor? d_updates=None, "
        "Tensor? d_last_state=None) -> (Tensor, Tensor)"
    )

    def default(named: Named) -> tuple[Tensor, Tensor]:
        return reference.unroll_backward(
            _rule(signature, named),
            named["grads"],
            named["state"],
            named.get("step", 0),
            named["meta"],
            named["loss_weights"],
            named["steps"],
            named["lr"],
            named["weight_decay"],
            named["d_updates"],
            named["d_last_state"],
        )

    def fake(named: Named) -> tuple[Tensor, Tensor]:
        return _empty_like(named["meta"]), _empty_like(named["state"])

    gpu = _on_gpu(signature, _ops_gpu.unroll_backward, default)
    return define(f"{signature.family}_unroll_backward", schema, default, fake, gpu)


def _empty_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return tensor.new_empty(tensor.shape, dtype=dtype or tensor.dtype)


def _define_family(signature: _Signature) -> Family:
    step_backward = _define_step_backward(signature)
    return Family(
        step_=_define_step_(signature),
        runs_step_=_define_runs_step_(signature),
        step=_define_step(signature, step_backward),
        step_backward=step_backward,
        unroll_backward=_define_unroll_backward(signature),
        arguments=signature.to_arguments,
    )


FAMILIES = {signature.family: _define_family(signature) for signature in _SIGNATURES}
