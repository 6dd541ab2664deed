"""GPU implementations of the ops: what each backend takes, and the calls into it.

The dispatcher's CUDA key (NVIDIA, and AMD's ROCm build of torch, which uses the same key) leads
here. Each op chooses its backend again, because a backward runs in autograd's own thread, where a
`fastl2o.backend` block of the caller is not in force: there, FASTL2O_BACKEND or "auto" decides.
Triton is imported by the first call that needs it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _ops_reference as reference
from . import backends
from .rules import Rule

Named = dict[str, Any]

# What the arguments of the CUDA library's ops hold that the other family alone has.
_NO_BETAS = (0.0, 0.0)
_NO_LOG = (False, 1.0, 0.0)
_LEAST_CAPABILITY = (7, 5)
_LISTS = (list, tuple)


def fast() -> bool:
    """Whether the CUDA kernels may use TF32 products: FASTL2O_PRECISION is "fast"."""
    return backends.precision() == "fast"


def cuda_arguments(rule: Any) -> tuple[Any, ...]:
    """(rnnprop, hidden_size, num_layers, log_sign, p, eps, scale, beta1, beta2) of a rule."""
    sizes = (rule.hidden_size, rule.num_layers)
    if rule.family == "rnnprop":
        return (True, *sizes, *_NO_LOG, rule.step_size, rule.beta1, rule.beta2)
    log_sign = rule.preprocess == "log_sign"
    return (False, *sizes, log_sign, rule.p, rule.eps, rule.output_scale, *_NO_BETAS)


@functools.lru_cache(maxsize=1024)
def _cuda_refuses(rnnprop: bool, hidden_size: int, num_layers: int, device: torch.device) -> str:
    if not torch.ops.fastl2o_cuda.supported(rnnprop, hidden_size, num_layers):
        return (
            f"its kernels do not take hidden_size={hidden_size} with num_layers={num_layers} "
            "('triton' takes every size)"
        )
    return capability_refusal(device)


@functools.lru_cache(maxsize=64)
def capability_refusal(device: torch.device) -> str:
    """Why the CUDA library does not run on this device, "" if it does."""
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        least, found = ("{}.{}".format(*version) for version in (_LEAST_CAPABILITY, capability))
        return (
            f"its kernels need compute capability {least} and {device} has {found} ('triton' has "
            "kernels there)"
        )
    return ""


def refusal(backend: str, rule: Any, device: torch.device) -> str:
    """Why a backend that is present does not take this rule on this device, "" if it does.

    Triton takes every rule of the two families.
    """
    if backend == "cuda" and device.type == "cuda":
        return _cuda_refuses(
            rule.family == "rnnprop", rule.hidden_size, rule.num_layers, torch.device(device)
        )
    return ""


def objections(rule: Any, device: torch.device, *lists: Sequence[Tensor]) -> Callable[[str], str]:
    """`refusal` as a function of the backend, for `backends.choose`.

    Args:
        rule, device: what is to run, and where.
        lists: params and states of the in-place step, each of one dtype on a GPU.
    """

    def refuses(backend: str) -> str:
        on_gpu = lists and backend in ("cuda", "triton")
        return refusal(backend, rule, device) or (one_dtype(*lists) if on_gpu else "")

    return refuses


def one_dtype(params: Sequence[Tensor], states: Sequence[Tensor]) -> str:
    """Why the GPU step does not take these lists: each is of one dtype there, "" if it is."""
    for name, tensors in (("params", params), ("states", states)):
        dtypes = {tensor.dtype for tensor in tensors}
        if len(dtypes) > 1:
            names = ", ".join(sorted(map(str, dtypes)))
            return f"its step takes {name} of one dtype in a call, not {names}: call it for each"
    return ""


def _triton(module: str) -> Any:
    """A launcher module of the Triton kernels, "step" or "window"."""
    return import_module(f"fastl2o.kernels.lstm.{module}")


def step_(backend: str, rule: Rule, named: Named) -> None:
    """The in-place step by "cuda" or "triton"; `named` holds the arguments of the op's schema."""
    if named["meta"].dim() == 2:
        for one in _each_tensor(named):
            step_(backend, rule, one)
        return
    lists = (named["params"], named["grads"], named["states"], named.get("steps", ()))
    options = [named[name] for name in ("lr", "weight_decay", "maximize", "nonfinite")]
    scalars = (named["grad_scale"], named["found_inf"])
    seed = named["rounding_seed"]
    if backend == "triton":
        _triton("step").step_(rule, *lists, named["meta"], *options, *scalars, seed)
        return
    torch.ops.fastl2o_cuda.step_(
        *(*map(list, lists), named["meta"], *cuda_arguments(rule), *options, *scalars, fast()),
        *(seed is not None, seed or 0),
    )


def _each_tensor(named: Named) -> Iterator[Named]:
    """The calls of a step whose meta-parameters are a set for each tensor."""
    for index, meta in enumerate(named["meta"]):
        lists = {key: [value[index]] for key, value in named.items() if isinstance(value, _LISTS)}
        yield {**named, **lists, "meta": meta}


def step(backend: str, rule: Rule, named: Named) -> tuple[Tensor, Tensor]:
    """The functional step by "cuda" or "triton", without derivative."""
    grad, state, taken, meta = _window_start(named, "grad")
    if backend == "triton":
        return _triton("window").step(rule, grad, state, taken, meta)
    return torch.ops.fastl2o_cuda.step(grad, state, taken, meta, *cuda_arguments(rule), fast())


def step_backward(backend: str, rule: Rule, named: Named) -> tuple[Tensor, Tensor, Tensor]:
    """The derivative of the functional step, by "cuda" or "triton"."""
    upstream = (named["d_update"].contiguous(), named["d_new_state"].contiguous())
    start = _window_start(named, "grad")
    if backend == "triton":
        return _triton("window").step_backward(rule, *upstream, *start)
    return torch.ops.fastl2o_cuda.step_backward(*upstream, *start, *cuda_arguments(rule), fast())


def unroll_backward(backend: str, rule: Rule, named: Named) -> tuple[Tensor, Tensor]:
    """The derivative of a window of steps, by "cuda" or "triton"."""
    start = _window_start(named, "grads")
    rest = (named["loss_weights"], named["steps"])
    decay = (named["lr"], named["weight_decay"])
    given = (named.get("d_updates"), named.get("d_last_state"))
    if backend == "triton":
        if given == (None, None):
            return _triton("window").unroll_backward(rule, *start, *rest, *decay)
        d_updates, d_last = given
        if d_updates is None:
            d_updates = _update_gradients(named)
        return _triton_steps_backward(rule, *start, d_updates, d_last)
    return torch.ops.fastl2o_cuda.unroll_backward(
        *start, *rest, *cuda_arguments(rule), *decay, *given, fast()
    )


def _update_gradients(named: Named) -> Tensor:
    """The dL/du_t `(T, R, D)` that a window's loss weights stand for."""
    grads, weights, steps = named["grads"], named["loss_weights"], named["steps"]
    later, own = torch.zeros_like(grads[:steps]), torch.zeros_like(weights[:steps])
    later[: len(grads) - 1], own[: len(grads) - 1] = grads[1:], weights[1:]
    return reference.adjoints_(later, own, 1.0 - named["lr"] * named["weight_decay"]) * named["lr"]


def _triton_steps_backward(
    rule: Rule,
    grads: Tensor,
    state: Tensor,
    first_step: int,
    meta: Tensor,
    d_updates: Tensor,
    d_last_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Step by step back from given dL/du_t: Triton's window takes only one step of these."""
    kernels, states = _triton("window"), [state]
    steps = len(d_updates)
    for t in range(steps - 1):
        states.append(kernels.step(rule, grads[t], states[t], first_step + t, meta)[1])
    d_meta = torch.zeros_like(meta)
    d_state = torch.zeros_like(state) if d_last_state is None else d_last_state
    for t in reversed(range(steps)):
        _, d_state, d_step = kernels.step_backward(
            rule, d_updates[t], d_state, grads[t], states[t], first_step + t, meta
        )
        d_meta += d_step
    return d_meta, d_state


def _window_start(named: Named, grad: str) -> tuple[Tensor, Tensor, int, Tensor]:
    return named[grad], named["state"], named.get("step", 0), named["meta"]


def interpreted_step_(rule: Rule, *arguments: Any) -> None:
    """The in-place step by Triton's interpreter; arguments as of the op, without the config."""
    taken = ("steps",) if rule.needs_step else ()
    names = ("params", "grads", "states", *taken, "meta", "lr", "weight_decay", "maximize")
    names += ("nonfinite", "grad_scale", "found_inf", "rounding_seed")
    step_("triton", rule, dict(zip(names, arguments, strict=True)))


class _InterpretedStep(torch.autograd.Function):
    """The functional step by Triton's interpreter."""

    @staticmethod
    def forward(
        ctx: Any, rule: Rule, grad: Tensor, state: Tensor, taken: int, meta: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.rule, ctx.taken = rule, taken
        ctx.save_for_backward(grad, state, meta)
        return _triton("window").step(rule, grad, state, taken, meta)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_update: Tensor, d_new_state: Tensor) -> tuple[Tensor | None, ...]:
        grad, state, meta = ctx.saved_tensors
        d_grad, d_state, d_meta = _triton("window").step_backward(
            ctx.rule, d_update, d_new_state, grad, state, ctx.taken, meta
        )
        return None, d_grad, d_state, None, d_meta


def interpreted_step(
    rule: Rule, grad: Tensor, state: Tensor, taken: int, meta: Tensor
) -> tuple[Tensor, Tensor]:
    """The functional step by Triton's interpreter, differentiable once."""
    return _InterpretedStep.apply(rule, grad, state, taken, meta)


def dispatched(
    function: Callable[[str, Rule, Named], Any],
    rule_of: Callable[[Named], Rule],
    default: Callable[[Named], Any],
) -> Callable[[Named], Any]:
    """The CUDA-key implementation of an op: the fastest backend that takes the call.

    Args:
        function: one of this module, for "cuda" and "triton".
        rule_of: the rule that an op's arguments describe.
        default: the op in plain torch.
    """

    def kernel(named: Named) -> Any:
        rule, lists = rule_of(named), "params" in named
        tensors = [named["meta"]] if lists else [v for v in named.values() if _is_tensor(v)]
        unsupported = ""
        if lists:
            unsupported = one_dtype(named["params"], named["states"])
            tensors += [state for state in named["states"] if state.dtype != torch.bfloat16]
        if any(tensor.dtype != torch.float32 for tensor in tensors):
            unsupported = "its kernels take float32 (states also bfloat16): convert the tensors"
        device = named["meta"].device
        chosen = backends.choose(device, unsupported, refuses=objections(rule, device))
        if chosen == "reference":
            return default(named)
        _check_devices(named, device)
        return function(chosen, rule, named)

    return kernel


def _check_devices(named: Named, device: torch.device) -> None:
    """Kernels read addresses: a tensor of another device must not get there."""
    for name, value in named.items():
        tensors = value if isinstance(value, list | tuple) else [value]
        for index, tensor in enumerate(tensors):
            if _is_tensor(tensor) and tensor.device != device:
                place = name if tensors is not value else f"{name}[{index}]"
                raise ValueError(
                    f"{place} is on {tensor.device}, meta on {device}: move all tensors of a call "
                    "to one device"
                )


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)
