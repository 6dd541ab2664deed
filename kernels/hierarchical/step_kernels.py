"""The Triton kernels of the hierarchical rule's in-place step; `step.py` launches them.

Tables on the device, int64: `tensors` (tensors, 5) holds the addresses of a tensor's param, grad,
planes and step counter and its number of coordinates, as for the LSTM rule; `levels` (tensors, 5)
the address of its state, its problem, where its raw step starts in `raw`, its first chunk and the
one after its last; `chunks` (chunks, 2) a tensor's index and a first coordinate.

`sweep` leaves new planes, raw steps and partial sums of every chunk; `levels` a tensor's new state
and 1 / rms; `apply` steps the parameters and the global states.
"""

# Triton's functions take Triton's values: annotations would be wrong for either side.
# mypy: disable-error-code="no-untyped-def,assignment"

from __future__ import annotations

import triton
import triton.language as tl

from ..lstm.cells import bounded_exp, sigmoid
from ..lstm.step_kernels import address, left_alone, load_rows, rounded, rounding_base
from . import cells, parameters

RMS_EPS = tl.constexpr(1e-16)
SQUARE_EPS = tl.constexpr(1e-12)
LOG_RATE_LIMIT = tl.constexpr(33.0)
# Arguments that in a window are parts of larger tensors, at an address that changes from step to
# step. They are read a number a lane, so a kernel for each alignment would be compiled for nothing.
ANYWHERE = ["tensors", "levels", "hidden", "raw", "inverse_rms"]


@triton.jit
def state_of(levels, tensor):
    """Pointer to a tensor's state: k, then the mean of its log rates."""
    return tl.load(levels + tensor * 5).to(tl.pointer_type(tl.float32), bitcast=True)


@triton.jit
def members(
    tensors, levels, flags, problem, first, tensors_total,
    BLOCK: tl.constexpr, HAS_FLAGS: tl.constexpr,
):  # fmt: skip
    """Of tensors first, first + 1, ...: numbers of coordinates, 0 where one takes no part."""
    index = first + tl.arange(0, BLOCK)
    valid = index < tensors_total
    valid = valid & (tl.load(levels + index * 5 + 1, valid, -1) == problem)
    if HAS_FLAGS:
        valid = valid & (tl.load(flags + index, valid, 1) == 0)
    return index, tl.load(tensors + index * 5 + 4, valid, 0)


@triton.jit
def mean_log_rate(
    tensors, levels, flags, problem, tensors_total,
    T: tl.constexpr, BLOCK: tl.constexpr, HAS_FLAGS: tl.constexpr,
):  # fmt: skip
    """The mean over a problem's coordinates, from the means of its tensors."""
    rates = tl.zeros((BLOCK,), tl.float32)
    counts = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, tensors_total, BLOCK):
        index, numel = members(
            tensors, levels, flags, problem, first, tensors_total, BLOCK, HAS_FLAGS
        )
        present = numel > 0
        state = tl.load(levels + index * 5, present, 0)
        state = state.to(tl.pointer_type(tl.float32), bitcast=True)
        count = numel.to(tl.float32)
        rates += tl.load(state + T, present, 0.0) * count
        counts += count
    return tl.sum(rates, 0) / tl.maximum(tl.sum(counts, 0), 1.0)


@triton.jit
def injected_biases(
    meta, state, z, P: tl.constexpr, T: tl.constexpr, G: tl.constexpr, S: tl.constexpr
):
    """The biases of the parameter GRU, with what the levels above inject; zeros beyond 3 P."""
    ROWS: tl.constexpr = cells.padded(3 * P)
    PT: tl.constexpr = cells.padded(T)
    PG: tl.constexpr = cells.padded(G)
    k = cells.load_vector(state, T, PT)
    value = cells.affine(
        meta + cells.offset("tensor_to_param", P, T, G, S),
        meta + cells.offset("tensor_to_param_bias", P, T, G, S), k, 3 * P, T, ROWS, PT,
    )  # fmt: skip
    value += cells.affine(
        meta + cells.offset("global_to_param", P, T, G, S),
        meta + cells.offset("global_to_param_bias", P, T, G, S),
        cells.load_vector(z, G, PG), 3 * P, G, ROWS, PG,
    )  # fmt: skip
    row = tl.arange(0, ROWS)
    bias = tl.where(
        row < 2 * P,
        cells.offset("param_gates_bias", P, T, G, S) + row,
        cells.offset("param_candidate_bias", P, T, G, S) + row - 2 * P,
    )
    return value + tl.load(meta + bias, row < 3 * P, 0.0)


@triton.jit
def enter_tile(
    grad_ptr, planes, numel, lanes, valid, taken, mean, readouts, grad_scale, sign, base,
    PARAM: tl.constexpr, PLANES: tl.constexpr, P: tl.constexpr, S: tl.constexpr,
    HAS_SCALE: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """The inputs x of a tile, its h, log rate and the direction by x; new averages stored."""
    grad = tl.load(grad_ptr + lanes, valid, 0.0).to(tl.float32)
    h = load_rows(planes, numel, lanes, valid, P)
    averages = load_rows(planes + P * numel, numel, lanes, valid, S)
    squares = load_rows(planes + (P + S) * numel, numel, lanes, valid, S)
    log_rate = tl.load(planes + (P + 2 * S) * numel + lanes, valid, 0.0).to(tl.float32)
    if HAS_SCALE:
        grad = tl.div_rn(grad, tl.load(grad_scale))
        tl.store(grad_ptr + lanes, grad.to(PARAM), valid)
    beta = parameters.decay(readouts, 3 * P + S + 2, h, taken, P)
    beta_l = parameters.decay(readouts, 2 * P + S + 1, h, taken, P)
    averages, squares, scaled, x = parameters.features(
        grad * sign, averages, squares, log_rate - mean, beta, beta_l, S
    )
    for s in tl.static_range(S):
        stored = rounded(averages[s], base, P + s, False, PLANES, STOCHASTIC)
        tl.store(planes + (P + s) * numel + lanes, stored, valid)
        stored = rounded(squares[s], base, P + S + s, False, PLANES, STOCHASTIC)
        tl.store(planes + (P + S + s) * numel + lanes, stored, valid)
    return x, h, log_rate, parameters.readout(readouts, P, scaled, S)


@triton.jit(
    do_not_specialize=["tensors_total", "chunks_total", "programs", "seed_low", "seed_high"],
    do_not_specialize_on_alignment=ANYWHERE,
)
def sweep(
    tensors, levels, chunks, meta, hidden, packed, raw, partials, grad_scale, found_inf, flags,
    tensors_total, chunks_total, programs, chunk, sign, seed_low, seed_high,
    PARAM: tl.constexpr, PLANES: tl.constexpr, P: tl.constexpr, T: tl.constexpr, G: tl.constexpr,
    S: tl.constexpr, BLOCK: tl.constexpr, TENSORS: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_FOUND_INF: tl.constexpr, HAS_FLAGS: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """New planes, raw steps, and sums of every chunk: new h, features, d^2, new log rate.

    `sign` is -1 to maximize. `packed` is scratch, for the weights of each program. `seed_low` and
    `seed_high` are int32; with STOCHASTIC they seed the rounding of the planes.
    """
    F: tl.constexpr = 3 * S
    SUMS: tl.constexpr = P + F + 2
    WIDTH: tl.constexpr = F + P
    PADDED: tl.constexpr = cells.padded(SUMS)
    LANES: tl.constexpr = parameters.lanes_of(BLOCK)
    ROW: tl.constexpr = parameters.packed("row", P, S)
    program = tl.program_id(0)
    own = packed + program * parameters.packed("all", P, S)
    readouts = own + parameters.packed("readouts", P, S)
    parameters.pack(meta, own, P, T, G, S)
    sum_index = tl.arange(0, PADDED)
    known = tl.full((), -1, tl.int64)
    mean = tl.full((), 0.0, tl.float32)
    for number in range(program, chunks_total, programs):
        tensor, first = tl.load(chunks + 2 * number), tl.load(chunks + 2 * number + 1)
        numel = tl.load(tensors + tensor * 5 + 4)
        problem = tl.load(levels + tensor * 5 + 1)
        grad_ptr = address(tensors, tensor, 1, PARAM)
        planes = address(tensors, tensor, 2, PLANES)
        raw_ptr = raw + tl.load(levels + tensor * 5 + 2)
        taken = tl.load(address(tensors, tensor, 3, tl.float32))
        if problem != known:
            mean = mean_log_rate(
                tensors, levels, flags, problem, tensors_total, T, TENSORS, HAS_FLAGS
            )
            known = problem
        biases = injected_biases(meta, state_of(levels, tensor), hidden + problem * G, P, T, G, S)
        # The biases of the chunk before are read to the end before these replace them.
        tl.debug_barrier()
        row = tl.arange(0, cells.padded(3 * P))
        tl.store(own + row * ROW + WIDTH, biases, row < 3 * P)
        tl.debug_barrier()
        end = tl.minimum(first + chunk, numel)
        if left_alone(tensor, found_inf, flags, HAS_FOUND_INF, HAS_FLAGS) != 0:
            end = first
        totals = tl.zeros((PADDED,), tl.float32)
        # Of features, d^2 and log rate; a loop over units cannot index those of the new h.
        sums = ()
        for _place in tl.static_range(F + 2):
            sums = sums + (tl.zeros((LANES,), tl.float32),)  # noqa: RUF005
        for start in range(first, end, BLOCK):
            lanes = start + tl.arange(0, BLOCK)
            valid = lanes < end
            base = lanes
            if STOCHASTIC:
                base = rounding_base(seed_low, seed_high, tensor, lanes)
            x, h, log_rate, d = enter_tile(
                grad_ptr, planes, numel, lanes, valid, taken, mean, readouts, grad_scale, sign,
                base, PARAM, PLANES, P, S, HAS_SCALE, STOCHASTIC,
            )  # fmt: skip
            # The loop over units is rolled from here on: written out it compiles for minutes.
            reset = ()
            for k in tl.static_range(P):
                r, _ = parameters.gate(own + k * ROW, x + h, WIDTH)
                reset = reset + (h[k] / (1.0 + bounded_exp(-r)),)  # noqa: RUF005
            eta = log_rate + tl.load(readouts + 2 * P + S)
            for unit in range(P):
                at = own + (P + unit) * ROW
                u, direction = parameters.gate(at, x + h, WIDTH)
                c, of_rate = parameters.gate(at + P * ROW, x + reset, WIDTH)
                h_ptr = planes + unit * numel + lanes
                new = cells.unit_state(u, c, tl.load(h_ptr, valid, 0.0).to(tl.float32))
                tl.store(h_ptr, rounded(new, base, unit, False, PLANES, STOCHASTIC), valid)
                d += new * direction
                eta += new * of_rate
                total = tl.sum(tl.where(valid, new, 0.0), 0)
                totals += tl.where(sum_index == unit, total, 0.0)
            eta = tl.minimum(eta, 33.0, propagate_nan=tl.PropagateNan.ALL)
            eta = tl.maximum(eta, -33.0, propagate_nan=tl.PropagateNan.ALL)
            tl.store(raw_ptr + lanes, tl.exp(eta + tl.load(readouts + 4 * P + S + 4)) * d, valid)
            kept = sigmoid(tl.load(readouts + 4 * P + S + 3))
            log_rate = eta + kept * (log_rate - eta)
            stored = rounded(log_rate, base, P + 2 * S, False, PLANES, STOCHASTIC)
            tl.store(planes + (P + 2 * S) * numel + lanes, stored, valid)
            added = x + (d * d, log_rate)  # noqa: RUF005
            new_sums = ()
            for k in tl.static_range(F + 2):
                total = tl.where(valid, added[k], 0.0)
                total = tl.sum(tl.reshape(total, (BLOCK // LANES, LANES)), 0)
                new_sums = new_sums + (sums[k] + total,)  # noqa: RUF005
            sums = new_sums
        for k in tl.static_range(F + 2):
            totals += tl.where(sum_index == P + k, tl.sum(sums[k], 0), 0.0)
        tl.store(partials + number * SUMS + sum_index, totals, sum_index < SUMS)


@triton.jit(do_not_specialize=["chunks_total"], do_not_specialize_on_alignment=ANYWHERE)
def tensor_level(
    tensors, levels, meta, hidden, partials, inverse_rms, found_inf, flags,
    P: tl.constexpr, T: tl.constexpr, G: tl.constexpr, S: tl.constexpr,
    ROWS: tl.constexpr, HAS_FOUND_INF: tl.constexpr, HAS_FLAGS: tl.constexpr,
):  # fmt: skip
    """A program a tensor: its sums in the order of its chunks, its new state and 1 / rms."""
    F: tl.constexpr = 3 * S
    SUMS: tl.constexpr = P + F + 2
    LANES: tl.constexpr = cells.padded(SUMS)
    PT: tl.constexpr = cells.padded(T)
    PG: tl.constexpr = cells.padded(G)
    tensor = tl.program_id(0)
    numel = tl.load(tensors + tensor * 5 + 4)
    if left_alone(tensor, found_inf, flags, HAS_FOUND_INF, HAS_FLAGS) != 0:
        numel = tl.zeros_like(numel)
    if numel > 0:
        lane = tl.arange(0, LANES)
        sums = cells.chunk_sums(partials, levels, tensor, SUMS, LANES, ROWS)
        means = (sums / numel.to(tl.float64)).to(tl.float32)
        square = tl.sum(tl.where(lane == P + F, means, 0.0), 0)
        tl.store(inverse_rms + tensor, tl.div_rn(1.0, tl.sqrt_rn(square + 1e-16)))
        state = state_of(levels, tensor)
        tl.store(state + T, tl.sum(tl.where(lane == P + F + 1, means, 0.0), 0))
        z = cells.load_vector(hidden + tl.load(levels + tensor * 5 + 1) * G, G, PG)
        weights = meta + cells.offset("global_to_tensor", P, T, G, S)
        bias = meta + cells.offset("global_to_tensor_bias", P, T, G, S)
        injected_r = cells.affine(weights, bias, z, T, G, PT, PG)
        injected_u = cells.affine(weights + T * G, bias + T, z, T, G, PT, PG)
        injected_c = cells.affine(weights + 2 * T * G, bias + 2 * T, z, T, G, PT, PG)
        x = tl.where(lane < P + F, means, 0.0)
        new = cells.gru(
            meta + cells.offset("tensor_gates", P, T, G, S),
            meta + cells.offset("tensor_gates_bias", P, T, G, S),
            meta + cells.offset("tensor_candidate", P, T, G, S),
            meta + cells.offset("tensor_candidate_bias", P, T, G, S),
            x, cells.load_vector(state, T, PT), injected_r, injected_u, injected_c,
            P + F, T, LANES, PT,
        )  # fmt: skip
        unit = tl.arange(0, PT)
        tl.store(state + unit, new, unit < T)


@triton.jit
def global_level(
    tensors, levels, meta, hidden, flags, problem, tensors_total,
    P: tl.constexpr, T: tl.constexpr, G: tl.constexpr, S: tl.constexpr,
    TENSORS: tl.constexpr, HAS_FLAGS: tl.constexpr,
):  # fmt: skip
    """A problem's new global state from the mean of its tensors' new states."""
    PT: tl.constexpr = cells.padded(T)
    PG: tl.constexpr = cells.padded(G)
    unit = tl.arange(0, PT)
    total = tl.zeros((PT,), tl.float32)
    count = tl.full((), 0.0, tl.float32)
    for first in range(0, tensors_total, TENSORS):
        index, numel = members(
            tensors, levels, flags, problem, first, tensors_total, TENSORS, HAS_FLAGS
        )
        present = numel > 0
        state = tl.load(levels + index * 5, present, 0)
        state = state.to(tl.pointer_type(tl.float32), bitcast=True)
        mask = present[:, None] & (unit < T)[None, :]
        total += tl.sum(tl.load(state[:, None] + unit[None, :], mask, 0.0), 0)
        count += tl.sum(present.to(tl.float32), 0)
    if count > 0.0:
        z = hidden + problem * G
        nothing = tl.zeros((PG,), tl.float32)
        new = cells.gru(
            meta + cells.offset("global_gates", P, T, G, S),
            meta + cells.offset("global_gates_bias", P, T, G, S),
            meta + cells.offset("global_candidate", P, T, G, S),
            meta + cells.offset("global_candidate_bias", P, T, G, S),
            tl.div_rn(total, count), cells.load_vector(z, G, PG), nothing, nothing, nothing,
            T, G, PT, PG,
        )  # fmt: skip
        out = tl.arange(0, PG)
        tl.store(z + out, new, out < G)


@triton.jit(
    do_not_specialize=["tensors_total", "chunks_total", "programs"],
    do_not_specialize_on_alignment=ANYWHERE,
)
def apply(
    tensors, levels, chunks, meta, hidden, raw, inverse_rms, rates, found_inf, flags,
    tensors_total, chunks_total, programs, chunk,
    PARAM: tl.constexpr, P: tl.constexpr, T: tl.constexpr, G: tl.constexpr, S: tl.constexpr,
    BLOCK: tl.constexpr, TENSORS: tl.constexpr,
    HAS_FOUND_INF: tl.constexpr, HAS_FLAGS: tl.constexpr,
):  # fmt: skip
    """theta <- keep theta - lr raw / rms, steps counted; programs beyond take a problem each.

    With programs = 0 there are only those.

    `rates` (tensors, 4) holds keep = 1 - lr * weight_decay and lr, each as the sum of two float32.
    """
    program = tl.program_id(0)
    if program >= programs:  # noqa: SIM102
        if left_alone(0, found_inf, flags, HAS_FOUND_INF, False) == 0:
            problem = (program - programs).to(tl.int64)
            global_level(
                tensors, levels, meta, hidden, flags, problem, tensors_total,
                P, T, G, S, TENSORS, HAS_FLAGS,
            )  # fmt: skip
    stride = tl.maximum(programs, 1)
    for number in range(program, tl.where(program < programs, chunks_total, 0), stride):
        tensor, first = tl.load(chunks + 2 * number), tl.load(chunks + 2 * number + 1)
        numel = tl.load(tensors + tensor * 5 + 4)
        param_ptr = address(tensors, tensor, 0, PARAM)
        raw_ptr = raw + tl.load(levels + tensor * 5 + 2)
        keep, keep_low = tl.load(rates + tensor * 4), tl.load(rates + tensor * 4 + 1)
        lr, lr_low = tl.load(rates + tensor * 4 + 2), tl.load(rates + tensor * 4 + 3)
        end = tl.minimum(first + chunk, numel)
        if left_alone(tensor, found_inf, flags, HAS_FOUND_INF, HAS_FLAGS) != 0:
            end = first
        if (end > first) & (first == 0):
            counter = address(tensors, tensor, 3, tl.float32)
            tl.store(counter, tl.load(counter) + 1.0)
        for start in range(first, end, BLOCK):
            lanes = start + tl.arange(0, BLOCK)
            valid = lanes < end
            update = -tl.load(raw_ptr + lanes, valid, 0.0) * tl.load(inverse_rms + tensor)
            param = tl.load(param_ptr + lanes, valid, 0.0)
            if PARAM == tl.float64:  # noqa: SIM300
                kept = (keep.to(tl.float64) + keep_low.to(tl.float64)) * param
                rate = lr.to(tl.float64) + lr_low.to(tl.float64)
                moved = kept + rate * update.to(tl.float64)
            else:
                moved = keep * param.to(tl.float32) + lr * update
            tl.store(param_ptr + lanes, moved.to(PARAM), valid)
