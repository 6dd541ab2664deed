"""What the tests of the hierarchical rule's C++ kernels share: problems and the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastl2o.ops  # noqa: F401  (loads the ops)
from fastl2o.rules.hierarchical import HierarchicalRule, ProblemState
from tests.test_cpu_kernels import core

DEFAULT, ODD, SMALLEST = (10, 20, 20, 4), (7, 9, 11, 3), (1, 1, 1, 1)
SHAPES = ((5, 3), (7,), (), (0,), (65,), (2049,), (1,))
TOLERANCE = 1e-5  # of the largest number of a tensor, of the norm of a gradient


def op_sizes(rule: HierarchicalRule) -> dict[str, int]:
    """What the ops know of a rule."""
    names = ("param_size", "tensor_size", "global_size", "num_scales")
    return {name: getattr(rule, name) for name in names}


def make_rule(sizes: Sequence[int] = DEFAULT, seed: int = 0) -> HierarchicalRule:
    """A rule in float64 that float32 holds exactly, none of whose readouts is zero."""
    rule = HierarchicalRule(*sizes)
    generator = torch.Generator().manual_seed(seed)
    rule.reset_parameters(generator)
    with torch.no_grad():
        rule.rate.normal_(0.0, 0.1, generator=generator)
        rule.rate_bias.fill_(0.01)
    return rule.double()


@dataclass
class Problem:
    """Parameters, gradients and float32 state of one problem, as the op takes them."""

    params: list[Tensor]
    grads: list[Tensor]
    planes: list[Tensor]
    states: list[Tensor]
    steps: list[Tensor]
    hidden: Tensor  # (1, global_size)

    @classmethod
    def make(
        cls,
        rule: HierarchicalRule,
        shapes: Sequence[tuple[int, ...]] = SHAPES,
        dtypes: Sequence[torch.dtype] = (torch.float32,),
        planes: torch.dtype = torch.float32,
        taken: int = 2,
        seed: int = 0,
    ) -> Problem:
        """A problem some way into its run: `taken` steps of the reference."""
        generator = torch.Generator().manual_seed(seed)
        params = [torch.randn(shape, generator=generator) for shape in shapes]
        state = rule.init_problem(params, seed, torch.float64)
        for _ in range(taken):
            with torch.no_grad():
                grads = [random_grad(param, generator) for param in params]
                _, state = rule.reference_step([grad.double() for grad in grads], state)
        stored = [plane.to(planes) for plane in state.planes]
        own = [tensor.float() for tensor in state.tensors]
        for tensor, plane in zip(own, stored, strict=True):
            if plane.numel():
                tensor[-1] = plane[-1].double().mean()
        typed = [param.to(dtypes[i % len(dtypes)]) for i, param in enumerate(params)]
        return cls(
            typed,
            [random_grad(param, generator).to(param.dtype) for param in typed],
            stored,
            own,
            [torch.tensor(float(step)) for step in state.steps],
            state.hidden.float()[None],
        )

    def clone(self) -> Problem:
        lists = (self.params, self.grads, self.planes, self.states, self.steps)
        return Problem(*([t.clone() for t in part] for part in lists), self.hidden.clone())

    def tensors(self) -> list[Tensor]:
        return [
            *self.params, *self.grads, *self.planes, *self.states, *self.steps, self.hidden
        ]  # fmt: skip

    def problem_state(self) -> ProblemState:
        """The same state in float64, for the reference."""
        return ProblemState(
            [plane.double() for plane in self.planes],
            [tensor.double() for tensor in self.states],
            [int(step) for step in self.steps],
            self.hidden[0].double(),
        )


def random_grad(param: Tensor, generator: torch.Generator) -> Tensor:
    scale = 10.0 ** float(torch.randn((), generator=generator))
    return scale * torch.randn(param.shape, generator=generator)


def run_op(rule: HierarchicalRule, problem: Problem, **changes: Any) -> None:
    """The in-place op on the CPU kernels, whatever backend is the default."""
    count = len(problem.params)
    arguments: dict[str, Any] = dict(
        params=problem.params,
        grads=problem.grads,
        planes=problem.planes,
        tensor_states=problem.states,
        steps=problem.steps,
        global_states=problem.hidden,
        problems=[],
        meta=rule.flat_parameters().detach().float(),
        **op_sizes(rule),
        lr=[1.0] * count,
        weight_decay=[0.0] * count,
        maximize=False,
        nonfinite=2,
    )
    torch.ops.fastl2o.hierarchical_step_(**(arguments | changes))


def run_core(isa: str, rule: HierarchicalRule, problem: Problem, threads: int = 1) -> Problem:
    """One step of the binding, which works in place on float32 arrays."""
    new = problem.clone()
    states = np.stack([tensor.numpy() for tensor in new.states])
    steps = np.array([float(step) for step in new.steps], np.float32)
    meta = rule.flat_parameters().detach().float().numpy()
    arrays = ([t.numpy() for t in part] for part in (new.params, new.grads, new.planes))
    core.hierarchical_step(
        isa,
        list(op_sizes(rule).values()),
        meta,
        *arrays,
        states,
        steps,
        new.hidden.numpy(),
        [0] * len(new.params),
        threads=threads,
    )
    new.states = list(torch.from_numpy(states))
    new.steps = list(torch.from_numpy(steps))
    return new


def assert_close(result: Tensor, exact: Tensor, tolerance: float = TOLERANCE) -> None:
    if exact.numel():
        error = (result.double() - exact).abs().max()
        assert float(error) <= tolerance * float(exact.abs().max()) + 1e-30


def assert_stepped(
    rule: HierarchicalRule,
    before: Problem,
    after: Problem,
    grads: Sequence[Tensor | None],
    *,
    param_tolerance: float = TOLERANCE,
    planes_tolerance: float = TOLERANCE,
    lr: float = 1.0,
    weight_decay: float = 0.0,
) -> None:
    """`after` is one step of the reference on from `before`."""
    with torch.no_grad():
        updates, state = rule.reference_step(grads, before.problem_state())
    for i, update in enumerate(updates):
        moved = before.params[i].double()
        if update is not None and update.numel():
            moved = (1 - lr * weight_decay) * moved + lr * update
        assert_close(after.params[i], moved, param_tolerance)
        assert_close(after.planes[i], state.planes[i], planes_tolerance)
        assert_close(after.states[i], state.tensors[i])
        assert int(after.steps[i]) == state.steps[i]
    assert_close(after.hidden[0], state.hidden)


def same_bits(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(
        a.numpy().tobytes() == b.numpy().tobytes() if a.dtype != torch.bfloat16 else a.equal(b)
        for a, b in zip(one, other, strict=True)
    )
