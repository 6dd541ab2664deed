"""The Triton kernels of the hierarchical rule's window backward; `window.py` launches them.

The replay leaves of every step the state before it, its raw steps, its chunks' sums and the
tensors' 1 / rms. Going back a step takes four launches, over the same tables as the step's:

    advance_adjoint     dL/d(parameter) after the step, and its products with the raw steps
    levels_backward     the global GRU and the tensors', and what a tensor tells its coordinates
    sweep_backward      the parameters; sums of the gates' gradients over each chunk
    injected_backward   from those sums to the states that inject biases

What tensors hand from launch to launch is double buffered: `levels_backward` reads what any of the
problem's tensors wrote one launch before. A problem's tensors follow each other, `count` of them.
Gradients of the meta-parameters are partial sums, a row of the parameter level's for each program
of the sweep and a row of the others' for each tensor; a row has one writer.
"""

# Triton's functions take Triton's values: annotations would be wrong for either side.
# mypy: disable-error-code="no-untyped-def,assignment"

from __future__ import annotations

import triton
import triton.language as tl

from ..lstm.cells import number
from . import cells
from .step_kernels import ANYWHERE, injected_biases, mean_log_rate, state_of
from .window_sweep import down, place, row
from .window_tile import add_gradients, backward_tile, forward_tile


@triton.constexpr_function
def level_offset(name, P, T, G, S):
    """Where the gradient of a meta-parameter of the upper levels lies in a tensor's row."""
    return cells.offset(name, P, T, G, S) - cells.offset("tensor_gates", P, T, G, S)


@triton.constexpr_function
def level_work(name, P, T, G, S):
    """Where a vector of a tensor's level starts in its scratch; "all": how long that is.

    Of either GRU, one after the other: [x, h], injected biases, dL/dh', the gradients of [x, h]
    and those of the preactivations.
    """
    width, hidden = max(P + 3 * S + T, T + G), max(T, G)
    return place(
        name,
        (("xh", width), ("injected", 3 * hidden), ("d_next", hidden), ("d_xh", width),
         ("d_bias", 3 * hidden)),
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["chunk", "recorded", "follows"],
    do_not_specialize_on_alignment=[*ANYWHERE, "grads", "loss_weights"],
)
def advance_adjoint(
    tensors, levels, chunks, grads, loss_weights, raw, adjoint, products, chunk,
    recorded, follows, lr, keep, BLOCK: tl.constexpr,
):  # fmt: skip
    """adjoint <- w g + keep adjoint, and of every chunk the sum of -lr adjoint raw.

    `grads`, of all coordinates, and `loss_weights` (runs,) are of the step after. `recorded` is 1
    if there are any, `follows` 1 if `adjoint` holds that after this step, which else is 0.
    """
    chunk_number = tl.program_id(0)
    tensor = tl.load(chunks + 2 * chunk_number)
    first = tl.load(chunks + 2 * chunk_number + 1)
    end = tl.minimum(first + chunk, tl.load(tensors + tensor * 5 + 4))
    at = tl.load(levels + tensor * 5 + 2)
    # 0 without a gradient: what no one asked for may be NaN or Inf.
    weight = tl.load(loss_weights + tl.load(levels + tensor * 5 + 1), recorded != 0, 0.0)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, end, BLOCK):
        lanes = start + tl.arange(0, BLOCK)
        valid = lanes < end
        new = weight * tl.load(grads + at + lanes, lanes < end * recorded, 0.0)
        new += keep * tl.load(adjoint + at + lanes, lanes < end * follows, 0.0)
        tl.store(adjoint + at + lanes, new, valid)
        total -= lr * new * tl.load(raw + at + lanes, valid, 0.0)
    tl.store(products + chunk_number, tl.sum(total, 0))


@triton.jit(
    do_not_specialize=["tensors_total", "count"],
    do_not_specialize_on_alignment=[*ANYWHERE, "new_levels"],
)
def levels_backward(
    tensors, levels, new_levels, meta, hidden, flags, partials, inverse_rms, products,
    d_state, d_hidden, d_centred, d_state_out, d_hidden_out, down_rows, work_rows, d_meta,
    tensors_total, count, coordinates, lr,
    P: tl.constexpr, T: tl.constexpr, G: tl.constexpr, S: tl.constexpr, META: tl.constexpr,
    TENSORS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A program a tensor: its GRU backwards and, anew in each, the problem's global GRU.

    `new_levels` holds the tensors' states after the step. `d_state` (tensors, T), `d_hidden`
    (tensors, G), parts of a sum, and `d_centred` (tensors,) come from `injected_backward`;
    `d_state_out` and `d_hidden_out` go to it. `coordinates`, of a problem, is float32.
    """
    X: tl.constexpr = P + 3 * S
    SUMS: tl.constexpr = X + 2
    LANES: tl.constexpr = cells.padded(SUMS)
    PT: tl.constexpr = cells.padded(T)
    PG: tl.constexpr = cells.padded(G)
    RANK: tl.constexpr = cells.padded(3 * T)
    HIDDEN: tl.constexpr = cells.padded(max(T, G))
    WIDTH: tl.constexpr = cells.padded(max(X + T, T + G))
    tensor = tl.program_id(0).to(tl.int64)
    problem = tl.load(levels + tensor * 5 + 1)
    own = d_meta + tensor * META
    work = work_rows + tensor * level_work("all", P, T, G, S)
    xh = work + level_work("xh", P, T, G, S)
    injected = work + level_work("injected", P, T, G, S)
    d_next = work + level_work("d_next", P, T, G, S)
    d_xh = work + level_work("d_xh", P, T, G, S)
    d_bias = work + level_work("d_bias", P, T, G, S)
    unit, out, lane = tl.arange(0, PT), tl.arange(0, PG), tl.arange(0, LANES)
    # Sums over the problem's tensors, in their order.
    first = problem * count
    d_z = tl.zeros((PG,), tl.float32)
    mean_state = tl.zeros((PT,), tl.float32)
    centred = tl.full((), 0.0, tl.float32)
    for index in range(count):
        d_z += cells.load_vector(d_hidden + (first + index) * G, G, PG)
        mean_state += cells.load_vector(state_of(new_levels, first + index), T, PT)
        centred += tl.load(d_centred + first + index)
    share = tl.div_rn(1.0, tl.cast(count, tl.float32))
    z = cells.load_vector(hidden + problem * G, G, PG)
    tl.store(xh + unit, mean_state * share, unit < T)
    tl.store(xh + T + out, z, out < G)
    tl.store(d_next + out, d_z, out < G)
    for gate in tl.static_range(3):
        tl.store(injected + gate * G + out, tl.zeros((PG,), tl.float32), out < G)
    tl.debug_barrier()
    cells.gru_backward(
        meta + cells.offset("global_gates", P, T, G, S),
        own + level_offset("global_gates", P, T, G, S), (tensor == first).to(tl.int32),
        xh, injected, d_next, d_xh, d_bias, number(T), number(G), HIDDEN, WIDTH,
    )  # fmt: skip
    tl.debug_barrier()
    d_k = cells.load_vector(d_state + tensor * T, T, PT)
    d_k += cells.load_vector(d_xh, T, PT) * share
    d_old_z = tl.where(tensor == first, cells.load_vector(d_xh + T, G, PG), 0.0)

    numel = tl.load(tensors + tensor * 5 + 4).to(tl.float64)
    means = (cells.chunk_sums(partials, levels, tensor, SUMS, LANES, ROWS) / numel).to(tl.float32)
    k = cells.load_vector(state_of(levels, tensor), T, PT)
    weights = meta + cells.offset("global_to_tensor", P, T, G, S)
    bias = meta + cells.offset("global_to_tensor_bias", P, T, G, S)
    rank = tl.arange(0, RANK)
    tl.debug_barrier()
    tl.store(injected + rank, cells.affine(weights, bias, z, 3 * T, G, RANK, PG), rank < 3 * T)
    tl.store(xh + lane, means, lane < X)
    tl.store(xh + X + unit, k, unit < T)
    tl.store(d_next + unit, d_k, unit < T)
    tl.debug_barrier()
    cells.gru_backward(
        meta + cells.offset("tensor_gates", P, T, G, S),
        own + level_offset("tensor_gates", P, T, G, S), number(1),
        xh, injected, d_next, d_xh, d_bias, number(X), number(T), HIDDEN, WIDTH,
    )  # fmt: skip
    tl.debug_barrier()
    tl.store(d_state_out + tensor * T + unit, cells.load_vector(d_xh + X, T, PT), unit < T)
    d_injected = cells.load_vector(d_bias, 3 * T, RANK)
    d_old_z += cells.transposed(weights, d_injected, 3 * T, G, RANK, PG)
    tl.store(d_hidden_out + tensor * G + out, d_old_z, out < G)
    cells.affine_gradient(
        own + level_offset("global_to_tensor", P, T, G, S),
        own + level_offset("global_to_tensor_bias", P, T, G, S), d_injected, z,
        3 * T, G, RANK, PG,
    )  # fmt: skip

    own_down = down_rows + tensor * down("all", P, S)
    d_means = cells.load_vector(d_xh, X, LANES) * tl.div_rn(1.0, numel.to(tl.float32))
    tl.store(own_down + lane, d_means, lane < X)
    biases = injected_biases(meta, state_of(levels, tensor), hidden + problem * G, P, T, G, S)
    row_index = tl.arange(0, cells.padded(3 * P))
    tl.store(own_down + down("biases", P, S) + row_index, biases, row_index < 3 * P)
    product = tl.sum(cells.chunk_sums(products, levels, tensor, 1, 1, ROWS), 0)
    root = tl.load(inverse_rms + tensor)
    rates = own_down + down("rates", P, S)
    tl.store(rates, (product * root.to(tl.float64) / numel).to(tl.float32))
    tl.store(rates + 1, -tl.div_rn(centred, coordinates))
    mean = mean_log_rate(tensors, levels, flags, problem, tensors_total, T, TENSORS, False)
    tl.store(rates + 2, mean)
    tl.store(rates + 3, root)
    tl.store(rates + 4, lr)


@triton.jit(
    do_not_specialize=["chunks_total", "programs", "chunk"], do_not_specialize_on_alignment=ANYWHERE
)
def sweep_backward(
    tensors, d_tensors, levels, chunks, meta, down_rows, adjoint, step_sums, partials, scratch,
    chunks_total, programs, chunk,
    P: tl.constexpr, T: tl.constexpr, G: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The parameters back by a step: planes' gradients in place, in the table `d_tensors`.

    `step_sums` (chunks, 3 P + 1): the gates' gradients and those of the centred log rates, summed
    over each chunk. A program's row of `partials` ends with a number that is not used.
    """
    SUMS: tl.constexpr = 3 * P + 1
    LANES: tl.constexpr = cells.padded(SUMS)
    program = tl.program_id(0)
    work = scratch + program.to(tl.int64) * (row("all", P, S) * BLOCK)
    partial = partials + program.to(tl.int64) * (cells.offset("tensor_gates", P, T, G, S) + 1)
    sum_lane = tl.arange(0, LANES)
    for chunk_number in range(program, chunks_total, programs):
        tensor = tl.load(chunks + 2 * chunk_number)
        first = tl.load(chunks + 2 * chunk_number + 1)
        end = tl.minimum(first + chunk, tl.load(tensors + tensor * 5 + 4))
        # The kernel keeps few numbers across the calls: more of them spill.
        tl.store(
            step_sums + chunk_number * SUMS + sum_lane,
            tl.zeros((LANES,), tl.float32),
            sum_lane < SUMS,
        )
        for start in range(first, end, BLOCK):
            left = tl.minimum(end - start, BLOCK).to(tl.int32)
            forward_tile(
                tensors + tensor * 5, start, left, meta, down_rows + tensor * down("all", P, S),
                work, P, T, G, S, BLOCK,
            )  # fmt: skip
            backward_tile(
                tensors + tensor * 5, d_tensors + tensor * 5,
                adjoint + tl.load(levels + tensor * 5 + 2) + start, start, left, meta,
                down_rows + tensor * down("all", P, S), work, P, T, G, S, BLOCK,
            )  # fmt: skip
            add_gradients(partial, step_sums + chunk_number * SUMS, work, P, T, G, S, BLOCK)


@triton.jit(do_not_specialize_on_alignment=ANYWHERE)
def injected_backward(
    levels, meta, hidden, step_sums, d_state_in, d_hidden_in, d_state, d_hidden, d_centred, d_meta,
    P: tl.constexpr, T: tl.constexpr, G: tl.constexpr, S: tl.constexpr, META: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """A program a tensor: from its chunks' sums to the states that injected the biases."""
    RANK: tl.constexpr = 3 * P
    LANES: tl.constexpr = cells.padded(RANK + 1)
    PT: tl.constexpr = cells.padded(T)
    PG: tl.constexpr = cells.padded(G)
    tensor = tl.program_id(0).to(tl.int64)
    own = d_meta + tensor * META
    lane, unit, out = tl.arange(0, LANES), tl.arange(0, PT), tl.arange(0, PG)
    sums = cells.chunk_sums(step_sums, levels, tensor, RANK + 1, LANES, ROWS).to(tl.float32)
    tl.store(d_centred + tensor, tl.sum(tl.where(lane == RANK, sums, 0.0), 0))
    d = tl.where(lane < RANK, sums, 0.0)
    k = cells.load_vector(state_of(levels, tensor), T, PT)
    z = cells.load_vector(hidden + tl.load(levels + tensor * 5 + 1) * G, G, PG)
    weights = meta + cells.offset("tensor_to_param", P, T, G, S)
    d_k = cells.load_vector(d_state_in + tensor * T, T, PT)
    d_k += cells.transposed(weights, d, RANK, T, LANES, PT)
    tl.store(d_state + tensor * T + unit, d_k, unit < T)
    weights = meta + cells.offset("global_to_param", P, T, G, S)
    d_z = cells.load_vector(d_hidden_in + tensor * G, G, PG)
    d_z += cells.transposed(weights, d, RANK, G, LANES, PG)
    tl.store(d_hidden + tensor * G + out, d_z, out < G)
    cells.affine_gradient(
        own + level_offset("tensor_to_param", P, T, G, S),
        own + level_offset("tensor_to_param_bias", P, T, G, S), d, k, RANK, T, LANES, PT,
    )  # fmt: skip
    cells.affine_gradient(
        own + level_offset("global_to_param", P, T, G, S),
        own + level_offset("global_to_param_bias", P, T, G, S), d, z, RANK, G, LANES, PG,
    )  # fmt: skip
