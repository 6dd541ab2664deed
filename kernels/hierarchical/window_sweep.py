"""Parts of the backward sweep over the parameters, which `window_tile.py` puts together.

A program is one warp and owns one tile of BLOCK coordinates at a time. What a tile needs lies in
the program's scratch as rows of BLOCK floats; `row` says where. Functions are not inlined, and
loops over units are rolled, for the reasons that `../lstm/window_layers.py` gives. Each spreads a
tile over its lanes in a layout of its own: a barrier stands between any two of which one stores
rows that the other loads or stores.

Pointers to planes, gradients and adjoints are to a tile's first coordinate, of which `left` are
left. `down_at` points to what the levels above tell a tensor's coordinates; `down` says where.
"""

# Triton's functions take Triton's values: annotations would be wrong for either side.
# mypy: disable-error-code="no-untyped-def,assignment"

from __future__ import annotations

import triton
import triton.language as tl

from ..lstm.cells import sigmoid
from ..lstm.step_kernels import load_rows
from . import cells
from .parameters import features
from .step_kernels import LOG_RATE_LIMIT, RMS_EPS, SQUARE_EPS


@triton.constexpr_function
def place(name, sizes):
    """Where `name` starts among parts of the sizes listed, or the size of all."""
    at = 0
    for known, size in sizes:
        if known == name:
            return at
        at += size
    if name == "all":
        return at
    raise ValueError(name)


@triton.constexpr_function
def half_power(exponent):
    """2^-exponent."""
    return 0.5**exponent


@triton.constexpr_function
def group(count, largest):
    """The largest divisor of `count` up to `largest`."""
    return max(n for n in range(1, largest + 1) if count % n == 0)


@triton.constexpr_function
def row(name, P, S):
    """First row of a part of the scratch; "all": how many rows there are.

    gates_in, candidate_in: features and h, features and r h: what the GRU's two matrices multiply.
    gates: preactivations of r, u and c, then their gradients. d_in: of features and h. signals: of
    the direction, the new log rate, the logits of the decays of squares and of averages, and what
    sums up to the gradients of rate_momentum and of log_rate_offset. decays: of averages and of
    squares.
    """
    width = 3 * S + P
    return place(
        name,
        (
            *(("gates_in", width), ("candidate_in", width), ("gates", 3 * P), ("centred", 1)),
            *(("new_h", P), ("d_in", width), ("d_h", P), ("signals", 6), ("decays", 2)),
        ),
    )


@triton.constexpr_function
def down(name, P, S):
    """Where a part of what a tensor's coordinates are told starts; "all": how long it is.

    d_means: gradients of the new h and of the features by the tensor's means; biases: of the
    parameter GRU, with what is injected; rates: mean(y' y), what is added to the gradient of the
    new log rate, the problem's mean log rate, 1 / rms, lr.
    """
    width = 3 * S + P
    return place(name, (("d_means", width), ("biases", 3 * P), ("rates", 5)))


@triton.jit(noinline=True)
def enter_tile(
    grad, planes, numel, left, taken, meta, down_at, work,
    P: tl.constexpr, T: tl.constexpr, G: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The features of a tile, h and the decays, from the planes before the step."""
    F: tl.constexpr = 3 * S
    lane = tl.arange(0, BLOCK)
    valid = lane < left
    gates_in = work + row("gates_in", P, S) * BLOCK + lane
    candidate_in = work + row("candidate_in", P, S) * BLOCK + lane
    logit = tl.zeros((BLOCK,), tl.float32)
    logit += tl.load(meta + cells.offset("average_decay_bias", P, T, G, S))
    logit_l = tl.zeros((BLOCK,), tl.float32)
    logit_l += tl.load(meta + cells.offset("square_decay_bias", P, T, G, S))
    for k in range(P):
        h = tl.load(planes + k * numel + lane, valid, 0.0)
        tl.store(gates_in + (F + k) * BLOCK, h)
        logit += h * tl.load(meta + cells.offset("average_decay", P, T, G, S) + k)
        logit_l += h * tl.load(meta + cells.offset("square_decay", P, T, G, S) + k)
    # Decays are 0 in a tensor's first step.
    beta = tl.where(taken == 0.0, 0.0, sigmoid(logit))
    beta_l = tl.where(taken == 0.0, 0.0, sigmoid(logit_l))
    decays = work + row("decays", P, S) * BLOCK + lane
    tl.store(decays, beta)
    tl.store(decays + BLOCK, beta_l)
    averages = load_rows(planes + P * numel, numel, lane, valid, S)
    squares = load_rows(planes + (P + S) * numel, numel, lane, valid, S)
    log_rate = tl.load(planes + (P + 2 * S) * numel + lane, valid, 0.0)
    mean = tl.load(down_at + down("rates", P, S) + 2)
    g = tl.load(grad + lane, valid, 0.0)
    _, _, _, x = features(g, averages, squares, log_rate - mean, beta, beta_l, S)
    for k in tl.static_range(F):
        tl.store(gates_in + k * BLOCK, x[k])
        tl.store(candidate_in + k * BLOCK, x[k])


@triton.jit(noinline=True)
def affine_rows(x, weights, bias, target, count, width, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Rows W x + b of `width` rows x, to the `count` rows at `target`, GROUP at a time.

    GROUP divides `count`.
    """
    lane = tl.arange(0, BLOCK)
    for first in range(0, count, GROUP):
        sums = ()
        for u in tl.static_range(GROUP):
            own = tl.load(bias + first + u)
            sums = sums + (tl.zeros((BLOCK,), tl.float32) + own,)  # noqa: RUF005
        for k in range(width):
            value = tl.load(x + k * BLOCK + lane)
            new = ()
            for u in tl.static_range(GROUP):
                weight = tl.load(weights + (first + u) * width + k)
                new = new + (sums[u] + value * weight,)  # noqa: RUF005
            sums = new
        for u in tl.static_range(GROUP):
            tl.store(target + (first + u) * BLOCK + lane, sums[u])


@triton.jit(noinline=True)
def reset_rows(work, P: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr):
    """r h of every unit."""
    lane = tl.arange(0, BLOCK)
    F: tl.constexpr = 3 * S
    for k in range(P):
        r = sigmoid(tl.load(work + (row("gates", P, S) + k) * BLOCK + lane))
        h = tl.load(work + (row("gates_in", P, S) + F + k) * BLOCK + lane)
        tl.store(work + (row("candidate_in", P, S) + F + k) * BLOCK + lane, r * h)


@triton.jit(noinline=True)
def readouts_backward(
    adjoint, planes, d_planes, numel, left, meta, down_at, work,
    P: tl.constexpr, T: tl.constexpr, G: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From the update and the state after the step to the gates.

    Leaves new_h, signals, d_h and the gates' gradients, of r not yet; of the log rate's plane the
    gradient but for what comes by the features. With y = d / rms, raw step = exp(eta + o) d, the
    update is -exp(eta + o) y.
    """
    F: tl.constexpr = 3 * S
    lane = tl.arange(0, BLOCK)
    valid = lane < left
    h_row = work + (row("gates_in", P, S) + F) * BLOCK + lane
    x_row = work + row("gates_in", P, S) * BLOCK + lane
    update_row = work + (row("gates", P, S) + P) * BLOCK + lane
    candidate_row = update_row + P * BLOCK
    d = tl.zeros((BLOCK,), tl.float32)
    for s in range(S):
        weight = tl.load(meta + cells.offset("shortcut", P, T, G, S) + s)
        d += tl.load(x_row + s * BLOCK) * weight
    rate_plane = (P + 2 * S) * numel + lane
    old = tl.load(planes + rate_plane, valid, 0.0)
    eta = old + tl.load(meta + cells.offset("rate_bias", P, T, G, S))
    for k in range(P):
        new = cells.gru_state(
            tl.load(update_row + k * BLOCK), tl.load(candidate_row + k * BLOCK),
            tl.load(h_row + k * BLOCK),
        )  # fmt: skip
        tl.store(work + (row("new_h", P, S) + k) * BLOCK + lane, new)
        d += new * tl.load(meta + cells.offset("direction", P, T, G, S) + k)
        eta += new * tl.load(meta + cells.offset("rate", P, T, G, S) + k)
    eta = tl.minimum(eta, LOG_RATE_LIMIT, propagate_nan=tl.PropagateNan.ALL)
    eta = tl.maximum(eta, -LOG_RATE_LIMIT, propagate_nan=tl.PropagateNan.ALL)
    rates = down_at + down("rates", P, S)
    inverse_rms = tl.load(rates + 3)
    scale = tl.exp(eta + tl.load(meta + cells.offset("log_rate_offset", P, T, G, S)))
    upstream = scale * (tl.load(rates + 4) * tl.load(adjoint + lane, valid, 0.0))
    y = d * inverse_rms
    through_step = -upstream * y
    d_direction = tl.where(valid, -(upstream + y * tl.load(rates)) * inverse_rms, 0.0)
    kept = sigmoid(tl.load(meta + cells.offset("rate_momentum", P, T, G, S)))
    d_rate = tl.load(d_planes + rate_plane, valid, 0.0)
    d_rate = tl.where(valid, d_rate + tl.load(rates + 1), 0.0)
    d_eta = (1.0 - kept) * d_rate + through_step
    tl.store(d_planes + rate_plane, kept * d_rate + d_eta, valid)
    signals = work + row("signals", P, S) * BLOCK + lane
    tl.store(signals, d_direction)
    tl.store(signals + BLOCK, d_eta)
    tl.store(signals + 4 * BLOCK, kept * (1.0 - kept) * d_rate * (old - eta))
    tl.store(signals + 5 * BLOCK, through_step)
    for k in range(P):
        d_h = tl.load(d_planes + k * numel + lane, valid, 0.0) + tl.load(down_at + k)
        d_h = tl.where(valid, d_h, 0.0)
        d_h += d_direction * tl.load(meta + cells.offset("direction", P, T, G, S) + k)
        d_h += d_eta * tl.load(meta + cells.offset("rate", P, T, G, S) + k)
        update, candidate = tl.load(update_row + k * BLOCK), tl.load(candidate_row + k * BLOCK)
        h = tl.load(h_row + k * BLOCK)
        d_update, d_candidate, d_h = cells.gate_derivatives(update, candidate, h, d_h)
        tl.store(update_row + k * BLOCK, d_update)
        tl.store(candidate_row + k * BLOCK, d_candidate)
        tl.store(work + (row("d_h", P, S) + k) * BLOCK + lane, d_h)


@triton.jit(noinline=True)
def reset_backward(work, P: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr):
    """The gradient of r's preactivations; d_in's rows of r h become those of h."""
    F: tl.constexpr = 3 * S
    lane = tl.arange(0, BLOCK)
    for k in range(P):
        reset_at = work + (row("gates", P, S) + k) * BLOCK + lane
        d_at = work + (row("d_in", P, S) + F + k) * BLOCK + lane
        h = tl.load(work + (row("gates_in", P, S) + F + k) * BLOCK + lane)
        d_reset, d_h = cells.reset_derivatives(tl.load(reset_at), h, tl.load(d_at))
        tl.store(reset_at, d_reset)
        tl.store(d_at, d_h + tl.load(work + (row("d_h", P, S) + k) * BLOCK + lane))


@triton.jit(noinline=True)
def features_backward(
    grad, planes, d_planes, numel, left, meta, down_at, work,
    P: tl.constexpr, T: tl.constexpr, G: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From the features to the planes before the step, in place of those after it.

    beta_s = beta^(1/2^s): d beta_s / d logit = beta_s (1 - beta) / 2^s, 0 where the decay is.
    """
    F: tl.constexpr = 3 * S
    lane = tl.arange(0, BLOCK)
    valid = lane < left
    x_row = work + row("gates_in", P, S) * BLOCK + lane
    d_row = work + row("d_in", P, S) * BLOCK + lane
    signals = work + row("signals", P, S) * BLOCK + lane
    d_x = ()
    for k in tl.static_range(F):
        of_mean = tl.load(down_at + P + k)
        d_x = d_x + (tl.load(d_row + k * BLOCK) + tl.where(valid, of_mean, 0.0),)  # noqa: RUF005
    tl.store(work + row("centred", P, S) * BLOCK + lane, d_x[F - 1])
    rate_at = d_planes + (P + 2 * S) * numel + lane
    tl.store(rate_at, tl.load(rate_at, valid, 0.0) + d_x[F - 1], valid)
    mean = tl.zeros((BLOCK,), tl.float32)
    for s in tl.static_range(S):
        mean += d_x[2 * S - 1 + s]
    mean *= 1.0 / S
    g = cells.bounded_gradient(tl.load(grad + lane, valid, 0.0))
    d_direction = tl.load(signals)
    decays = work + row("decays", P, S) * BLOCK + lane
    beta, beta_l = tl.load(decays), tl.load(decays + BLOCK)
    own, rest_l = beta, 1.0 - beta_l
    d_average_logit = tl.zeros((BLOCK,), tl.float32)
    d_square_decay = tl.zeros((BLOCK,), tl.float32)
    for s in tl.static_range(S):
        average_plane, square_plane = (P + s) * numel + lane, (P + S + s) * numel + lane
        behind = tl.load(planes + average_plane, valid, 0.0) - g
        average = g + own * behind
        fresh = average * average + SQUARE_EPS
        behind_square = tl.load(planes + square_plane, valid, 0.0) - fresh
        square = fresh + beta_l * behind_square + RMS_EPS
        inverse = tl.div_rn(1.0, tl.sqrt_rn(square))
        ratio = average * inverse
        d_m = d_x[s] + d_direction * tl.load(meta + cells.offset("shortcut", P, T, G, S) + s)
        if s + 1 < S:
            d_m += d_x[S + s] * tl.load(x_row + (s + 1) * BLOCK)
        if s > 0:
            d_m += d_x[S + s - 1] * tl.load(x_row + (s - 1) * BLOCK)
        d_ratio = tl.div_rn(d_m, tl.sqrt_rn(ratio * ratio + 1.0))
        d_log = d_x[2 * S - 1 + s] - mean - 0.5 * d_ratio * ratio
        d_square = tl.load(d_planes + square_plane, valid, 0.0) + d_log * inverse * inverse
        d_average = tl.load(d_planes + average_plane, valid, 0.0)
        d_average += d_ratio * inverse + d_square * rest_l * 2.0 * average
        d_square_decay += d_square * behind_square
        d_average_logit += d_average * behind * own * half_power(s)
        tl.store(d_planes + square_plane, d_square * beta_l, valid)
        tl.store(d_planes + average_plane, d_average * own, valid)
        own = tl.sqrt_rn(own)
    d_average_logit *= 1.0 - beta
    d_square_logit = d_square_decay * beta_l * rest_l
    tl.store(signals + 2 * BLOCK, d_square_logit)
    tl.store(signals + 3 * BLOCK, d_average_logit)
    for k in range(P):
        d_h = tl.load(d_row + (F + k) * BLOCK)
        weight = tl.load(meta + cells.offset("average_decay", P, T, G, S) + k)
        d_h += d_average_logit * weight
        d_h += d_square_logit * tl.load(meta + cells.offset("square_decay", P, T, G, S) + k)
        tl.store(d_planes + k * numel + lane, d_h, valid)
