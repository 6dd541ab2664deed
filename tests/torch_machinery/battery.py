"""What torch asks of every optimizer, asked of ours through torch's own machinery.

torch's test file is not part of its wheel, so the questions are put here in our words; the cases
(``OptimizerInfo``, its option combinations and error inputs, ``optims``, ``TensorTracker``, the
test case with its tolerances) are torch's. Adam and SGD answer the same questions.
"""

from __future__ import annotations

import copy
import io
import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_optimizers import (
    OptimizerErrorEnum,
    OptimizerInfo,
    TensorTracker,
    _get_optim_inputs_including_global_cliquey_kwargs,
    optims,
)
from torch.testing._internal.common_utils import TestCase

from .infos import ALL, OURS, held_to

# The maths of a step is float32 whatever the parameter's dtype.
FLOAT32 = {"rtol": 1.3e-6, "atol": 1e-5}
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# Autograd cannot step through leaves, which all parameters here are.
NOT_RECORDED = ("differentiable",)


def _options(info: OptimizerInfo, device: str, dtype: Any, skip: Any = NOT_RECORDED) -> list[Any]:
    """Every combination of options that torch's machinery makes of an optimizer's."""
    inputs = _get_optim_inputs_including_global_cliquey_kwargs(device, dtype, info, skip=skip)
    return [each.kwargs for each in inputs]


def _params(device: str, dtype: torch.dtype, seed: int = 0) -> list[Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((10, 5), (10,), (), (2, 1, 3))
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float32) for shape in shapes]
    return [Parameter(tensor.to(device, dtype)) for tensor in drawn]


def _set_grads(params: list[Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        drawn = torch.randn(p.shape, generator=generator, dtype=torch.float32)
        p.grad = drawn.to(p.device, p.dtype)


def _steps(optimizer: Any, steps: int, seed: int = 0) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(steps):
        _set_grads(params, seed + step)
        optimizer.step()


def _clones(params: list[Parameter]) -> list[Parameter]:
    return [Parameter(p.detach().clone()) for p in params]


def _states(optimizer: Any) -> list[Tensor]:
    """Every tensor of the state, in the order of parameters and names."""
    state = optimizer.state_dict()["state"]
    entries = [state[key] for key in sorted(state, key=str)]
    named = [entry[name] for entry in entries for name in sorted(entry)]
    return [value for value in named if isinstance(value, Tensor)]


class TestBattery(TestCase):
    """One method a question; torch's machinery asks it of each optimizer."""

    def assert_same(self, first: list[Tensor], second: list[Tensor]) -> None:
        self.assertEqual(len(first), len(second))
        for a, b in zip(first, second, strict=True):
            self.assertTrue(torch.equal(a, b))

    # Construction

    @optims(OURS)
    def test_refuses(self, device: str, dtype: Any, optim_info: OptimizerInfo) -> None:
        for error in optim_info.optim_error_inputs_func(device, dtype):
            given = error.optimizer_error_input
            params = _params(device, dtype)[:1] if given.params is None else given.params
            if error.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR:
                with self.assertRaisesRegex(error.error_type, error.error_regex):
                    optim_info.optim_cls(params, **given.kwargs)
            else:
                optimizer = optim_info.optim_cls(params, **given.kwargs)
                with self.assertRaisesRegex(error.error_type, error.error_regex):
                    optimizer.step()

    @optims(ALL)
    def test_prints_its_options(self, device: str, dtype: Any, optim_info: OptimizerInfo) -> None:
        for options in _options(optim_info, device, dtype, skip=()):
            text = repr(optim_info.optim_cls(_params(device, dtype), **options))
            for name, value in options.items():
                self.assertIn(f"{name}: {value}", text)

    @optims(ALL)
    def test_takes_groups_later(self, device: str, dtype: Any, optim_info: OptimizerInfo) -> None:
        params, twins = _params(device, dtype), _params(device, dtype)
        late = optim_info.optim_cls(params[:2])
        late.add_param_group({"params": params[2:], "lr": 0.25})
        groups = [{"params": twins[:2]}, {"params": twins[2:], "lr": 0.25}]
        for optimizer in (late, optim_info.optim_cls(groups)):
            _steps(optimizer, 3)
        self.assert_same(params, twins)

    # Direction

    @optims(held_to("the loss goes down"))
    def test_goes_downhill(self, device: str, dtype: Any, optim_info: OptimizerInfo) -> None:
        plans = [(options, []) for options in _options(optim_info, device, dtype)]
        plans += [({}, makers) for makers in optim_info.scheduler_inputs]
        for strided in (False, True):
            for options, makers in plans:
                self.assert_downhill(device, dtype, optim_info, options, makers, strided)

    def assert_downhill(
        self, device: str, dtype: Any, info: OptimizerInfo, options: Any, makers: Any, strided: bool
    ) -> None:
        generator = torch.Generator().manual_seed(3)
        drawn = torch.randn(10, 5, 2, generator=generator).to(device, dtype)[..., 0]
        weight = Parameter(drawn if strided else drawn.contiguous())
        bias = Parameter(torch.zeros(10, device=device, dtype=dtype))
        inputs = torch.randn(5, generator=generator).to(device, dtype)
        options = copy.deepcopy(options)
        optimizer = info.optim_cls([weight, bias], **options)
        schedulers = [make(optimizer) for make in makers]

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = (weight @ inputs + bias).square().mean()
            loss.backward()
            return loss

        losses = []
        for _ in range(10):
            loss = optimizer.step(closure)
            losses.append(loss.item())
            for scheduler in schedulers:
                plateau = isinstance(scheduler, ReduceLROnPlateau)
                scheduler.step(*losses[-1:] if plateau else ())
        if options.get("maximize"):
            self.assertGreater(losses[-1], losses[0])
        else:
            self.assertLess(losses[-1], losses[0])

    # Implementations agree

    def assert_agrees_with_forloop(
        self, device: str, dtype: Any, info: OptimizerInfo, flag: str
    ) -> None:
        for options in [each.kwargs for each in info.optim_inputs_func(device, dtype)]:
            tracker = TensorTracker()
            for on_kernels in (False, True):
                flags = dict.fromkeys(("foreach", "fused"), False)
                flags[flag] = on_kernels
                chosen = {**copy.deepcopy(options), **flags}
                params = _params(device, dtype)
                optimizer = info.optim_cls(params, **chosen)
                for step in range(7):
                    _set_grads(params, step)
                    if step == 2:
                        optimizer.zero_grad()
                    if 3 <= step <= 5:
                        params[1].grad = None
                    optimizer.step()
                    kept = [p.detach() for p in params]
                    kept += [
                        value
                        for entry in map(optimizer.state.get, [*params, *_shared(optimizer)])
                        for _, value in sorted((entry or {}).items())
                        if isinstance(value, Tensor)
                    ]
                    for tensor in kept:
                        if on_kernels:
                            wide = FLOAT32 if tensor.dtype == torch.float64 else None
                            tracker.pop_check_set(tensor, self, wide)
                        else:
                            tracker.add(tensor)
            self.assertTrue(tracker.all_popped())

    @optims(ALL, dtypes=[torch.float64])
    def test_foreach_agrees(self, device: str, dtype: Any, optim_info: OptimizerInfo) -> None:
        self.assert_agrees_with_forloop(device, dtype, optim_info, "foreach")

    @optims(ALL, dtypes=[torch.float64, torch.float32])
    def test_fused_agrees(self, device: str, dtype: Any, optim_info: OptimizerInfo) -> None:
        self.assert_agrees_with_forloop(device, dtype, optim_info, "fused")

    # torch's fused Adam and SGD round otherwise than their loops; ours are held to the defaults
    @optims(OURS, dtypes=[torch.float16, torch.bfloat16])
    def test_fused_agrees_in_half(self, device: str, dtype: Any, optim_info: OptimizerInfo) -> None:
        self.assert_agrees_with_forloop(device, dtype, optim_info, "fused")

    @optims(ALL)
    def test_mixes_dtypes(self, device: str, dtype: Any, optim_info: OptimizerInfo) -> None:
        together = [p for each in DTYPES for p in _params(device, each)]
        for options in _options(optim_info, device, dtype):
            optimizer = optim_info.optim_cls(_clones(together), **options)
            _steps(optimizer, 2)
            params = optimizer.param_groups[0]["params"]
            self.assertTrue(all(bool(p.isfinite().all()) for p in params))
            count = len(params) // len(DTYPES)  # float64 comes first, and shows every change
            self.assertFalse(any(map(torch.equal, params[:count], together[:count])))

    @optims(ALL)
    def test_ignores_the_default_dtype(
        self, device: str, dtype: Any, optim_info: OptimizerInfo
    ) -> None:
        results = []
        for default in (torch.float64, torch.float32):
            torch.set_default_dtype(default)
            try:
                params = _params(device, dtype)
                for p in params:
                    p.grad = torch.ones_like(p)
                optimizer = optim_info.optim_cls(params)
                optimizer.step()
                optimizer.step()
            finally:
                torch.set_default_dtype(torch.float32)
            results.append(params)
        self.assertEqual(*results)

    @optims(ALL, dtypes=[torch.complex64])
    def test_complex_is_two_reals(self, device: str, dtype: Any, optim_info: OptimizerInfo) -> None:
        for options in _options(optim_info, device, dtype):
            if options.get("fused") and optim_info not in OURS:
                continue  # torch's fused kernels refuse complex parameters
            generator = torch.Generator().manual_seed(5)
            real = torch.randn(3, 4, 2, generator=generator)
            grads = torch.randn(4, 3, 4, 2, generator=generator)
            p, twin = Parameter(torch.view_as_complex(real.clone())), Parameter(real.clone())
            optimizers = [optim_info.optim_cls([q], **copy.deepcopy(options)) for q in (p, twin)]
            for grad in grads:
                p.grad, twin.grad = torch.view_as_complex(grad.clone()), grad.clone()
                for optimizer in optimizers:
                    optimizer.step()
            self.assertEqual(torch.view_as_real(p.detach()), twin.detach())

    # No-ops and gradient scaling

    @optims(ALL)
    def test_no_gradient_is_no_step(
        self, device: str, dtype: Any, optim_info: OptimizerInfo
    ) -> None:
        for options in _options(optim_info, device, dtype):
            params = _params(device, dtype)
            before = _clones(params)
            optim_info.optim_cls(params, **options).step()
            self.assert_same(params, before)

    @optims(held_to("zero gradients leave parameters alone"))
    def test_zero_gradients(self, device: str, dtype: Any, optim_info: OptimizerInfo) -> None:
        for options in _options(optim_info, device, dtype):
            if options.get("weight_decay"):
                continue
            params = _params(device, dtype)
            before = _clones(params)
            for p in params:
                p.grad = torch.zeros_like(p)
            optimizer = optim_info.optim_cls(params, **options)
            optimizer.step()
            optimizer.step()
            self.assert_same(params, before)

    @optims(ALL)
    def test_found_inf_is_no_step(self, device: str, dtype: Any, optim_info: OptimizerInfo) -> None:
        for options in [each.kwargs for each in optim_info.optim_inputs_func(device, dtype)]:
            params = _params(device, dtype)
            optimizer = optim_info.optim_cls(params, **options, fused=True)
            _steps(optimizer, 2)
            before = copy.deepcopy([*params, *_states(optimizer)])
            optimizer.grad_scale = torch.ones(1, device=device)
            optimizer.found_inf = torch.ones((), device=device)
            optimizer.step()
            self.assert_same([*params, *_states(optimizer)], before)

    # State

    def resumed(self, info: OptimizerInfo, options: Any, change: Any) -> None:
        """A run that goes on from a changed state_dict, beside one that simply goes on."""
        params = _params("cpu", torch.float32)
        optimizer = info.optim_cls(params, **options)
        _steps(optimizer, 3)
        saved = change(copy.deepcopy(optimizer.state_dict()))
        twins = _clones(params)
        other = info.optim_cls(twins, **copy.deepcopy(options))
        other.load_state_dict(saved)
        for each in (optimizer, other):
            _steps(each, 3, seed=50)
        self.assertEqual(params, twins)
        self.assertEqual(_states(optimizer), _states(other))

    @optims(ALL)
    def test_resumes(self, device: str, dtype: Any, optim_info: OptimizerInfo) -> None:
        def unchanged(state_dict: Any) -> Any:
            return state_dict

        def through_a_file(state_dict: Any) -> Any:
            file = io.BytesIO()
            torch.save(state_dict, file)
            file.seek(0)
            return torch.load(file, weights_only=True)

        def of_an_older_version(state_dict: Any) -> Any:
            for group in state_dict["param_groups"]:
                for flag in optim_info.not_og_supported_flags:
                    group.pop(flag, None)
            return state_dict

        def with_numbers_for_steps(state_dict: Any) -> Any:
            for entry in state_dict["state"].values():
                if isinstance(entry.get("step"), Tensor):
                    entry["step"] = entry["step"].item()
            return state_dict

        for options in _options(optim_info, device, dtype):
            for change in (unchanged, through_a_file, with_numbers_for_steps):
                self.resumed(optim_info, options, change)
            kept = {k: v for k, v in options.items() if k not in optim_info.not_og_supported_flags}
            self.resumed(optim_info, kept, of_an_older_version)

    @optims(ALL)
    def test_names_are_exchanged(self, device: str, dtype: Any, optim_info: OptimizerInfo) -> None:
        plain = _params(device, dtype)
        named = [(f"layer.{i}", p) for i, p in enumerate(_clones(plain))]
        for source, target in ((plain, named), (named, plain)):
            saving = optim_info.optim_cls(source)
            _steps(saving, 1)
            loading = optim_info.optim_cls(target)
            loading.load_state_dict(saving.state_dict())
            self.assertEqual(_states(saving), _states(loading))
            names = [name for name, _ in named]
            self.assertEqual(loading.param_groups[0]["param_names"], names)

    @optims(ALL)
    def test_deepcopy(self, device: str, dtype: Any, optim_info: OptimizerInfo) -> None:
        for options in _options(optim_info, device, dtype, skip=()):
            optimizer = optim_info.optim_cls(_params(device, dtype), **options)
            twin = copy.deepcopy(optimizer)
            public = [{n for n in vars(o) if not n.startswith("_")} for o in (optimizer, twin)]
            self.assertEqual(*public)

    # Hooks

    @optims(ALL)
    def test_hooks(self, device: str, dtype: Any, optim_info: OptimizerInfo) -> None:
        optimizer, seen = optim_info.optim_cls(_params(device, dtype)), []

        def note(word: str) -> Any:
            return lambda *_: seen.append(word)

        handles = [
            register_optimizer_step_pre_hook(note("every pre")),
            register_optimizer_step_post_hook(note("every post")),
            optimizer.register_step_pre_hook(note("pre")),
            optimizer.register_step_post_hook(note("post")),
            optimizer.register_state_dict_pre_hook(note("save pre")),
            optimizer.register_state_dict_post_hook(note("save post")),
            optimizer.register_load_state_dict_pre_hook(note("load pre")),
            optimizer.register_load_state_dict_post_hook(note("load post")),
        ]
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        for handle in handles:
            handle.remove()
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        around_step = ["every pre", "pre", "post", "every post"]
        self.assertEqual(seen, [*around_step, "save pre", "save post", "load pre", "load post"])


def _shared(optimizer: Any) -> list[str]:
    """State that belongs to no parameter."""
    return [key for key in optimizer.state if isinstance(key, str)]


instantiate_device_type_tests(TestBattery, sys.modules[__name__].__dict__, only_for="cpu")
