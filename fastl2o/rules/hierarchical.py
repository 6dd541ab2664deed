"""The hierarchical rule (arXiv 1703.04813): recurrences per parameter, per tensor and global."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import _hierarchy as maths
from . import _problem, _runs
from ._base import Rule, Weights, check_integer
from ._modules import Affine, check_timescales, long_memories
from ._problem import HIGHEST_RATE, LOWEST_RATE, ProblemState, Sweep

__all__ = ["HierarchicalRule", "ProblemState"]


class HierarchicalRule(Rule):
    """Three levels of GRUs, which let the parameters of a model talk to each other.

    A GRU for each parameter reads 12 features of the gradient's moving averages; one for each
    tensor reads the means of those over its parameters, and one reads the means over all tensors.
    The upper two inject biases into the ones below at the next step. A parameter's update is
    -exp(log rate) d / rms(d), rms over its tensor, with its own log learning rate, which the rule
    adapts from its start. 19 state numbers and 704 multiply-adds a parameter.

    With attention, a second readout says how far ahead of the parameters the next gradient is
    taken: parameters stay ahead between steps, by the state's last plane, and
    `LearnedOptimizer.eval()` takes them back to where the model is to be used.

    Flat meta-parameters: initial states, readouts, then the three GRUs and the three maps of
    injected biases. The default has 8,349.

    Args:
        param_size, tensor_size, global_size: hidden sizes of the three levels, 1 to 64.
        num_scales: time scales of the gradient's moving averages, 1 to 8.
        attention: take gradients at a point ahead. Steps run in plain torch: no kernels have it.
        lowest_rate, highest_rate: between which the initial learning rates are drawn. The authors'
            1e-6 and 1e-2 make a rule that finds rates for itself; a rule of which both are the
            same starts alike with every seed.

    Raises:
        ValueError, TypeError: an argument is outside what is listed here.

    Example:
        >>> rule = HierarchicalRule()
        >>> rule.num_meta_parameters, rule.state_planes
        (8349, 19)
        >>> params = [torch.zeros(3, 2), torch.zeros(3)]
        >>> state = rule.init_problem(params, seed=0)
        >>> updates, state = rule.reference_step([torch.ones(3, 2), None], state)
        >>> updates[0].shape, updates[1], state.steps
        (torch.Size([3, 2]), None, [1, 0])
    """

    family: ClassVar[str] = "hierarchical"
    needs_step: ClassVar[bool] = True
    learned_start: ClassVar[bool] = True
    runs_axis: ClassVar[int] = 0
    # Pickles made before rules had rates of their own lack them.
    lowest_rate, highest_rate = LOWEST_RATE, HIGHEST_RATE

    def __init__(
        self,
        param_size: int = 10,
        tensor_size: int = 20,
        global_size: int = 20,
        num_scales: int = 4,
        attention: bool = False,
        lowest_rate: float = LOWEST_RATE,
        highest_rate: float = HIGHEST_RATE,
    ) -> None:
        super().__init__()
        self.param_size = check_integer("param_size", param_size, 1, 64)
        self.tensor_size = check_integer("tensor_size", tensor_size, 1, 64)
        self.global_size = check_integer("global_size", global_size, 1, 64)
        self.num_scales = check_integer("num_scales", num_scales, 1, 8)
        if not isinstance(attention, bool):
            raise TypeError(f"Invalid attention: {attention!r}; pass True or False")
        self.attention = attention
        self.lowest_rate, self.highest_rate = _problem.check_rates(lowest_rate, highest_rate)
        self.param_start = nn.Parameter(torch.empty(param_size))
        self.tensor_start = nn.Parameter(torch.empty(tensor_size))
        self.global_start = nn.Parameter(torch.empty(global_size))
        self.direction = nn.Parameter(torch.empty(param_size))
        self.shortcut = nn.Parameter(torch.empty(num_scales))
        self.rate = nn.Parameter(torch.empty(param_size))
        self.rate_bias = nn.Parameter(torch.empty(()))
        self.square_decay = nn.Parameter(torch.empty(param_size))
        self.square_decay_bias = nn.Parameter(torch.empty(()))
        self.average_decay = nn.Parameter(torch.empty(param_size))
        self.average_decay_bias = nn.Parameter(torch.empty(()))
        self.rate_momentum = nn.Parameter(torch.empty(()))
        self.log_rate_offset = nn.Parameter(torch.empty(()))
        if attention:
            self.attention_direction = nn.Parameter(torch.empty(param_size))
            self.attention_shortcut = nn.Parameter(torch.empty(num_scales))
        inputs = 3 * num_scales
        self.param_gru = maths.GRUCell(inputs, param_size)
        self.tensor_gru = maths.GRUCell(param_size + inputs, tensor_size)
        self.global_gru = maths.GRUCell(tensor_size, global_size)
        self.tensor_to_param = Affine(tensor_size, 3 * param_size)
        self.global_to_param = Affine(global_size, 3 * param_size)
        self.global_to_tensor = Affine(global_size, 3 * tensor_size)
        self.reset_parameters()

    def config(self) -> dict[str, Any]:
        """The constructor's arguments; the rates only if they are not the default."""
        names = ["param_size", "tensor_size", "global_size", "num_scales", "attention"]
        if (self.lowest_rate, self.highest_rate) != (LOWEST_RATE, HIGHEST_RATE):
            names += ["lowest_rate", "highest_rate"]
        return {name: getattr(self, name) for name in names}

    @torch.no_grad()
    def draw_timescales(
        self, low: float, high: float, generator: torch.Generator | None = None
    ) -> None:
        """Start half of the tensor and global GRUs' units, and the log rates, with long memories.

        T is drawn log-uniformly from [low, high] for each unit, and its update gate starts at
        1 - 1/T, so that it holds an average over about T steps: a clock for a rule that is to slow
        down over thousands of steps. Log rates start to average over `high` steps: a rule that
        does not see them can then set a rate beside where it started, in place of adding up
        errors. See `CoordinateRule.draw_timescales`.

        Example:
            >>> rule = HierarchicalRule(global_size=4)
            >>> rule.draw_timescales(100.0, 100.0)
            >>> round(rule.global_gru.gates_bias[4].sigmoid().item(), 4)
            0.99
        """
        low, high = check_timescales(low, high)
        for cell in (self.tensor_gru, self.global_gru):
            size = cell.candidate_bias.numel()
            biases = long_memories(size // 2, low, high, generator)
            cell.gates_bias[size : size + size // 2] = biases.to(cell.gates_bias)
        self.rate_momentum.fill_(math.log(high - 1))

    @property
    def state_planes(self) -> int:
        """State numbers per parameter, param_size + 2 * num_scales + 1, one more with attention."""
        return self.param_size + 2 * self.num_scales + 1 + self.attention

    @property
    def num_sums(self) -> int:
        """Sums over a tensor, param_size + 3 * num_scales + 2, one more with attention."""
        return self.param_size + 3 * self.num_scales + 2 + self.attention

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """The authors' initialisation: normal weights, sd 0.5/sqrt(in), and forgetful gates."""
        maths.initialise_(self, generator)

    # State
    # ----------------------------------------------------------------------------------------------

    def init_tensor(
        self,
        param: Tensor,
        generator: torch.Generator,
        dtype: torch.dtype = torch.float32,
        shape: torch.Size | None = None,
        part: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Planes `(state_planes, *param.shape)` and tensor state before a tensor's first step.

        Args:
            param: the tensor, or the part of it that is here.
            generator: of the CPU, for the log rates.
            dtype: of the planes.
            shape: of the whole tensor, if `param` is a part.
            part: takes the part out of a tensor of that shape.
        """
        wide = torch.promote_types(dtype, torch.float32)
        whole = param.shape if shape is None else shape
        rates, offset = _problem.draw_log_rates(
            whole, self.lowest_rate, self.highest_rate, generator
        )
        planes = torch.zeros((self.state_planes, *param.shape), dtype=dtype, device=param.device)
        start = self.param_start.detach().to(planes)
        planes[: self.param_size] = start.view(-1, *(1,) * param.dim())
        planes[self.param_size + 2 * self.num_scales] = rates if part is None else part(rates)
        mean = rates.to(dtype).to(wide).mean() if rates.numel() else offset.to(wide)
        tensor = torch.cat((self.tensor_start.detach().to(mean), mean.reshape(1)))
        return planes, tensor.to(param.device)

    def init_global(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """The global state `(global_size,)` before the first step."""
        return self.global_start.detach().to(device, dtype, copy=True)

    def init_problem(
        self, params: Sequence[Tensor], seed: int, dtype: torch.dtype = torch.float32
    ) -> ProblemState:
        """State of `params` before their first step; `seed` decides the initial rates."""
        generator = torch.Generator().manual_seed(seed)
        pairs = [self.init_tensor(param, generator, dtype) for param in params]
        device = params[0].device if params else torch.device("cpu")
        wide = torch.promote_types(dtype, torch.float32)
        return ProblemState(
            [planes for planes, _ in pairs],
            [tensor for _, tensor in pairs],
            [0] * len(pairs),
            self.init_global(device, wide),
        )

    def init_runs(
        self, params: Tensor, sizes: Sequence[int], generator: torch.Generator | None = None
    ) -> Tensor:
        """State `(R, W)` of R runs, a problem each; see `Rule.init_runs`."""
        ahead = torch.Generator()
        if generator is not None:
            ahead.set_state(generator.get_state())
        # Seeded anew: the run's noise and minibatches must not repeat the rates' random numbers.
        own = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=ahead)))
        rows = []
        for run in params:
            pairs = [self.init_tensor(p, own, params.dtype) for p in run.split(list(sizes))]
            hidden = self.init_global(params.device, params.dtype)
            planes, tensors = zip(*pairs, strict=True)
            rows.append(_runs.pack(ProblemState(list(planes), list(tensors), [], hidden)))
        return torch.stack(rows)

    def runs_shape(self, runs: int, sizes: Sequence[int]) -> tuple[int, ...]:
        """`(R, W)`; see `Rule.runs_shape`."""
        return (runs, sum(_runs.widths(self, sizes)))

    # The specification
    # ----------------------------------------------------------------------------------------------

    def reference_runs_step(
        self, grads: Tensor, state: Tensor, step: int, sizes: Sequence[int], meta: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`reference_step` of every run; see `Rule.reference_runs_step`."""

        def one(grad: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
            planes, tensors, hidden = _runs.views(self, row, sizes)
            problem = ProblemState(planes, tensors, [step] * len(sizes), hidden)
            updates, new = self.reference_step(grad.split(list(sizes)), problem, meta)
            return torch.cat([u for u in updates if u is not None]), _runs.pack(new)

        update, new_state = torch.vmap(one)(grads, state)
        return update, new_state

    def start_gradient(self, d_state: Tensor, sizes: Sequence[int]) -> Tensor:
        """What the learned initial states get of the first state's gradient."""
        gradient = d_state.new_zeros(self.num_meta_parameters)
        of = self.unflatten(gradient)
        for row in d_state:
            for name, view in _runs.start_views(self, row, sizes):
                of[name] += view.sum(dim=1)
        return gradient

    def shift_start(self, state: Tensor, offsets: Tensor, sizes: Sequence[int]) -> None:
        """See `Rule.shift_start`; the transpose of `start_gradient`."""
        for row, offset in zip(state, offsets, strict=True):
            of = self.unflatten(offset)
            for name, view in _runs.start_views(self, row, sizes):
                view += of[name][:, None]

    def reference_step(
        self,
        grads: Sequence[Tensor | None],
        state: ProblemState,
        meta: Tensor | None = None,
    ) -> tuple[list[Tensor | None], ProblemState]:
        """One step in plain torch: the specification that every kernel is tested against.

        Differentiable in the gradients, the state and the meta-parameters. A tensor whose gradient
        is None, or that has no elements, rests and is left out of all means.

        Args:
            grads: of each tensor, shaped like it, any floating dtype, or None.
            state: what `init_problem` or the step before returned; its `hidden`'s dtype is that of
                the maths.
            meta: flat meta-parameters `(M,)` to use in place of the rule's own.

        Returns:
            The updates, to be added to the parameters, in the dtype of the maths, and the new
            state, typed like the old.
        """
        named: Mapping[str, Tensor] = (
            dict(self.named_parameters()) if meta is None else self.unflatten(meta)
        )
        weights = {name: value.to(state.hidden.dtype) for name, value in named.items()}
        active = {i: grad for i, grad in enumerate(grads) if grad is not None and grad.numel()}
        updates: list[Tensor | None] = [
            None if grad is None else torch.zeros_like(grad, dtype=state.hidden.dtype)
            for grad in grads
        ]
        if not active:
            return updates, state
        count = sum(grad.numel() for grad in active.values())
        mean_log_rate = sum(
            state.tensors[i][-1] * (grad.numel() / count) for i, grad in active.items()
        )
        assert isinstance(mean_log_rate, Tensor)
        planes, tensors, steps = list(state.planes), list(state.tensors), list(state.steps)
        for i, grad in active.items():
            swept = self.reference_sweep(
                grad, planes[i], tensors[i], steps[i] == 0, state.hidden, mean_log_rate, weights
            )
            planes[i] = swept.planes
            means = swept.sums / grad.numel()
            tensors[i], rms = self.reference_finish(means, tensors[i], state.hidden, weights)
            update = -swept.raw / rms
            if self.attention:
                rms = torch.sqrt(means[-1] + maths.RMS_EPS)
                # As it is stored, so that taking it back gives the parameters themselves.
                ahead = (-swept.planes[-1].to(update.dtype) / rms).to(swept.planes.dtype)
                update = update + ahead.to(update.dtype) - state.planes[i][-1].to(update.dtype)
                planes[i] = torch.cat((swept.planes[:-1], ahead[None]))
            updates[i] = update
            steps[i] += 1
        hidden = self.reference_global([tensors[i] for i in active], state.hidden, weights)
        return updates, ProblemState(planes, tensors, steps, hidden)

    def reference_sweep(
        self,
        grad: Tensor,
        planes: Tensor,
        tensor: Tensor,
        first: bool,
        hidden: Tensor,
        mean_log_rate: Tensor,
        weights: Weights,
    ) -> Sweep:
        """The first half of a step, on a tensor or a part of one (arXiv 1703.04813, section 3).

        Args:
            grad: shaped like the part.
            planes: `(state_planes, *grad.shape)`.
            tensor: the whole tensor's state.
            first: whether this is the tensor's first step.
            hidden: the global state; its dtype is that of the maths.
            mean_log_rate: over the whole problem, 0-dim.
            weights: the meta-parameters by name, in the dtype of the maths.
        """
        h_size, scales = self.param_size, self.num_scales
        rows = planes.to(hidden.dtype).reshape(self.state_planes, grad.numel())
        h, averages, squares = rows[: h_size + 2 * scales].split((h_size, scales, scales))
        log_rate = rows[h_size + 2 * scales]
        k = tensor[:-1].to(hidden.dtype)
        betas: Tensor | float = 0.0
        beta_l: Tensor | float = 0.0
        if not first:
            beta = torch.sigmoid(weights["average_decay"] @ h + weights["average_decay_bias"])
            betas = maths.decays(beta, scales)
            beta_l = torch.sigmoid(weights["square_decay"] @ h + weights["square_decay_bias"])
        averages, squares, scaled, inputs = maths.features(
            grad.to(hidden.dtype).reshape(-1),
            averages,
            squares,
            log_rate - mean_log_rate,
            betas,
            beta_l,
        )
        injected = maths.affine(weights, "tensor_to_param", k)
        injected = injected + maths.affine(weights, "global_to_param", hidden)
        h = maths.gru(inputs, h, weights, "param_gru", injected)
        d = weights["direction"] @ h + weights["shortcut"] @ scaled
        eta = maths.clip_log_rate(log_rate + weights["rate"] @ h + weights["rate_bias"])
        raw = torch.exp(eta + weights["log_rate_offset"]) * d
        momentum = torch.sigmoid(weights["rate_momentum"])
        log_rate = momentum * log_rate + (1 - momentum) * eta
        kept = [h, averages, squares, log_rate[None]]
        summed = [h, inputs, (d * d)[None], log_rate[None]]
        if self.attention:
            d = weights["attention_direction"] @ h + weights["attention_shortcut"] @ scaled
            kept.append((torch.exp(eta) * d)[None])
            summed.append((d * d)[None])
        new_planes = torch.cat(kept).to(planes.dtype).reshape(planes.shape)
        sums = torch.cat(summed).sum(dim=1)
        return Sweep(raw.reshape(grad.shape), new_planes, sums)

    def reference_finish(
        self, means: Tensor, tensor: Tensor, hidden: Tensor, weights: Weights
    ) -> tuple[Tensor, Tensor]:
        """The second half: the new state of a tensor and the rms of its direction, 0-dim.

        Args:
            means: a sweep's sums over the tensor's coordinates, divided by their number.
            tensor, hidden, weights: as for `reference_sweep`.
        """
        width = self.param_size + 3 * self.num_scales
        inputs, mean_square, log_rate = means[: width + 2].split((width, 1, 1))
        k = tensor[:-1].to(hidden.dtype)[:, None]
        injected = maths.affine(weights, "global_to_tensor", hidden)
        k = maths.gru(inputs[:, None], k, weights, "tensor_gru", injected)[:, 0]
        new_tensor = torch.cat((k, log_rate)).to(tensor.dtype)
        return new_tensor, torch.sqrt(mean_square[0] + maths.RMS_EPS)

    def reference_global(
        self, tensors: Sequence[Tensor], hidden: Tensor, weights: Weights
    ) -> Tensor:
        """The new global state from the tensors' new states."""
        means = torch.stack([tensor[:-1] for tensor in tensors]).mean(dim=0)
        return maths.gru(means[:, None], hidden[:, None], weights, "global_gru", None)[:, 0]
