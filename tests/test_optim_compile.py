"""LearnedOptimizer and the ops under torch.compile: the same numbers as without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastl2o
from fastl2o import LearnedOptimizer, LSTMRule
from tests.common import SMALL_RULE_CASES, RuleCase, random_state
from tests.optimizers import RANDOM, OptimizerCase, assert_same_bits, run_steps, snapshot

pytestmark = [
    # Of torch's own optimizers and of its compiler, which look at .grad of what is no leaf and
    # still use TorchScript.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning"),
]
STEPS = 4
Step = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Training:
    """A small network, its optimizer and data, the same every time."""

    def __init__(self, case: OptimizerCase, **options: Any) -> None:
        torch.manual_seed(0)
        layers = torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)
        self.model = torch.nn.Sequential(*layers)
        self.optimizer = LearnedOptimizer(self.model.parameters(), case.rule(0), **options)
        self.inputs = torch.randn(STEPS, 8, 4)

    def loss(self, inputs: Tensor) -> Tensor:
        return self.model(inputs).square().mean()

    def step(self, inputs: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.loss(inputs)
        loss.backward()
        self.optimizer.step()
        return loss

    def run(self, step: Step) -> list[Tensor]:
        losses = [step(inputs).detach() for inputs in self.inputs]
        return [*losses, *snapshot(self.optimizer)]

    def compile(self, part: str, backend: str) -> Step:
        """A training step of which one part is compiled."""
        if part == "training step":
            return torch.compile(self.step, backend=backend)
        if part == "model":
            self.loss = torch.compile(self.loss, backend=backend)  # type: ignore[method-assign]
        else:
            self.optimizer.step = torch.compile(  # type: ignore[method-assign]
                self.optimizer.step, backend=backend
            )
        return self.step


@pytest.mark.parametrize("part", ["model", "optimizer step", "training step"])
@pytest.mark.parametrize("case", RANDOM, ids=repr)
def test_compiled_training_has_the_same_bits(case: OptimizerCase, part: str) -> None:
    plain, compiled = Training(case, weight_decay=0.1), Training(case, weight_decay=0.1)
    expected = plain.run(plain.step)
    assert_same_bits(compiled.run(compiled.compile(part, "aot_eager")), expected)


def test_a_scheduler_is_followed_from_compiled_code() -> None:
    plain, compiled = Training(RANDOM[0]), Training(RANDOM[0])
    results = []
    for training, step in (
        (plain, plain.step),
        (compiled, compiled.compile("training step", "aot_eager")),
    ):
        scheduler = torch.optim.lr_scheduler.ExponentialLR(training.optimizer, gamma=0.5)
        losses = []
        for inputs in training.inputs:
            losses.append(step(inputs).detach())
            scheduler.step()
        results.append([*losses, *snapshot(training.optimizer)])
    assert_same_bits(*results)


@pytest.mark.slow
def test_inductor_trains_alike() -> None:
    """Its kernels round the model otherwise, not the step."""
    plain, compiled = Training(RANDOM[0]), Training(RANDOM[0])
    expected = plain.run(plain.step)
    torch.testing.assert_close(
        compiled.run(compiled.compile("training step", "inductor")), expected
    )


def test_a_refused_step_is_refused_from_compiled_code_too() -> None:
    training = Training(RANDOM[0])
    step = training.compile("training step", "aot_eager")
    step(training.inputs[0])
    before = [p.detach().clone() for p in training.model.parameters()]
    with pytest.raises(RuntimeError, match="holds NaN or Inf; nothing was changed"):
        step(torch.full_like(training.inputs[0], torch.nan))
    assert_same_bits(training.model.parameters(), before)


@pytest.mark.parametrize("case", SMALL_RULE_CASES[:4], ids=str)
def test_functional_steps_compile_into_one_graph_with_their_backward(case: RuleCase) -> None:
    """Without a break in the graph, as meta-training in a user's own compiled loop needs it."""
    rule = case.make()
    family = fastl2o.ops.FAMILIES[rule.family]
    config = family.arguments(rule)
    taken = (3,) if rule.needs_step else ()
    generator = torch.Generator().manual_seed(0)
    meta, grad = rule.flat_parameters().detach(), torch.randn(5, generator=generator)
    state = random_state(rule, (5,), generator)

    def two_steps(meta: Tensor, grad: Tensor, state: Tensor) -> Tensor:
        for _ in range(2):
            update, state = family.step(grad, state, *taken, meta, *config)
            grad = grad.sin() + update
        return grad.square().sum() + state.sum()

    results = []
    for run in (two_steps, torch.compile(two_steps, backend="aot_eager", fullgraph=True)):
        inputs = [tensor.clone().requires_grad_() for tensor in (meta, grad, state)]
        loss = run(*inputs)
        results.append([loss.detach(), *torch.autograd.grad(loss, inputs)])
    assert_same_bits(*results)


def test_a_list_op_compiles_into_one_graph() -> None:
    """The op under the step: what it changes is known to the compiler, so uses before and after
    it are kept in order."""
    rule = LSTMRule(3)
    meta = rule.flat_parameters().detach()
    config = fastl2o.ops.FAMILIES["lstm"].arguments(rule)

    def around(param: Tensor, grad: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        before = param * 2
        torch.ops.fastl2o.lstm_step_([param], [grad], [state], meta, *config, 1.0, 0.0, False, 0)
        return before, param * 2 + state.sum()

    results = []
    for run in (around, torch.compile(around, backend="aot_eager", fullgraph=True)):
        param, grad = torch.linspace(-1, 1, 5), torch.linspace(1, 2, 5)
        state = torch.zeros(rule.state_planes, 5)
        results.append([*run(param, grad, state), param, state])
    assert_same_bits(*results)


def test_an_optimizer_goes_on_outside_of_compiled_code() -> None:
    plain, compiled = Training(RANDOM[1]), Training(RANDOM[1])
    plain.run(plain.step)
    compiled.run(compiled.compile("training step", "aot_eager"))
    for training in (plain, compiled):
        run_steps(training.optimizer, 2)
    assert_same_bits(snapshot(plain.optimizer), snapshot(compiled.optimizer))
