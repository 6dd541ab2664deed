"""The Triton kernels of the in-place step over many tensors; `step.py` launches them.

Tables on the device, int64: `tensors` (tensors, 5) holds the addresses of a tensor's param, grad,
state and step counter and its number of coordinates; `chunks` (chunks, 2) a tensor's index and a
first coordinate. A program walks its chunks tile by tile.

A tile is BLOCK coordinates. The inputs of a layer are in registers, one array of BLOCK a unit; the
loop over units is rolled, its weights are single numbers, so no hidden size is padded. The new h of
a unit goes to its state plane at once, and the next layer reads it back from the cache.
"""

# Triton's functions take Triton's values: annotations would be wrong for either side.
# mypy: disable-error-code="no-untyped-def,assignment"

from __future__ import annotations

import triton
import triton.language as tl

from . import cells

MOMENTS = tl.constexpr(2)


@triton.jit
def address(tensors, tensor, field, dtype: tl.constexpr):
    """The pointer in a field of the table."""
    return tl.load(tensors + tensor * 5 + field).to(tl.pointer_type(dtype), bitcast=True)


@triton.jit
def left_alone(tensor, found_inf, flags, HAS_FOUND_INF: tl.constexpr, HAS_FLAGS: tl.constexpr):
    """Whether this step must not change a tensor: 0-dim int32."""
    skip = tl.zeros((), tl.int32)
    if HAS_FOUND_INF:
        skip = (tl.load(found_inf) != 0.0).to(tl.int32)
    if HAS_FLAGS:
        skip = skip | tl.load(flags + tensor)
    return skip


@triton.jit(do_not_specialize=["chunks_total", "chunk"])
def find_nonfinite(
    tensors, chunks, flags, found_inf, chunks_total, chunk,
    PARAM: tl.constexpr, BLOCK: tl.constexpr, HAS_FOUND_INF: tl.constexpr,
):  # fmt: skip
    """Set flags[tensor] to 1 where a gradient holds NaN or Inf; every writer writes the same."""
    program = tl.program_id(0)
    tensor, first = tl.load(chunks + 2 * program), tl.load(chunks + 2 * program + 1)
    numel = tl.load(tensors + tensor * 5 + 4)
    grad_ptr = address(tensors, tensor, 1, PARAM)
    end = tl.minimum(first + chunk, numel)
    if left_alone(tensor, found_inf, flags, HAS_FOUND_INF, False) != 0:
        end = first
    found = tl.zeros((BLOCK,), tl.int32)
    for start in range(first, end, BLOCK):
        lanes = start + tl.arange(0, BLOCK)
        # Chunks may be smaller than BLOCK: what lies beyond this one is another program's.
        grad = tl.load(grad_ptr + lanes, lanes < end, 0.0)
        if PARAM != tl.float64:  # noqa: SIM300
            grad = grad.to(tl.float32)
        found |= (grad - grad != 0.0).to(tl.int32)
    any_found = tl.max(found, 0)
    tl.store(flags + tensor, any_found, any_found != 0)


@triton.jit
def correction(log_high, log_low, t):
    """1 / (1 - beta^t) in float64 from log(beta) as a sum of two float32; 1 for beta = 0."""
    exponent = t * (tl.cast(log_high, tl.float64) + tl.cast(log_low, tl.float64))
    # 1 - e^y cancels near 0: there its series, off by 3e-15 relative.
    series = exponent * (1.0 / 120.0) + 1.0 / 24.0
    series = series * exponent + 1.0 / 6.0
    series = series * exponent + 0.5
    series = (series * exponent + 1.0) * exponent
    near = exponent > -1e-3
    return 1.0 / tl.where(near, -series, 1.0 - tl.exp(exponent))


@triton.jit(do_not_specialize=["count"])
def advance(
    tensors, corrections, found_inf, flags, count, log1_high, log1_low, log2_high, log2_low,
    BLOCK: tl.constexpr, HAS_FOUND_INF: tl.constexpr, HAS_FLAGS: tl.constexpr,
):  # fmt: skip
    """RNNprop: count this step in the tensors it changes, and write the moments' corrections."""
    tensor = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = tensor < count
    pointer = tl.load(tensors + tensor * 5 + 3, valid, 0).to(
        tl.pointer_type(tl.float32), bitcast=True
    )
    if HAS_FLAGS:
        valid = valid & (tl.load(flags + tensor, valid, 1) == 0)
    if HAS_FOUND_INF:
        valid = valid & (tl.load(found_inf + tl.zeros_like(tensor), valid, 1.0) == 0.0)
    taken = tl.load(pointer, valid, 0.0)
    t = taken.to(tl.float64) + 1.0
    tl.store(corrections + 2 * tensor, correction(log1_high, log1_low, t).to(tl.float32), valid)
    tl.store(corrections + 2 * tensor + 1, correction(log2_high, log2_low, t).to(tl.float32), valid)
    tl.store(pointer, taken + 1.0, valid)


@triton.jit
def load_rows(base, stride, lanes, valid, ROWS: tl.constexpr):
    """ROWS planes of a tile in registers, a tuple of `(BLOCK,)` float32."""
    rows = ()
    for row in tl.static_range(ROWS):
        rows = rows + (tl.load(base + row * stride + lanes, valid, 0.0).to(tl.float32),)  # noqa: RUF005
    return rows


@triton.jit
def mix_bits(x):
    """The hash of csrc/include/rounding.h on uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * tl.full((), 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def rounding_base(seed_low, seed_high, tensor, coordinates):
    """What the random bits of a tensor's coordinates, int64, depend on besides the plane."""
    key = mix_bits(seed_low.to(tl.uint32, bitcast=True) + tensor.to(tl.uint32))
    key = mix_bits(key ^ seed_high.to(tl.uint32, bitcast=True))
    return mix_bits(mix_bits(coordinates.to(tl.uint32) ^ key) + (coordinates >> 32).to(tl.uint32))


@triton.jit
def rounded(value, base, pair, UPPER: tl.constexpr, STATE: tl.constexpr, STOCHASTIC: tl.constexpr):
    """A float32 value as it is stored; `pair` and UPPER say of which plane."""
    out = value.to(STATE)
    if STOCHASTIC:
        random = mix_bits(
            base ^ (tl.cast(pair + 1, tl.uint32) * tl.full((), 0x9E3779B9, tl.uint32))
        )
        random = random >> 16 if UPPER else random & 0xFFFF
        bits = value.to(tl.uint32, bitcast=True)
        up_or_down = ((bits + random) >> 16).to(tl.uint16).to(STATE, bitcast=True)
        # NaN and infinity stay.
        out = tl.where((bits & 0x7F800000) == 0x7F800000, out, up_or_down)
    return out


@triton.jit
def layer(
    x, state, numel, lanes, valid, weights, hidden, hidden_stride, hidden_lanes, readout,
    base, first_pair, INPUTS: tl.constexpr, H: tl.constexpr, TOP: tl.constexpr,
    BLOCK: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """One layer on inputs x: its new state in the planes, the readout's sum if it is the top one.

    `state` points at the layer's planes h, then c. Unless it is the top layer, the new h also goes
    to `hidden` as float32. `base` and `first_pair` place the random bits of its first unit.
    """
    STATE: tl.constexpr = state.dtype.element_ty
    h = load_rows(state, numel, lanes, valid, H)
    out = tl.zeros((BLOCK,), tl.float32)
    bias = weights + 4 * H * (INPUTS + H)
    for unit in range(H):
        c_ptr = state + (H + unit) * numel + lanes
        c = tl.load(c_ptr, valid, 0.0).to(tl.float32)
        i = tl.zeros((BLOCK,), tl.float32) + tl.load(bias + unit)
        f = tl.zeros((BLOCK,), tl.float32) + tl.load(bias + H + unit)
        g = tl.zeros((BLOCK,), tl.float32) + tl.load(bias + 2 * H + unit)
        o = tl.zeros((BLOCK,), tl.float32) + tl.load(bias + 3 * H + unit)
        row = weights + unit * INPUTS
        for k in tl.static_range(INPUTS):
            i += x[k] * tl.load(row + k)
            f += x[k] * tl.load(row + H * INPUTS + k)
            g += x[k] * tl.load(row + 2 * H * INPUTS + k)
            o += x[k] * tl.load(row + 3 * H * INPUTS + k)
        row = weights + 4 * H * INPUTS + unit * H
        for k in tl.static_range(H):
            i += h[k] * tl.load(row + k)
            f += h[k] * tl.load(row + H * H + k)
            g += h[k] * tl.load(row + 2 * H * H + k)
            o += h[k] * tl.load(row + 3 * H * H + k)
        h_next, c = cells.lstm_cell(i, f, g, o, c)
        pair = first_pair + unit
        tl.store(c_ptr, rounded(c, base, pair, True, STATE, STOCHASTIC), valid)
        h_stored = rounded(h_next, base, pair, False, STATE, STOCHASTIC)
        tl.store(state + unit * numel + lanes, h_stored, valid)
        if TOP:
            out += h_next * tl.load(readout + unit)
        elif state.dtype.element_ty != tl.float32:
            tl.store(hidden + unit * hidden_stride + hidden_lanes, h_next, valid)
    return out


@triton.jit
def project(weights, first, second, H: tl.constexpr):
    """RNNprop: ELU(P [first, second] + p), a tuple of H arrays."""
    rows = ()
    for unit in tl.static_range(H):
        affine = first * tl.load(weights + 2 * unit) + tl.load(weights + 2 * H + unit)
        affine += second * tl.load(weights + 2 * unit + 1)
        rows = rows + (cells.elu(affine),)  # noqa: RUF005
    return rows


@triton.jit(do_not_specialize=["chunks_total", "programs", "seed_low", "seed_high"])
def step(
    tensors, chunks, corrections, meta, scratch, grad_scale, found_inf, flags,
    chunks_total, programs, chunk, sign, keep, keep_low, lr, lr_low,
    scale, p, eps, exp_p, beta1, beta2, rest1, rest2, seed_low, seed_high,
    PARAM: tl.constexpr, STATE: tl.constexpr, RNNPROP: tl.constexpr, LOG_SIGN: tl.constexpr,
    LAYERS: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_FOUND_INF: tl.constexpr, HAS_FLAGS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """theta <- keep theta + lr u for every coordinate of every tensor, and the new state.

    `sign` is -1 to maximize; keep = 1 - lr * weight_decay; the `_low` parts complete keep and lr to
    float64 for float64 parameters. `seed_low` and `seed_high` are int32; with STOCHASTIC they seed
    the rounding of the state.
    """
    FEATURES: tl.constexpr = 2 if RNNPROP or LOG_SIGN else 1
    INPUTS: tl.constexpr = H if RNNPROP else FEATURES
    FIRST: tl.constexpr = MOMENTS if RNNPROP else 0
    readout = meta + cells.layer_offset(LAYERS, RNNPROP, FEATURES, H)
    tile = tl.arange(0, BLOCK)
    program = tl.program_id(0)
    for number in range(program, chunks_total, programs):
        tensor, first = tl.load(chunks + 2 * number), tl.load(chunks + 2 * number + 1)
        numel = tl.load(tensors + tensor * 5 + 4)
        param_ptr = address(tensors, tensor, 0, PARAM)
        grad_ptr = address(tensors, tensor, 1, PARAM)
        state = address(tensors, tensor, 2, STATE)
        end = tl.minimum(first + chunk, numel)
        if left_alone(tensor, found_inf, flags, HAS_FOUND_INF, HAS_FLAGS) != 0:
            end = first
        for start in range(first, end, BLOCK):
            lanes = start + tile
            valid = lanes < numel
            grad = tl.load(grad_ptr + lanes, valid, 0.0).to(tl.float32)
            if HAS_SCALE:
                grad = tl.div_rn(grad, tl.load(grad_scale))
                tl.store(grad_ptr + lanes, grad.to(PARAM), valid)
            grad *= sign
            base = lanes
            if STOCHASTIC:
                base = rounding_base(seed_low, seed_high, tensor, lanes)
            if RNNPROP:
                m, v, g_scaled, m_scaled = cells.moment_features(
                    grad, tl.load(state + lanes, valid, 0.0).to(tl.float32),
                    tl.load(state + numel + lanes, valid, 0.0).to(tl.float32),
                    tl.load(corrections + 2 * tensor), tl.load(corrections + 2 * tensor + 1),
                    beta1, beta2, rest1, rest2,
                )  # fmt: skip
                m = rounded(m, base, LAYERS * H, False, STATE, STOCHASTIC)
                v = rounded(v, base, LAYERS * H, True, STATE, STOCHASTIC)
                tl.store(state + lanes, m, valid)
                tl.store(state + numel + lanes, v, valid)
                x = project(meta, g_scaled, m_scaled, H)
            elif LOG_SIGN:
                x = cells.log_sign_features(grad, p, eps, exp_p)
            else:
                x = (grad,)
            out = tl.zeros((BLOCK,), tl.float32)
            for index in tl.static_range(LAYERS):
                planes = state + (FIRST + 2 * index * H) * numel
                if STATE == tl.float32:  # noqa: SIM300
                    hidden, hidden_stride, hidden_lanes = planes, numel, lanes
                else:
                    hidden = scratch + program.to(tl.int64) * (H * BLOCK)
                    hidden_stride, hidden_lanes = BLOCK, tile
                out = layer(
                    x, planes, numel, lanes, valid,
                    meta + cells.layer_offset(index, RNNPROP, FEATURES, H),
                    hidden, hidden_stride, hidden_lanes, readout, base, index * H,
                    INPUTS if index == 0 else H, H, index + 1 == LAYERS, BLOCK, STOCHASTIC,
                )  # fmt: skip
                if index + 1 < LAYERS:
                    # Other threads may load what one stored, and the next layer stores to the same
                    # scratch again.
                    tl.debug_barrier()
                    x = load_rows(hidden, hidden_stride, hidden_lanes, valid, H)
                    if STATE != tl.float32:  # noqa: SIM300
                        tl.debug_barrier()
            width: tl.constexpr = H if LAYERS else INPUTS
            if LAYERS == 0:
                for k in tl.static_range(INPUTS):
                    out += x[k] * tl.load(readout + k)
            out += tl.load(readout + width)
            if RNNPROP:
                update = -scale * cells.tanh(out)
            else:
                update = scale * out
            param = tl.load(param_ptr + lanes, valid, 0.0)
            if PARAM == tl.float64:  # noqa: SIM300
                kept = (tl.cast(keep, tl.float64) + tl.cast(keep_low, tl.float64)) * param
                rate = tl.cast(lr, tl.float64) + tl.cast(lr_low, tl.float64)
                moved = kept + rate * update.to(tl.float64)
            else:
                moved = keep * param.to(tl.float32) + lr * update
            tl.store(param_ptr + lanes, moved.to(PARAM), valid)
