// The first sweep over the parameters: features, GRU, readouts, new planes, the step before it is
// normalised, and the sums that the tensor's level needs.

// The hidden units of one inner product; times the vectors of a tile, its accumulators.
inline constexpr int kSweepUnits = 5;

// out (R rows of V vectors) = bias + weight . x over `columns` rows of x.
template <int V, int R>
FASTL2O_INLINE void unit_rows(const float* weight, int64_t stride, const float* bias,
                              const float* x, int columns, Vec (&out)[R * V]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) out[r * V + v] = splat(bias[r]);
  for (int k = 0; k < columns; ++k, weight += stride) {
    Vec input[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) input[v] = load(x + k * kLanes<V> + v * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec w = splat(weight[r]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) out[r * V + v] = fma(w, input[v], out[r * V + v]);
    }
  }
}

// Two readouts of the same rows.
template <int V>
FASTL2O_INLINE void read_out(const float* first, const float* second, const float* x, int count,
                             Vec (&a)[V], Vec (&b)[V]) {
  for (int k = 0; k < count; ++k)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const Vec value = load(x + k * kLanes<V> + v * kWidth);
      a[v] = fma(splat(first[k]), value, a[v]);
      b[v] = fma(splat(second[k]), value, b[v]);
    }
}

// Calls visit.operator()<R>(unit) for blocks of units that cover [0, count).
template <typename Visit>
FASTL2O_INLINE void for_units(int count, Visit visit) {
  int unit = 0;
  for (; unit + kSweepUnits <= count; unit += kSweepUnits)
    visit.template operator()<kSweepUnits>(unit);
  for (; unit < count; ++unit) visit.template operator()<1>(unit);
}

// One tile of a sweep. Direct: float32 planes and every lane in use, so that rows need no
// conversion.
template <int V, bool Direct>
struct SweepTile {
  static constexpr int lanes = kLanes<V>;
  const PackedHierarchical& rule;
  const HierarchicalOptions& options;
  const SweepBlock& block;
  int64_t at;
  int count;
  uint32_t* bases;  // (lanes), of the coordinates' random bits; filled in by run()

  void read_row(int plane, float* to) const {
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

  void write_row(int plane, const float* from) const {
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

  void read_grad(float* grad) const {
    const HierarchicalTensor& tensor = *block.tensor;
    if (count < lanes) __builtin_memset(grad, 0, sizeof(float) * lanes);
    read_values(tensor.grad, tensor.param_dtype, at, count, grad);
    if (options.unscale) {
      for (int i = 0; i < count; ++i) grad[i] /= options.grad_scale;
      write_values(tensor.grad, tensor.param_dtype, at, count, grad);
    }
    if (options.maximize)
      for (int i = 0; i < count; ++i) grad[i] = -grad[i];
  }

  // Adds a row to its sums, lane by lane of a vector.
  FASTL2O_INLINE void add_row(const float* row, float* sums) const {
    Vec sum = load(sums);
    if (count == lanes) {
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
    read_out<V>(rule.meta + layout.average_decay, rule.meta + layout.square_decay, h,
                rule.config.param_size, average, square);
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

  // Features x (3S rows); new averages and squares.
  FASTL2O_INLINE void features(const float* grad, const float* rate, const float* h,
                               float* x) const {
    const HierarchicalConfig& config = rule.config;
    const int scales = config.num_scales;
    Vec average_decay[V] = {}, square_decay[V] = {};
    if (!block.first_step) decays(h, average_decay, square_decay);
    float* logs = x + (2 * scales - 1) * lanes;
    for (int s = 0; s < scales; ++s) {
      alignas(64) float average[lanes], square[lanes];
      read_row(config.averages_plane() + s, average);
      read_row(config.squares_plane() + s, square);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        const int o = v * kWidth;
        const Vec g = load(grad + o);
        const Vec a = fma(average_decay[v], load(average + o) - g, g);
        const Vec fresh = fma(a, a, splat(kSquareEps));
        const Vec q = fma(square_decay[v], load(square + o) - fresh, fresh);
        store(average + o, a);
        store(square + o, q);
        const Vec lam = q + kRmsEps;
        store(x + s * lanes + o, a * reciprocal_root(lam));
        store(logs + s * lanes + o, lam);
        if (!block.first_step)
          average_decay[v] = average_decay[v] * reciprocal_root(average_decay[v]);
      }
      write_row(config.averages_plane() + s, average);
      write_row(config.squares_plane() + s, square);
    }
    int s = 0;
    for (; s + 2 <= scales; s += 2) scale_functions<2>(x + s * lanes, logs + s * lanes);
    if (s < scales) scale_functions<1>(x + s * lanes, logs + s * lanes);
    for (s = 1; s < scales; ++s)
      for (int o = 0; o < lanes; o += kWidth)
        store(x + (scales + s - 1) * lanes + o,
              load(x + s * lanes + o) * load(x + (s - 1) * lanes + o));
#pragma GCC unroll 8
    for (int o = 0; o < lanes; o += kWidth) {
      Vec sum = {};
      for (s = 0; s < scales; ++s) sum = sum + load(logs + s * lanes + o);
      const Vec mean = sum * (1.0f / float(scales));
      for (s = 0; s < scales; ++s) {
        float* row = logs + s * lanes + o;
        store(row, load(row) - mean);
      }
      store(x + (3 * scales - 1) * lanes + o, load(rate + o) - block.mean_log_rate);
    }
  }

  // h_next from rows h, x and, to be filled in, r h, one after the other.
  FASTL2O_INLINE void cell(float* rows, float* h_next) const {
    const int size = rule.config.param_size, inputs = rule.config.num_features();
    const float *h = rows, *x = rows + size * lanes;
    float* rh = rows + (size + inputs) * lanes;
    for_units(size, [&]<int R>(int unit) {
      Vec r[R * V];
      unit_rows<V, R>(rule.param_gates + unit, 2 * size, block.bias + unit, h, size + inputs, r);
      sigmoid_all(r);
#pragma GCC unroll 32
      for (int k = 0; k < R * V; ++k)
        store(rh + unit * lanes + k * kWidth, r[k] * load(h + unit * lanes + k * kWidth));
    });
    for_units(size, [&]<int R>(int unit) {
      Vec e[R * V], c[R * V], m[R * V];
      unit_rows<V, R>(rule.param_gates + size + unit, 2 * size, block.bias + size + unit, h,
                      size + inputs, e);
#pragma GCC unroll 32
      for (int k = 0; k < R * V; ++k) c[k] = e[k] * kSigmoidScale;
      sigmoid_exponentials(c, e);
      unit_rows<V, R>(rule.param_candidate + unit, size, block.bias + 2 * size + unit, x,
                      inputs + size, c);
#pragma GCC unroll 32
      for (int k = 0; k < R * V; ++k) c[k] = c[k] * kTanhScale;
      tanh_numerators(c, m);
      // u h + (1 - u) c with u = 1 / (1 + e) and c = m / (m + 2), over one denominator.
#pragma GCC unroll 32
      for (int k = 0; k < R * V; ++k) {
        const int o = unit * lanes + k * kWidth;
        const Vec bottom = m[k] + 2.0f;
        const Vec top = fma(e[k], m[k], load(h + o) * bottom);
        store(h_next + o, top * reciprocal(fma(e[k], bottom, bottom)));
      }
    });
  }

  void run(float* sums) const {
    const HierarchicalConfig& config = rule.config;
    const HierarchicalLayout& layout = rule.layout;
    const int size = config.param_size, inputs = config.num_features();
    alignas(64) float rows[(2 * kMaxUnits + kMaxFeatures) * lanes], h_next[kMaxUnits * lanes];
    alignas(64) float grad[lanes], rate[lanes], step[lanes], squared[lanes];
    float *h = rows, *x = rows + size * lanes;
    read_grad(grad);
    if (!Direct && options.stochastic_rounding)
      for (int i = 0; i < count; ++i) bases[i] = rounding_base(block.tensor->rounding_key, at + i);
    const FlushDenormals guard;
    for (int k = 0; k < size; ++k) read_row(k, h + k * lanes);
    read_row(config.log_rate_plane(), rate);
    features(grad, rate, h, x);
    cell(rows, h_next);
    Vec d[V] = {}, eta[V];
    for (int v = 0; v < V; ++v) eta[v] = splat(rule.meta[layout.rate_bias]);
    read_out<V>(rule.meta + layout.direction, rule.meta + layout.rate, h_next, size, d, eta);
    for (int s = 0; s < config.num_scales; ++s)
      for (int v = 0; v < V; ++v)
        d[v] = fma(splat(rule.meta[layout.shortcut + s]), load(x + s * lanes + v * kWidth), d[v]);
    for (int v = 0; v < V; ++v) {
      const int o = v * kWidth;
      const Vec old = load(rate + o);
      const Vec e = maximum(splat(-kLogRateLimit), minimum(splat(kLogRateLimit), old + eta[v]));
      store(step + o, exp_vec(e + rule.meta[layout.log_rate_offset]) * d[v]);
      store(rate + o, fma(splat(rule.rate_momentum), old - e, e));
      store(squared + o, d[v] * d[v]);
    }
    for (int k = 0; k < size; ++k) {
      write_row(k, h_next + k * lanes);
      add_row(h_next + k * lanes, sums + k * kWidth);
    }
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

// Coordinates whose sums are added in float32 before they go to float64.
inline constexpr int64_t kSumSpan = 2048;

static void sweep_block(const PackedHierarchical& rule, const HierarchicalOptions& options,
                        const SweepBlock& block) {
  constexpr int V = kSweepVectors;
  const int num_sums = rule.config.num_sums();
  alignas(64) float sums[(kMaxUnits + kMaxFeatures + 2) * kWidth];
  uint32_t bases[kLanes<V>];
  const bool direct = options.planes_dtype == DType::f32;
  for (int k = 0; k < num_sums; ++k) block.sums[k] = 0.0;
  for (int64_t first = block.first; first < block.last; first += kSumSpan) {
    const int64_t last = block.last - first < kSumSpan ? block.last : first + kSumSpan;
    __builtin_memset(sums, 0, sizeof(float) * num_sums * kWidth);
    int64_t at = first;
    for (; direct && at + kLanes<V> <= last; at += kLanes<V>)
      SweepTile<V, true>{rule, options, block, at, kLanes<V>, bases}.run(sums);
    for (; last - at > kWidth; at += kLanes<V>) {
      const int count = int(last - at < kLanes<V> ? last - at : kLanes<V>);
      SweepTile<V, false>{rule, options, block, at, count, bases}.run(sums);
    }
    if (at < last) SweepTile<1, false>{rule, options, block, at, int(last - at), bases}.run(sums);
    for (int k = 0; k < num_sums; ++k)
      for (int lane = 0; lane < kWidth; ++lane) block.sums[k] += double(sums[k * kWidth + lane]);
  }
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
