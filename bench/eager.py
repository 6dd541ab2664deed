"""The baselines, in ordinary torch as a user would write them: no code of fastl2o computes here.

A coordinate-wise rule in eager torch is two ``LSTMCell`` on coordinates ``(N, features)`` and a
``Linear``; fastl2o's meta-parameters are only copied into them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastl2o.meta.tasks import MLPClassification
from fastl2o.rules import LSTMRule, RNNPropRule, Rule

State = list[Tensor]
"""``[(m, v),] h1, c1, h2, c2``, the moments ``(N,)`` and the others ``(N, hidden)``."""


class EagerRule(nn.Module):
    """Both rules: features, LSTM cells, readout.

    Args:
        rule: where the meta-parameters come from.
    """

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        weights = rule.unflatten(rule.flat_parameters().detach())
        self.config = rule.config()
        self.hidden, self.rnnprop = self.config["hidden_size"], isinstance(rule, RNNPropRule)
        width = self.hidden if self.rnnprop else 2
        if self.rnnprop:
            self.projection = nn.Linear(2, width)
            _fill(self.projection.weight, weights["projection.weight"])
            _fill(self.projection.bias, weights["projection.bias"])
        self.cells = nn.ModuleList()
        for number in range(self.config["num_layers"]):
            cell = nn.LSTMCell(width if number == 0 else self.hidden, self.hidden)
            for name in ("weight_ih", "weight_hh"):
                _fill(getattr(cell, name), weights[f"layers.{number}.{name}"])
            _fill(cell.bias_ih, weights[f"layers.{number}.bias"])
            _fill(cell.bias_hh, torch.zeros_like(cell.bias_hh))
            self.cells.append(cell)
        self.readout = nn.Linear(self.hidden, 1)
        _fill(self.readout.weight, weights["readout.weight"])
        _fill(self.readout.bias, weights["readout.bias"])

    def features(self, grad: Tensor, state: State, step: Tensor) -> tuple[Tensor, State]:
        """Inputs of the first cell ``(N, width)`` and the moments after the step."""
        if not self.rnnprop:
            p, eps = self.config["p"], self.config["eps"]
            log = (torch.log(grad.abs() + eps) / p).clamp(min=-1.0)
            return torch.stack((log, (math.exp(p) * grad).clamp(-1.0, 1.0)), dim=1), []
        beta1, beta2 = self.config["beta1"], self.config["beta2"]
        m = beta1 * state[0] + (1 - beta1) * grad
        v = beta2 * state[1] + (1 - beta2) * grad * grad
        rms = (v / (1 - beta2 ** (step + 1))).sqrt() + 1e-8
        inputs = torch.stack((grad / rms, m / (1 - beta1 ** (step + 1)) / rms), dim=1)
        return F.elu(self.projection(inputs)), [m, v]

    def forward(self, grad: Tensor, state: State, step: Tensor) -> tuple[Tensor, State]:
        """Update ``(N,)`` and new state, for ``grad (N,)`` after ``step`` steps (0-dim)."""
        x, new_state = self.features(grad, state, step)
        cells = state[2:] if self.rnnprop else state
        for number, cell in enumerate(self.cells):
            x, c = cell(x, (cells[2 * number], cells[2 * number + 1]))
            new_state += [x, c]
        out = self.readout(x).squeeze(1)
        if self.rnnprop:
            return -self.config["step_size"] * out.tanh(), new_state
        return self.config["output_scale"] * out, new_state

    def flat_gradient(self, loss: Tensor) -> Tensor:
        """d loss / d meta-parameters in the order of ``Rule.flat_parameters``; frees the graph."""
        named = {k: v for k, v in self.named_parameters() if not k.endswith("bias_hh")}
        gradients = torch.autograd.grad(loss, list(named.values()))
        return torch.cat([gradient.reshape(-1) for gradient in gradients])


def _fill(parameter: Tensor, values: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(values)


def eager_state(rule: Rule, planes: Tensor) -> State:
    """fastl2o's planes ``(S, ...)`` in the layout of the cells."""
    flat, first = planes.reshape(planes.shape[0], -1), 0
    moments: State = []
    if rule.needs_step:
        moments, first = [flat[0].clone(), flat[1].clone()], 2
    return moments + [
        part.T.contiguous() for part in flat[first:].split(rule.config()["hidden_size"])
    ]


class EagerOptimizer:
    """Steps one tensor of N coordinates in place, without a graph.

    Args:
        rule: meta-parameters and config.
        param, grad: ``(N,)``.
        wrap: applied to the function that is a whole step; ``torch.compile`` for that baseline.
    """

    def __init__(
        self, rule: Rule, param: Tensor, grad: Tensor, wrap: Callable[[Any], Any] = lambda f: f
    ) -> None:
        self.net, self.param, self.grad = EagerRule(rule), param, grad
        self.state = eager_state(rule, rule.init_state(param))
        self.taken = torch.zeros(())
        self._step = wrap(self._eager_step)

    def _eager_step(self, param: Tensor, grad: Tensor, state: State, taken: Tensor) -> State:
        update, new_state = self.net(grad, state, taken)
        param.add_(update)
        taken.add_(1)
        return new_state

    @torch.no_grad()
    def step(self) -> None:
        """One step."""
        self.state = self._step(self.param, self.grad, self.state, self.taken)


def compiled_optimizer(rule: Rule, param: Tensor, grad: Tensor) -> EagerOptimizer | str:
    """The same under ``torch.compile``, already compiled, or the reason why it does not work."""
    made = EagerOptimizer(rule, param, grad, lambda step: torch.compile(step, fullgraph=True))
    try:
        with warnings.catch_warnings():
            # torch's own warnings while it compiles are none of this benchmark's.
            warnings.simplefilter("ignore")
            for _ in range(3):  # a step that recompiles does so by its second or third call
                made.step()
    except Exception as error:  # whatever the tool chain lacks
        first = (str(error).strip().splitlines() or [""])[0]
        return f"torch.compile does not work here: {type(error).__name__}: {first}"
    return made


def unroll_gradient(
    net: EagerRule, grads: Tensor, state: State, loss_weights: Tensor, steps: int
) -> Tensor:
    """d_meta ``(M,)`` of a recorded window by autograd through ``steps`` eager steps.

    The recorded gradients are constants, so f_t may stand as its linear part g_t . theta_t.

    Args:
        grads: ``(steps + 1, R, D)``, recorded.
        state: at the window's start.
        loss_weights: ``(steps + 1, R)``.
    """
    weighted = (loss_weights.unsqueeze(2) * grads).flatten(1)  # (T + 1, N)
    flat, theta = grads.flatten(1), torch.zeros_like(grads[0]).flatten()
    loss = theta.new_zeros(())
    for t in range(steps):
        update, state = net(flat[t], state, torch.tensor(float(t)))
        theta = theta + update
        loss = loss + torch.dot(weighted[t + 1], theta)
    return net.flat_gradient(loss)


class EagerMetaTraining:
    """The meta-training loop of ``lstm-mnist`` in eager autograd: truncated back-propagation.

    As the recipe does it: R runs at a time, new ones after ``horizon`` steps; task gradients are
    constants; Adam with clipping. The meta-loss of a window is over f_1 .. f_T: ``"sum"`` is the
    mean over runs of their sum, ``"log"`` the mean of log(f_t / f at the run's start). The
    network's batched matrix products are the fastest eager form of R runs.
    """

    def __init__(
        self,
        rule: LSTMRule,
        task: MLPClassification,
        *,
        runs: int = 4,
        unroll: int = 20,
        objective: str = "sum",
        horizon: int = 100,
        lr: float = 1e-2,
        clip: float = 10.0,
        seed: int = 0,
    ) -> None:
        self.net, self.rule, self.task = EagerRule(rule), rule, task
        self.runs, self.unroll, self.horizon, self.clip = runs, unroll, horizon, clip
        if objective not in ("sum", "log"):
            raise ValueError(f"the eager loop knows the objectives sum and log, not {objective!r}")
        self.objective = objective
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=lr)
        self.generator = torch.Generator().manual_seed(seed)
        self.images, self.labels = task.examples()
        self._start()

    def _start(self) -> None:
        self.run = self.task.sample(self.runs, self.generator)
        params = self.run.params.clone().requires_grad_()
        losses = self._losses(params)
        (self.grads,) = torch.autograd.grad(losses.sum(), params)
        self.first_losses = losses.detach()
        self.params, self.taken = params.detach(), 0
        self.state = eager_state(self.rule, self.rule.init_state(params))

    def _losses(self, params: Tensor) -> Tensor:
        """Losses ``(R,)`` at ``params (R, D)`` on the next minibatch of each run."""
        (indices,) = self.run.next_batch()
        pixels = self.images.index_select(0, indices.flatten()).to(params.dtype)
        outputs = (pixels * self.task.images.scale).view(*indices.shape, -1)
        labels = self.labels[indices]
        pieces, widths = iter(params.split(self.task.sizes, dim=1)), self.task.widths
        for layer, (n_in, n_out) in enumerate(pairwise(widths)):
            weight, bias = next(pieces).unflatten(1, (n_out, n_in)), next(pieces)
            inputs = torch.sigmoid(outputs) if layer else outputs
            outputs = torch.baddbmm(bias.unsqueeze(1), inputs, weight.transpose(1, 2))
        each = F.cross_entropy(outputs.flatten(0, 1), labels.flatten(), reduction="none")
        return each.view(labels.shape).mean(dim=1)

    def _meta_loss(self, losses: Tensor) -> Tensor:
        """Of f_1 .. f_T, ``(T, R)``."""
        if self.objective == "log":
            return torch.log((losses + 1e-8) / (self.first_losses + 1e-8)).mean()
        return losses.sum(dim=0).mean()

    def window(self, steps: int | None = None) -> Tensor:
        """The meta-loss of the next window, with its graph; ``steps`` replaces ``unroll``."""
        if self.taken >= self.horizon:
            self._start()
        params, state, grads = self.params, self.state, self.grads
        steps, losses = self.unroll if steps is None else steps, []
        for _ in range(steps):
            update, state = self.net(grads.flatten(), state, torch.zeros(()))
            params = params + update.view_as(params)
            losses.append(self._losses(params))
            (grads,) = torch.autograd.grad(losses[-1].sum(), params, retain_graph=True)
        self.taken += steps
        self.params, self.grads = params.detach(), grads.detach()
        self.state = [part.detach() for part in state]
        return self._meta_loss(torch.stack(losses))

    def outer_step(self) -> None:
        """One window and one update of the meta-parameters."""
        meta_loss = self.window()
        self.optimizer.zero_grad()
        meta_loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), self.clip)
        self.optimizer.step()
