// The in-place step of one tile: gather its coordinates from one or more tensors, run the rule,
// apply the update, scatter. Also the conversions between stored types and float32.

FASTL2O_INLINE float bits_to_float(uint32_t value) { return __builtin_bit_cast(float, value); }
FASTL2O_INLINE uint32_t float_to_bits(float value) { return __builtin_bit_cast(uint32_t, value); }

FASTL2O_INLINE float bfloat16_to_float(uint16_t value) {
  return bits_to_float(uint32_t(value) << 16);
}

// Round to nearest even; a NaN stays a quiet NaN.
FASTL2O_INLINE uint16_t float_to_bfloat16(float value) {
  const uint32_t raw = float_to_bits(value);
  if ((raw & 0x7fffffffu) > 0x7f800000u) return uint16_t((raw >> 16) | 0x40);
  return uint16_t((raw + 0x7fffu + ((raw >> 16) & 1)) >> 16);
}

FASTL2O_INLINE float half_to_float(uint16_t value) {
  const uint32_t sign = uint32_t(value & 0x8000) << 16;
  const uint32_t rest = value & 0x7fff;
  if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  // A denormal half is exact as the low bits of 1/2 + x, with no denormal float on the way: the
  // calling thread may flush those.
  if (rest < 0x400)
    return bits_to_float(sign | float_to_bits(bits_to_float(rest + 0x3f000000) - 0.5f));
  return bits_to_float(sign | ((rest << 13) + 0x38000000));
}

FASTL2O_INLINE uint16_t float_to_half(float value) {
  const uint32_t raw = float_to_bits(value);
  const uint16_t sign = uint16_t((raw >> 16) & 0x8000);
  const uint32_t rest = raw & 0x7fffffff;
  if (rest > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (rest >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds past 65504
  if (rest < 0x38800000)  // below 2^-14: adding 1/2 leaves the denormal's bits, rounded to even
    return uint16_t(sign | (float_to_bits(bits_to_float(rest) + 0.5f) - 0x3f000000));
  return uint16_t(sign | ((rest - 0x38000000 + 0xfff + ((rest >> 13) & 1)) >> 13));
}

FASTL2O_INLINE void copy_floats(const float* from, int count, float* to) {
  int i = 0;
  for (; i + kWidth <= count; i += kWidth) store(to + i, load(from + i));
  if (i < count) store_some(to + i, count - i, load_some(from + i, count - i));
}

static void read_values(const void* source, DType dtype, int64_t offset, int count, float* out) {
  switch (dtype) {
    case DType::f32: copy_floats(static_cast<const float*>(source) + offset, count, out); return;
    case DType::f64: {
      const double* from = static_cast<const double*>(source) + offset;
      for (int i = 0; i < count; ++i) out[i] = float(from[i]);
      return;
    }
    case DType::bf16: {
      const uint16_t* from = static_cast<const uint16_t*>(source) + offset;
      for (int i = 0; i < count; ++i) out[i] = bfloat16_to_float(from[i]);
      return;
    }
    case DType::f16: {
      const uint16_t* from = static_cast<const uint16_t*>(source) + offset;
      for (int i = 0; i < count; ++i) out[i] = half_to_float(from[i]);
      return;
    }
  }
}

static void write_values(void* target, DType dtype, int64_t offset, int count,
                         const float* values) {
  switch (dtype) {
    case DType::f32: copy_floats(values, count, static_cast<float*>(target) + offset); return;
    case DType::f64: {
      double* to = static_cast<double*>(target) + offset;
      for (int i = 0; i < count; ++i) to[i] = values[i];
      return;
    }
    case DType::bf16: {
      uint16_t* to = static_cast<uint16_t*>(target) + offset;
      for (int i = 0; i < count; ++i) to[i] = float_to_bfloat16(values[i]);
      return;
    }
    case DType::f16: {
      uint16_t* to = static_cast<uint16_t*>(target) + offset;
      for (int i = 0; i < count; ++i) to[i] = float_to_half(values[i]);
      return;
    }
  }
}

// theta <- (1 - lr wd) theta + lr u; a float64 parameter is not rounded to float32 on the way.
static void apply_update(const StepOptions& options, const Segment& part, const float* update) {
  const StepTensor& tensor = *part.tensor;
  const double decay = 1.0 - options.lr * options.weight_decay;
  if (tensor.param_dtype == DType::f64) {
    double* theta = static_cast<double*>(tensor.param) + part.offset;
    for (int i = 0; i < part.count; ++i)
      theta[i] = decay * theta[i] + options.lr * double(update[i]);
    return;
  }
  alignas(64) float theta[kLanes<kStepVectors>];
  read_values(tensor.param, tensor.param_dtype, part.offset, part.count, theta);
  const float keep = float(decay), lr = float(options.lr);
  for (int i = 0; i < part.count; ++i) theta[i] = keep * theta[i] + lr * update[i];
  write_values(tensor.param, tensor.param_dtype, part.offset, part.count, theta);
}

static int64_t state_bytes(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// The state planes [first, last) of one segment, (S, numel), to or from the lanes of a tile.
template <int V>
static void read_state(const StepContext& context, const Segment& part, int first, int last,
                       float* planes) {
  constexpr int lanes = kLanes<V>;
  const int64_t numel = part.tensor->numel;
  float* to = planes + part.lane;
  if (first == last) return;  // a rule without layers has no state to point to
  if (context.options.state_dtype == DType::f32) {
    const float* from = static_cast<const float*>(part.tensor->state) + part.offset;
    for (int plane = first; plane < last; ++plane)
      copy_floats(from + plane * numel, part.count, to + plane * lanes);
    return;
  }
  for (int plane = first; plane < last; ++plane)
    read_values(part.tensor->state, context.options.state_dtype, plane * numel + part.offset,
                part.count, to + plane * lanes);
}

// Values of the coordinates with these bases, half 0 or 1 of a pair, rounded stochastically.
static void write_rounded(const float* values, int count, const uint32_t* bases, uint32_t pair,
                          int half, uint16_t* to) {
  for (int i = 0; i < count; ++i) {
    const uint32_t bits = float_to_bits(values[i]);
    const uint16_t up_or_down = round_finite(bits, rounding_bits(bases[i], pair) >> 16 * half);
    to[i] = is_finite_bits(bits) ? up_or_down : float_to_bfloat16(values[i]);
  }
}

// Planes `first` and `second` of one pair, with the random bits of their coordinates.
template <int V>
static void write_pair_rounded(const Segment& part, const float* planes, int first, int second,
                               uint32_t pair, const uint32_t* bases) {
  constexpr int lanes = kLanes<V>;
  const int64_t numel = part.tensor->numel;
  const float* from[2] = {planes + part.lane + first * lanes, planes + part.lane + second * lanes};
  uint16_t* to = static_cast<uint16_t*>(part.tensor->state) + part.offset;
  uint16_t* targets[2] = {to + first * numel, to + second * numel};
  for (int half = 0; half < 2; ++half)
    write_rounded(from[half], part.count, bases, pair, half, targets[half]);
}

template <int V>
static void write_state_rounded(const StepContext& context, const Segment& part,
                                const float* planes) {
  const RuleConfig& config = context.config;
  uint32_t bases[kLanes<V>];
  for (int i = 0; i < part.count; ++i)
    bases[i] = rounding_base(part.tensor->rounding_key, part.offset + i);
  uint32_t pair = 0;
  for (int layer = 0; layer < config.num_layers; ++layer)
    for (int unit = 0; unit < config.hidden_size; ++unit)
      write_pair_rounded<V>(part, planes, config.h_plane(layer) + unit,
                            config.c_plane(layer) + unit, pair++, bases);
  if (config.is_rnnprop()) write_pair_rounded<V>(part, planes, 0, 1, pair, bases);
}

template <int V>
static void write_state(const StepContext& context, const Segment& part, const float* planes) {
  constexpr int lanes = kLanes<V>;
  const int num_planes = context.config.state_planes();
  const int64_t numel = part.tensor->numel;
  const float* from = planes + part.lane;
  if (num_planes == 0) return;
  if (context.options.stochastic_rounding) {
    write_state_rounded<V>(context, part, planes);
    return;
  }
  if (context.options.state_dtype == DType::f32) {
    float* to = static_cast<float*>(part.tensor->state) + part.offset;
    for (int plane = 0; plane < num_planes; ++plane)
      copy_floats(from + plane * lanes, part.count, to + plane * numel);
    return;
  }
  for (int plane = 0; plane < num_planes; ++plane)
    write_values(part.tensor->state, context.options.state_dtype, plane * numel + part.offset,
                 part.count, from + plane * lanes);
}

// The gradients as the rule sees them.
static void read_grads(const StepOptions& options, const StepTile& tile, float* grad) {
  for (int s = 0; s < tile.num_segments; ++s) {
    const Segment& part = tile.segments[s];
    float* own = grad + part.lane;
    read_values(part.tensor->grad, part.tensor->param_dtype, part.offset, part.count, own);
    if (options.unscale) {
      for (int i = 0; i < part.count; ++i) own[i] /= options.grad_scale;
      write_values(part.tensor->grad, part.tensor->param_dtype, part.offset, part.count, own);
    }
    if (options.maximize)
      for (int i = 0; i < part.count; ++i) own[i] = -own[i];
  }
}

// Tiles whose state planes are fetched ahead together: longer runs of each plane suit the memory.
inline constexpr int kPrefetchTiles = 4;

// Tensors up to this many coordinates are fetched whole before their turn.
inline constexpr int64_t kSmallTensor = 1024;

// The slice of the following tensor's state that matches this segment's share of its own tensor.
static Prefetch prefetch_following(const StepContext& context, const Segment& part,
                                   const StepTensor& following, int blocks) {
  constexpr int run = 512;  // bytes between two looks at the counter
  constexpr int lanes = kLanes<kStepVectors>;
  Prefetch prefetch;
  const int64_t bytes =
      context.config.state_planes() * following.numel * state_bytes(context.options.state_dtype);
  const int64_t numel = part.tensor->numel;
  const int64_t own = numel < lanes ? numel : numel / lanes * lanes;
  // What whole tiles leave of a tensor has its turn later, when the following is there already.
  if (part.offset >= own) return prefetch;
  const int64_t first = bytes * part.offset / own / run;
  const int64_t last = (bytes * (part.offset + part.count) / own + run - 1) / run;
  prefetch.base = reinterpret_cast<uintptr_t>(following.state) + uintptr_t(first * run);
  prefetch.plane_bytes = prefetch.bytes = run;
  prefetch.planes = int(last - first);
  prefetch.spread(blocks);
  return prefetch;
}

// While the tiles of one group compute, each fetches its share of the planes of the next group;
// at a tensor's end, of the following tensor if that is small.
static Prefetch prefetch_ahead(const StepContext& context, const StepTile& all) {
  Prefetch prefetch;
  const RuleConfig& config = context.config;
  const Segment& part = all.segments[all.num_segments - 1];
  const int64_t tile = part.offset / kLanes<kStepVectors>, numel = part.tensor->numel;
  const int64_t start = (tile / kPrefetchTiles + 1) * kPrefetchTiles * kLanes<kStepVectors>;
  const int blocks = config.num_layers * ((config.hidden_size + kUnitBlock - 1) / kUnitBlock);
  if (blocks == 0) return prefetch;
  if (start >= numel) {
    if (all.following == nullptr || all.following->numel > kSmallTensor) return prefetch;
    return prefetch_following(context, part, *all.following, blocks);
  }
  const int64_t width = state_bytes(context.options.state_dtype);
  const int64_t share = (config.state_planes() + kPrefetchTiles - 1) / kPrefetchTiles;
  const int64_t first = share * (tile % kPrefetchTiles);
  const int64_t lanes = kPrefetchTiles * kLanes<kStepVectors>;
  if (first >= config.state_planes()) return prefetch;
  prefetch.plane_bytes = numel * width;
  prefetch.base = reinterpret_cast<uintptr_t>(part.tensor->state) + uintptr_t(start * width) +
                  uintptr_t(first * prefetch.plane_bytes);
  prefetch.bytes = int((numel - start < lanes ? numel - start : lanes) * width);
  prefetch.planes =
      int(first + share < config.state_planes() ? share : config.state_planes() - first);
  prefetch.spread(blocks);
  return prefetch;
}

// RNNprop's features for a tile whose lanes may belong to tensors with different step counts.
template <int V>
static void tile_moment_features(const StepContext& context, const StepTile& tile,
                                 const float* grad, Rows moments, float* x) {
  constexpr int lanes = kLanes<V>;
  alignas(64) float correction1[lanes] = {}, correction2[lanes] = {};
  for (int s = 0; s < tile.num_segments; ++s) {
    const Segment& part = tile.segments[s];
    for (int i = 0; i < part.count; ++i) {
      correction1[part.lane + i] = part.tensor->correction1;
      correction2[part.lane + i] = part.tensor->correction2;
    }
  }
  const MomentDecay decay(context.config);
  for (int k = 0; k < V; ++k) {
    const int at = k * kWidth;
    Vec m = load(moments.at(0, k)), v = load(moments.at(1, k)), g_scaled, m_scaled;
    moment_features(decay, load(correction1 + at), load(correction2 + at), load(grad + at), m, v,
                    g_scaled, m_scaled);
    store(moments.at(0, k), m);
    store(moments.at(1, k), v);
    store(x + at, g_scaled);
    store(x + lanes + at, m_scaled);
  }
}

// The rule on one tile: `state` holds its planes and takes the new ones; `planes` is scratch of the
// same shape, whose h rows hold a copy of the old h, or take one where weights are packed and
// `state` is elsewhere.
template <int V, bool packed>
static void run_rule(const StepContext& context, const StepTile& tile, const float* grad,
                     Rows state, float* planes, float* update) {
  constexpr int lanes = kLanes<V>;
  const RuleConfig& config = context.config;
  const int hidden = config.hidden_size;
  const MetaLayout layout(config);
  alignas(64) float x[2 * lanes], z[kMaxHidden * lanes], h_next[2][kMaxHidden * lanes];
  const float* inputs = x;
  if (config.is_rnnprop()) {
    tile_moment_features<V>(context, tile, grad, state, x);
    project<V>(context.meta + layout.projection_weight, context.meta + layout.projection_bias, x, z,
               hidden);
    inputs = z;
  } else {
    gradient_features<V>(config, context.exp_p, grad, x);
  }
  Prefetch prefetch = prefetch_ahead(context, tile);
  const float* weights = context.packed;
  for (int layer = 0; layer < config.num_layers; ++layer) {
    const Rows h{state.at(config.h_plane(layer), 0), state.stride};
    const Rows c{state.at(config.c_plane(layer), 0), state.stride};
    const LayerState own{planes + config.h_plane(layer) * lanes,     c, c, h_next[layer % 2], h,
                         packed && state.base != planes ? h : Rows{}};
    if constexpr (packed) {
      weights = layer_forward<V, false>(weights, inputs, config.layer_inputs(layer), own, hidden,
                                        GatePlanes{}, prefetch);
    } else {
      const LayerRows rows{context.meta + layout.weight_ih[layer],
                           context.meta + layout.weight_hh[layer],
                           context.meta + layout.bias[layer]};
      layer_in_place<V>(rows, inputs, config.layer_inputs(layer), own, hidden, prefetch);
    }
    inputs = own.h_next;
  }
  Vec out[V];
  dense_row<V>(context.meta + layout.readout_weight, context.meta[layout.readout_bias], inputs,
               config.readout_inputs(), out);
  for (int v = 0; v < V; ++v)
    store(update + v * kWidth, config.is_rnnprop() ? tanh_vec(out[v]) * -config.step_size
                                                   : out[v] * config.output_scale);
}

// A tile of V vectors; `packed` says where the weights are read from.
template <int V, bool packed>
static void step_tile(const StepContext& context, const StepTile& tile) {
  constexpr int lanes = kLanes<V>;
  const RuleConfig& config = context.config;
  alignas(64) float planes[(kMoments + 2 * kMaxLayers * kMaxHidden) * lanes];
  alignas(64) float grad[lanes], update[lanes];
  const Segment& first = tile.segments[0];
  const Segment& last = tile.segments[tile.num_segments - 1];
  const bool partial = last.lane + last.count < lanes;
  if (partial) {  // unused lanes must hold numbers
    __builtin_memset(planes, 0, sizeof(float) * config.state_planes() * lanes);
    __builtin_memset(grad, 0, sizeof(grad));
  }
  read_grads(context.options, tile, grad);
  if (tile.num_segments == 1 && !partial && config.state_planes() > 0 &&
      context.options.state_dtype == DType::f32) {
    // The planes of the tensor serve as they are; only h, which every unit reads, is copied.
    if constexpr (!packed)
      for (int layer = 0; layer < config.num_layers; ++layer)
        read_state<V>(context, first, config.h_plane(layer), config.c_plane(layer), planes);
    const Rows state{static_cast<float*>(first.tensor->state) + first.offset, first.tensor->numel};
    const FlushDenormals guard;
    run_rule<V, packed>(context, tile, grad, state, planes, update);
  } else {
    for (int s = 0; s < tile.num_segments; ++s)
      read_state<V>(context, tile.segments[s], 0, config.state_planes(), planes);
    {
      const FlushDenormals guard;
      run_rule<V, packed>(context, tile, grad, Rows{planes, lanes}, planes, update);
    }
    for (int s = 0; s < tile.num_segments; ++s) write_state<V>(context, tile.segments[s], planes);
  }
  for (int s = 0; s < tile.num_segments; ++s)
    apply_update(context.options, tile.segments[s], update + tile.segments[s].lane);
}

// In no more vectors than the coordinates fill: runs of a meta-training may have ten of them.
template <int V = kStepVectors>
static void step_own_tile(const StepContext& context, const StepTile& tile) {
  if constexpr (V > 1)
    if (tile.segments[0].count <= kLanes<V - 1>) return step_own_tile<V - 1>(context, tile);
  step_tile<V, false>(context, tile);
}
