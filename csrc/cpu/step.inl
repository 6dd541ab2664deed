// The in-place step of one tile: gather its coordinates from one or more tensors, run the rule,
// apply the update, scatter. Also the conversions between stored types and float32.

FASTL2O_INLINE float bits_to_float(uint32_t value) { return __builtin_bit_cast(float, value); }
FASTL2O_INLINE uint32_t float_to_bits(float value) { return __builtin_bit_cast(uint32_t, value); }

FASTL2O_INLINE float bfloat16_to_float(uint16_t value) { return bits_to_float(uint32_t(value) << 16); }

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
  // Scaling by 2^112 moves the exponent's bias and normalises denormals exactly.
  return bits_to_float(sign | float_to_bits(bits_to_float(rest << 13) * bits_to_float(0x77800000)));
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

static void read_values(const void* source, DType dtype, int64_t offset, int count, float* out) {
  switch (dtype) {
    case DType::f32: {
      const float* from = static_cast<const float*>(source) + offset;
      int i = 0;
      for (; i + kWidth <= count; i += kWidth) store(out + i, load(from + i));
      if (i < count) store_some(out + i, count - i, load_some(from + i, count - i));
      return;
    }
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

static void write_values(void* target, DType dtype, int64_t offset, int count, const float* values) {
  switch (dtype) {
    case DType::f32: {
      float* to = static_cast<float*>(target) + offset;
      int i = 0;
      for (; i + kWidth <= count; i += kWidth) store(to + i, load(values + i));
      if (i < count) store_some(to + i, count - i, load_some(values + i, count - i));
      return;
    }
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
  const float decay = 1.0f - options.lr * options.weight_decay;
  if (tensor.param_dtype == DType::f64) {
    double* theta = static_cast<double*>(tensor.param) + part.offset;
    const double exact_decay = 1.0 - double(options.lr) * double(options.weight_decay);
    for (int i = 0; i < part.count; ++i)
      theta[i] = exact_decay * theta[i] + double(options.lr) * double(update[i]);
    return;
  }
  alignas(64) float theta[kLanes<kStepVectors>];
  read_values(tensor.param, tensor.param_dtype, part.offset, part.count, theta);
  for (int i = 0; i < part.count; ++i) theta[i] = decay * theta[i] + options.lr * update[i];
  write_values(tensor.param, tensor.param_dtype, part.offset, part.count, theta);
}

static int64_t state_bytes(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

static void gather(const StepContext& context, const StepTile& tile, float* grad, float* planes) {
  constexpr int lanes = kLanes<kStepVectors>;
  const StepOptions& options = context.options;
  const int num_planes = context.config.state_planes();
  for (int s = 0; s < tile.num_segments; ++s) {
    const Segment& part = tile.segments[s];
    const StepTensor& tensor = *part.tensor;
    float* own = grad + part.lane;
    read_values(tensor.grad, tensor.param_dtype, part.offset, part.count, own);
    if (options.unscale) {
      for (int i = 0; i < part.count; ++i) own[i] /= options.grad_scale;
      write_values(tensor.grad, tensor.param_dtype, part.offset, part.count, own);
    }
    if (options.maximize)
      for (int i = 0; i < part.count; ++i) own[i] = -own[i];
    for (int plane = 0; plane < num_planes; ++plane)
      read_values(tensor.state, options.state_dtype, plane * tensor.numel + part.offset, part.count,
                  planes + plane * lanes + part.lane);
  }
}

static void scatter(const StepContext& context, const StepTile& tile, const float* update,
                    const float* planes) {
  constexpr int lanes = kLanes<kStepVectors>;
  const int num_planes = context.config.state_planes();
  for (int s = 0; s < tile.num_segments; ++s) {
    const Segment& part = tile.segments[s];
    apply_update(context.options, part, update + part.lane);
    for (int plane = 0; plane < num_planes; ++plane)
      write_values(part.tensor->state, context.options.state_dtype,
                   plane * part.tensor->numel + part.offset, part.count,
                   planes + plane * lanes + part.lane);
  }
}

static Prefetch prefetch_tile(const StepContext& context, const Segment* next) {
  Prefetch prefetch;
  if (next == nullptr) return prefetch;
  const RuleConfig& config = context.config;
  const int64_t width = state_bytes(context.options.state_dtype);
  const int blocks = config.num_layers * ((config.hidden_size + kUnitBlock - 1) / kUnitBlock);
  prefetch.base = static_cast<const char*>(next->tensor->state) + next->offset * width;
  prefetch.plane_bytes = next->tensor->numel * width;
  prefetch.bytes = int(next->count * width);
  prefetch.planes = config.state_planes();
  prefetch.per_call = blocks == 0 ? 0 : (prefetch.planes + blocks - 1) / blocks;
  return prefetch;
}

// RNNprop's features for a tile whose lanes may belong to tensors with different step counts.
static void tile_moment_features(const StepContext& context, const StepTile& tile, const float* grad,
                                 float* planes, float* x) {
  constexpr int lanes = kLanes<kStepVectors>;
  alignas(64) float correction1[lanes] = {}, correction2[lanes] = {};
  for (int s = 0; s < tile.num_segments; ++s) {
    const Segment& part = tile.segments[s];
    for (int i = 0; i < part.count; ++i) {
      correction1[part.lane + i] = part.tensor->correction1;
      correction2[part.lane + i] = part.tensor->correction2;
    }
  }
  const MomentDecay decay(context.config);
  for (int at = 0; at < lanes; at += kWidth) {
    Vec m = load(planes + at), v = load(planes + lanes + at), g_scaled, m_scaled;
    moment_features(decay, load(correction1 + at), load(correction2 + at), load(grad + at), m, v,
                    g_scaled, m_scaled);
    store(planes + at, m);
    store(planes + lanes + at, v);
    store(x + at, g_scaled);
    store(x + lanes + at, m_scaled);
  }
}

static void step_tile(const StepContext& context, const StepTile& tile) {
  constexpr int V = kStepVectors;
  constexpr int lanes = kLanes<V>;
  const RuleConfig& config = context.config;
  const int hidden = config.hidden_size;
  const MetaLayout layout(config);
  alignas(64) float planes[(kMoments + 2 * kMaxLayers * kMaxHidden) * lanes];
  alignas(64) float grad[lanes], x[2 * lanes], z[kMaxHidden * lanes], h_next[kMaxHidden * lanes];
  alignas(64) float update[lanes];

  const Segment& last = tile.segments[tile.num_segments - 1];
  if (last.lane + last.count < lanes) {  // unused lanes must hold numbers
    __builtin_memset(planes, 0, sizeof(float) * config.state_planes() * lanes);
    __builtin_memset(grad, 0, sizeof(grad));
  }
  gather(context, tile, grad, planes);

  const float* inputs = x;
  if (config.is_rnnprop()) {
    tile_moment_features(context, tile, grad, planes, x);
    project<V>(context.meta + layout.projection_weight, context.meta + layout.projection_bias, x, z,
               hidden);
    inputs = z;
  } else {
    gradient_features<V>(config, context.exp_p, grad, x);
  }

  Prefetch prefetch = prefetch_tile(context, tile.next);
  const float* packed = context.packed;
  for (int layer = 0; layer < config.num_layers; ++layer) {
    float* h = planes + config.h_plane(layer) * lanes;
    float* c = planes + config.c_plane(layer) * lanes;
    packed = layer_forward<V, false>(packed, inputs, config.layer_inputs(layer), h, c, c, h_next, hidden,
                                     GatePlanes{}, prefetch);
    for (int at = 0; at < hidden * lanes; at += kWidth) store(h + at, load(h_next + at));
    inputs = h;
  }
  Vec out[V];
  dense_row<V>(context.meta + layout.readout_weight, context.meta[layout.readout_bias], inputs,
               config.readout_inputs(), out);
  for (int v = 0; v < V; ++v)
    store(update + v * kWidth, config.is_rnnprop() ? tanh_vec(out[v]) * -config.step_size
                                                   : out[v] * config.output_scale);
  scatter(context, tile, update, planes);
}
