// The first sweep over the parameters: features, GRU, readouts, new planes, the step before it is
// normalised, and the sums that the tensor's level needs.

// One tile of a sweep. Direct: float32 planes and every lane in use, so that rows need no
// conversion.
template <typename Sizes, int V, bool Direct>
struct SweepTile {
  static constexpr int lanes = kLanes<V>;
  const PackedHierarchical& rule;
  const HierarchicalOptions& options;
  const SweepBlock& block;
  const Sizes sizes;
  const float* bias;      // of the parameter GRU (3H), scaled as its weights
  const float* gradient;  // (count)
  int64_t at;
  int count;
  uint32_t* bases;  // (lanes), of the coordinates' random bits; filled in by run()

  FASTL2O_INLINE void read_row(int plane, float* to) const {
    const int64_t offset = plane * block.tensor->numel + at;
    if constexpr (Direct) {
      const float* from = static_cast<const float*>(block.tensor->planes) + offset;
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) store(to + v * kWidth, load(from + v * kWidth));
    } else {
      if (count < lanes) __builtin_memset(to, 0, sizeof(float) * lanes);
      read_values(block.tensor->planes, options.planes_dtype, offset, count, to);
    }
  }

  FASTL2O_INLINE void write_row(int plane, const float* from) const {
    const int64_t offset = plane * block.tensor->numel + at;
    if constexpr (Direct) {
      float* to = static_cast<float*>(block.tensor->planes) + offset;
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) store(to + v * kWidth, load(from + v * kWidth));
    } else if (options.stochastic_rounding) {
      write_rounded(from, count, bases, uint32_t(plane), 0,
                    static_cast<uint16_t*>(block.tensor->planes) + offset);
    } else {
      write_values(block.tensor->planes, options.planes_dtype, offset, count, from);
    }
  }

  FASTL2O_INLINE void read_gradient(float* to) const {
    if constexpr (!Direct) __builtin_memset(to, 0, sizeof(float) * lanes);
    copy_floats(gradient, Direct ? lanes : count, to);
  }

  // Adds a row to its sums, lane by lane of a vector.
  FASTL2O_INLINE void add_row(const float* row, float* sums) const {
    Vec sum = load(sums);
    if (Direct || count == lanes) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum = sum + load(row + v * kWidth);
    } else {
      int i = 0;
      for (; i + kWidth <= count; i += kWidth) sum = sum + load(row + i);
      if (i < count) sum = sum + load_some(row + i, count - i);
    }
    store(sums, sum);
  }

  // Decays of the averages and of the squares, from the previous h.
  FASTL2O_INLINE void decays(const float* h, Vec (&average)[V], Vec (&square)[V]) const {
    const HierarchicalLayout& layout = rule.layout;
    Vec both[2 * V];
    for (int v = 0; v < V; ++v) {
      average[v] = splat(rule.meta[layout.average_decay_bias]);
      square[v] = splat(rule.meta[layout.square_decay_bias]);
    }
    read_out<V>(rule.meta + layout.average_decay, rule.meta + layout.square_decay, h, sizes.units(),
                average, square);
    for (int v = 0; v < V; ++v) both[v] = average[v], both[V + v] = square[v];
    sigmoid_all(both);
    for (int v = 0; v < V; ++v) average[v] = both[v], square[v] = both[V + v];
  }

  // asinh of the scaled averages and log of the squares, of a few scales at once: each is a long
  // chain of operations that wait for one another.
  template <int N>
  FASTL2O_INLINE void scale_functions(float* averages, float* squares) const {
    Vec m[N * V], log_square[N * V];
#pragma GCC unroll 16
    for (int k = 0; k < N * V; ++k) m[k] = load(averages + k * kWidth);
    asinh_all(m);
#pragma GCC unroll 16
    for (int k = 0; k < N * V; ++k) store(averages + k * kWidth, m[k]);
#pragma GCC unroll 16
    for (int k = 0; k < N * V; ++k) log_square[k] = load(squares + k * kWidth);
    log_all<false>(log_square);
#pragma GCC unroll 16
    for (int k = 0; k < N * V; ++k) store(squares + k * kWidth, log_square[k]);
  }

  // Features x (sweep_inputs rows); new averages and squares.
  FASTL2O_INLINE void features(const float* grad, const float* rate, const float* h,
                               float* x) const {
    const HierarchicalConfig& config = rule.config;
    const int scales = sizes.scales();
    Vec average_decay[V] = {}, square_decay[V] = {};
    if (!block.first_step) decays(h, average_decay, square_decay);
    float* logs = x + (2 * scales - 1) * lanes;
#pragma GCC unroll 4
    for (int s = 0; s < scales; ++s) {
      alignas(64) float average[lanes], square[lanes];
      read_row(config.averages_plane() + s, average);
      read_row(config.squares_plane() + s, square);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        const int o = v * kWidth;
        const Vec g = bounded_gradient(load(grad + o));
        const Vec a = fma(average_decay[v], load(average + o) - g, g);
        const Vec fresh = fma(a, a, splat(kSquareEps));
        const Vec q = fma(square_decay[v], load(square + o) - fresh, fresh);
        store(average + o, a);
        store(square + o, q);
        const Vec lam = q + kRmsEps;
        store(x + s * lanes + o, a * reciprocal_root(lam));
        store(logs + s * lanes + o, lam);
        if (!block.first_step && s + 1 < scales)
          average_decay[v] = average_decay[v] * reciprocal_root(average_decay[v]);
      }
      write_row(config.averages_plane() + s, average);
      write_row(config.squares_plane() + s, square);
    }
    int s = 0;
#pragma GCC unroll 2
    for (; s + 2 <= scales; s += 2) scale_functions<2>(x + s * lanes, logs + s * lanes);
    if (s < scales) scale_functions<1>(x + s * lanes, logs + s * lanes);
#pragma GCC unroll 4
    for (s = 1; s < scales; ++s)
#pragma GCC unroll 8
      for (int o = 0; o < lanes; o += kWidth)
        store(x + (scales + s - 1) * lanes + o,
              load(x + s * lanes + o) * load(x + (s - 1) * lanes + o));
#pragma GCC unroll 8
    for (int o = 0; o < lanes; o += kWidth) {
      const Vec last = load(logs + (scales - 1) * lanes + o);
      for (s = 0; s + 1 < scales; ++s) {
        float* row = logs + s * lanes + o;
        store(row, load(row) - last);
      }
      // In the place of the last logarithm.
      store(logs + (scales - 1) * lanes + o, load(rate + o) - block.mean_log_rate);
    }
  }

  // h_next from rows h, x and, to be filled in, r h, one after the other; adds its products with
  // the readouts' weights to d and eta, and to its sums.
  FASTL2O_INLINE void cell(float* rows, float* h_next, Vec (&d)[V], Vec (&eta)[V],
                           float* sums) const {
    const float *direction = rule.meta + rule.layout.direction,
                *rate = rule.meta + rule.layout.rate;
    const int size = sizes.units(), inputs = sizes.inputs();
    const float *h = rows, *x = rows + size * lanes;
    float* rh = rows + (size + inputs) * lanes;
    for_units(size, [&]<int R>(int unit) __attribute__((always_inline)) {
      Vec r[R * V];
      unit_rows<V, R>(rule.sweep_gates + unit, 2 * size, bias + unit, h, size + inputs, r);
      sigmoids_of_exponents(r);
#pragma GCC unroll 32
      for (int k = 0; k < R * V; ++k)
        store(rh + unit * lanes + k * kWidth, r[k] * load(h + unit * lanes + k * kWidth));
    });
    for_units(size, [&]<int R>(int unit) __attribute__((always_inline)) {
      Vec e[R * V], c[R * V], m[R * V];
      unit_rows<V, R>(rule.sweep_gates + size + unit, 2 * size, bias + size + unit, h,
                      size + inputs, c);
      sigmoid_exponentials(c, e);
      unit_rows<V, R>(rule.sweep_candidate + unit, size, bias + 2 * size + unit, x, inputs + size,
                      c);
      tanh_numerators(c, m);
      // u h + (1 - u) c with u = 1 / (1 + e) and c = m / (m + 2), over one denominator.
#pragma GCC unroll 32
      for (int k = 0; k < R * V; ++k) {
        const int o = unit * lanes + k * kWidth;
        const Vec bottom = m[k] + 2.0f;
        const Vec top = fma(e[k], m[k], load(h + o) * bottom);
        c[k] = top * reciprocal(fma(e[k], bottom, bottom));
        store(h_next + o, c[k]);
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
          d[v] = fma(splat(direction[unit + r]), c[r * V + v], d[v]);
          eta[v] = fma(splat(rate[unit + r]), c[r * V + v], eta[v]);
        }
        write_row(unit + r, h_next + (unit + r) * lanes);
        add_row(h_next + (unit + r) * lanes, sums + (unit + r) * kWidth);
      }
    });
  }

  void run(float* sums) const {
    const HierarchicalConfig& config = rule.config;
    const HierarchicalLayout& layout = rule.layout;
    const int size = sizes.units(), inputs = sizes.inputs();
    alignas(64) float rows[(2 * kMaxUnits + kMaxFeatures) * lanes], h_next[kMaxUnits * lanes];
    alignas(64) float grad[lanes], rate[lanes], step[lanes], squared[lanes];
    float *h = rows, *x = rows + size * lanes;
    if (!Direct && options.stochastic_rounding)
      for (int i = 0; i < count; ++i) bases[i] = rounding_base(block.tensor->rounding_key, at + i);
    read_gradient(grad);
#pragma GCC unroll 10
    for (int k = 0; k < size; ++k) read_row(k, h + k * lanes);
    read_row(config.log_rate_plane(), rate);
    features(grad, rate, h, x);
    Vec d[V] = {}, eta[V];
    for (int v = 0; v < V; ++v) eta[v] = splat(rule.meta[layout.rate_bias]);
    for (int s = 0; s < sizes.scales(); ++s)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v)
        d[v] = fma(splat(rule.meta[layout.shortcut + s]), load(x + s * lanes + v * kWidth), d[v]);
    cell(rows, h_next, d, eta, sums);
    for (int v = 0; v < V; ++v) {
      const int o = v * kWidth;
      const Vec old = load(rate + o);
      const Vec e = maximum(splat(-kLogRateLimit), minimum(splat(kLogRateLimit), old + eta[v]));
      store(step + o, exp_vec(e + rule.meta[layout.log_rate_offset]) * d[v]);
      store(rate + o, fma(splat(rule.rate_momentum), old - e, e));
      store(squared + o, d[v] * d[v]);
    }
#pragma GCC unroll 12
    for (int k = 0; k < inputs; ++k) add_row(x + k * lanes, sums + (size + k) * kWidth);
    write_row(config.log_rate_plane(), rate);
    add_row(squared, sums + (size + inputs) * kWidth);
    add_row(rate, sums + (size + inputs + 1) * kWidth);
    if constexpr (Direct) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) store(block.raw_step + at + v * kWidth, load(step + v * kWidth));
    } else {
      for (int i = 0; i < count; ++i) block.raw_step[at + i] = step[i];
    }
  }
};

// The gradient as the rule sees it: the tensor's own memory, or `buffer` (count).
static const float* read_gradients(const HierarchicalTensor& tensor,
                                   const HierarchicalOptions& options, int64_t first, int count,
                                   float* buffer) {
  if (tensor.param_dtype == DType::f32 && !options.unscale && !options.maximize)
    return static_cast<const float*>(tensor.grad) + first;
  read_values(tensor.grad, tensor.param_dtype, first, count, buffer);
  if (options.unscale) {
    for (int i = 0; i < count; ++i) buffer[i] /= options.grad_scale;
    write_values(tensor.grad, tensor.param_dtype, first, count, buffer);
  }
  if (options.maximize)
    for (int i = 0; i < count; ++i) buffer[i] = -buffer[i];
  return buffer;
}

template <typename Sizes>
static void sweep_span(const PackedHierarchical& rule, const HierarchicalOptions& options,
                       const SweepBlock& block, const float* gradient, int64_t first, int64_t last,
                       float* sums) {
  constexpr int V = kSweepVectors;
  uint32_t bases[kLanes<V>];
  const Sizes sizes(rule.config);
  const FlushDenormals guard;
  float bias[3 * kMaxUnits];
  for (int k = 0; k < 3 * sizes.units(); ++k)
    bias[k] = block.bias[k] * (k < 2 * sizes.units() ? kSigmoidScale : kTanhScale);
  const float* own = gradient - first;
  int64_t at = first;
  if (options.planes_dtype == DType::f32)
    for (; at + kLanes<V> <= last; at += kLanes<V>)
      SweepTile<Sizes, V, true>{rule, options, block, sizes, bias, own + at, at, kLanes<V>, bases}
          .run(sums);
  for (; last - at > kWidth; at += kLanes<V>) {
    const int count = int(last - at < kLanes<V> ? last - at : kLanes<V>);
    SweepTile<Sizes, V, false>{rule, options, block, sizes, bias, own + at, at, count, bases}.run(
        sums);
  }
  if (at < last) {
    const int count = int(last - at);
    SweepTile<Sizes, 1, false>{rule, options, block, sizes, bias, own + at, at, count, bases}.run(
        sums);
  }
}

// Coordinates whose sums are added in float32 before they go to float64.
inline constexpr int64_t kSumSpan = 2048;

static void sweep_block(const PackedHierarchical& rule, const HierarchicalOptions& options,
                        const SweepBlock& block) {
  const int num_sums = rule.config.num_sums() - 1, size = rule.config.param_size,
            scales = rule.config.num_scales;
  alignas(64) float sums[(kMaxUnits + kMaxFeatures + 2) * kWidth], buffer[kSumSpan];
  const HierarchicalConfig defaults;
  const bool known = rule.config.param_size == defaults.param_size &&
                     rule.config.num_scales == defaults.num_scales;
  double* totals = block.sums;
  for (int k = 0; k < num_sums; ++k) totals[k] = 0.0;
  for (int64_t first = block.first; first < block.last; first += kSumSpan) {
    const int64_t last = block.last - first < kSumSpan ? block.last : first + kSumSpan;
    __builtin_memset(sums, 0, sizeof(float) * num_sums * kWidth);
    const float* gradient =
        read_gradients(*block.tensor, options, first, int(last - first), buffer);
    const auto& sweep = known ? sweep_span<DefaultSizes> : sweep_span<AnySizes>;
    sweep(rule, options, block, gradient, first, last, sums);
    for (int k = 0; k < num_sums; ++k)
      for (int lane = 0; lane < kWidth; ++lane) totals[k] += double(sums[k * kWidth + lane]);
  }
  // From differences of logarithms to centred ones.
  double *logs = totals + size + 2 * scales - 1, mean = 0.0;
  for (int k = num_sums; k > size + 3 * scales - 2; --k) totals[k] = totals[k - 1];
  logs[scales - 1] = 0.0;
  for (int s = 0; s < scales; ++s) mean += logs[s] / scales;
  for (int s = 0; s < scales; ++s) logs[s] -= mean;
}

static void apply_block(const HierarchicalTensor& tensor, int64_t first, int64_t last,
                        const float* raw_step, float inverse_rms) {
  const double decay = 1.0 - tensor.lr * tensor.weight_decay;
  const float keep = float(decay), scale = float(-tensor.lr * double(inverse_rms));
  if (tensor.param_dtype == DType::f64) {
    double* theta = static_cast<double*>(tensor.param);
    for (int64_t i = first; i < last; ++i)
      theta[i] = decay * theta[i] - tensor.lr * double(inverse_rms * raw_step[i]);
    return;
  }
  if (tensor.param_dtype == DType::f32) {
    float* theta = static_cast<float*>(tensor.param);
    for (int64_t i = first; i < last; ++i) theta[i] = keep * theta[i] + scale * raw_step[i];
    return;
  }
  constexpr int lanes = kLanes<kSweepVectors>;
  alignas(64) float theta[lanes];
  for (int64_t at = first; at < last; at += lanes) {
    const int count = int(last - at < lanes ? last - at : lanes);
    read_values(tensor.param, tensor.param_dtype, at, count, theta);
    for (int i = 0; i < count; ++i) theta[i] = keep * theta[i] + scale * raw_step[at + i];
    write_values(tensor.param, tensor.param_dtype, at, count, theta);
  }
}
