// The forward pass of a tile of V vectors of coordinates. Every buffer is planes of
// V * kWidth floats: row k of x is x + k * kLanes<V>.

template <int V>
inline constexpr int kLanes = V * kWidth;

// Rows of the packed forward weights: for each block of units, the bias and then, for each input
// and each hidden value k, the weights of gates i, f, g, o of each unit of the block. So the inner
// product reads them in order.
FASTL2O_INLINE int64_t packed_forward_floats(const RuleConfig& config) {
  int64_t total = 0;
  for (int layer = 0; layer < config.num_layers; ++layer)
    total +=
        4 * int64_t(config.hidden_size) * (1 + config.layer_inputs(layer) + config.hidden_size);
  return total;
}

static void pack_forward(const RuleConfig& config, const float* meta, float* packed) {
  const MetaLayout layout(config);
  const int hidden = config.hidden_size;
  for (int layer = 0; layer < config.num_layers; ++layer) {
    const int inputs = config.layer_inputs(layer);
    const float* weight_ih = meta + layout.weight_ih[layer];
    const float* weight_hh = meta + layout.weight_hh[layer];
    const float* bias = meta + layout.bias[layer];
    for (int unit = 0; unit < hidden; unit += kUnitBlock) {
      const int units = hidden - unit < kUnitBlock ? hidden - unit : kUnitBlock;
      for (int k = -1; k < inputs + hidden; ++k)
        for (int u = 0; u < units; ++u)
          for (int gate = 0; gate < 4; ++gate) {
            const int row = gate * hidden + unit + u;
            *packed++ = k < 0        ? bias[row]
                        : k < inputs ? weight_ih[int64_t(row) * inputs + k]
                                     : weight_hh[int64_t(row) * hidden + k - inputs];
          }
    }
  }
}

// Rows of a tile's lanes, `stride` floats apart: a buffer, or the planes of a tensor's state
// itself.
struct Rows {
  float* base;
  int64_t stride;

  FASTL2O_INLINE float* at(int row, int v) const { return base + row * stride + v * kWidth; }
};

// Where one layer's old and new state live. `h_next` is contiguous, for the layers above to read.
struct LayerState {
  float* h_in;  // (H) rows of kLanes
  Rows c_in;
  Rows c_out;     // may be c_in
  float* h_next;  // (H) rows of kLanes
  Rows h_out;     // the live step's state; unused when recording
  // Where the first block of units of the live step finds the old h, to copy it to h_in; without a
  // base h_in holds it.
  Rows h_from;
};

// Where the unroll keeps what the backward pass needs of one layer; unused by the live step.
struct GatePlanes {
  float* gates = nullptr;   // (4, H): i, f, candidate, o
  float* tanh_c = nullptr;  // (H)
};

// sum += weights x. `copy` also stores the rows of x there: the first use of the old h is the time
// to bring it together, since the multiply-adds hide where it comes from.
template <int V, int U, bool copying = false, typename Ahead>
FASTL2O_INLINE void accumulate(Vec (&sum)[4 * U][V], const float*& weights, const Rows& x, int rows,
                               Ahead& prefetch, float* copy = nullptr) {
  for (int k = 0; k < rows; ++k) {
    Vec input[V];
    for (int v = 0; v < V; ++v) {
      input[v] = load(x.at(k, v));
      if constexpr (copying) store(copy + k * kLanes<V> + v * kWidth, input[v]);
    }
    prefetch.advance();
#pragma GCC unroll 16
    for (int r = 0; r < 4 * U; ++r) {
      const Vec weight = splat(weights[r]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[r][v] = fma(weight, input[v], sum[r][v]);
    }
    weights += 4 * U;
  }
}

// The gates of U units from their preactivations: c' = sigmoid(f) c + sigmoid(i) tanh(g) over the
// common denominator (1 + e_i) (1 + e_f) bottom, with tanh(g) = top / bottom, and the exponential
// of o into h_next for outputs() below. `record` also keeps the activations; c' is computed by the
// same operations either way, so a replay repeats the live step's bits.
template <int V, int U, bool record>
FASTL2O_INLINE void gates(const Vec (&sum)[4 * U][V], const LayerState& state, int hidden, int unit,
                          const GatePlanes& planes) {
  constexpr int lanes = kLanes<V>;
  Vec exponentials[U][3 * V], tops[U * V], bottoms[U * V];
#pragma GCC unroll 2
  for (int u = 0; u < U; ++u) {
    Vec exponents[3 * V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      exponents[v] = sum[4 * u][v] * kSigmoidScale;
      exponents[V + v] = sum[4 * u + 1][v] * kSigmoidScale;
      exponents[2 * V + v] = sum[4 * u + 3][v] * kSigmoidScale;
    }
    sigmoid_exponentials(exponents, exponentials[u]);
  }
  Vec candidates[U * V];
#pragma GCC unroll 8
  for (int u = 0; u < U; ++u)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) candidates[u * V + v] = sum[4 * u + 2][v];
  tanh_fractions(candidates, tops, bottoms);
#pragma GCC unroll 8
  for (int u = 0; u < U; ++u)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const int at = (unit + u) * lanes + v * kWidth;
      const Vec e_i = exponentials[u][v], e_f = exponentials[u][V + v];
      const Vec top = tops[u * V + v], bottom = bottoms[u * V + v];
      const Vec without_f = fma(e_i, bottom, bottom);
      const Vec inverse = reciprocal(fma(without_f, e_f, without_f));
      const Vec c = fma(load(state.c_in.at(unit + u, v)), without_f, fma(top, e_f, top)) * inverse;
      store(state.c_out.at(unit + u, v), c);
      store(state.h_next + at, exponentials[u][2 * V + v]);
      if constexpr (record) {
        const Vec inverse_without_f = fma(inverse, e_f, inverse);
        store(planes.gates + at, inverse_without_f * bottom);
        store(planes.gates + hidden * lanes + at, inverse * without_f);
        store(planes.gates + 2 * hidden * lanes + at, inverse_without_f * fma(top, e_i, top));
      }
    }
}

// h' = sigmoid(o) tanh(c') for U units.
template <int V, int U, bool record>
FASTL2O_INLINE void outputs(const LayerState& state, int hidden, int unit,
                            const GatePlanes& planes) {
  Vec c[U * V], tops[U * V], bottoms[U * V];
#pragma GCC unroll 8
  for (int u = 0; u < U; ++u)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) c[u * V + v] = load(state.c_out.at(unit + u, v));
  tanh_fractions(c, tops, bottoms);
#pragma GCC unroll 8
  for (int u = 0; u < U; ++u)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const int at = (unit + u) * kLanes<V> + v * kWidth;
      const Vec e_o = load(state.h_next + at);
      const Vec top = tops[u * V + v], bottom = bottoms[u * V + v];
      const Vec inverse = reciprocal(fma(e_o, bottom, bottom));
      const Vec h = top * inverse;
      store(state.h_next + at, h);
      if constexpr (record) {
        store(planes.gates + 3 * hidden * kLanes<V> + at, inverse * bottom);
        store(planes.tanh_c + at, inverse * fma(top, e_o, top));
      } else {
        store(state.h_out.at(unit + u, v), h);
      }
    }
}

// Preactivations of U units, then their gates.
template <int V, int U, bool record, typename Ahead>
FASTL2O_INLINE const float* unit_block(const float* weights, const float* x, int inputs,
                                       const LayerState& state, int hidden, int unit,
                                       const GatePlanes& planes, Ahead& prefetch) {
  Vec sum[4 * U][V];
  for (int r = 0; r < 4 * U; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = splat(weights[r]);
  weights += 4 * U;
  NoPrefetch none;
  prefetch.start_block();
  accumulate<V, U>(sum, weights, Rows{const_cast<float*>(x), kLanes<V>}, inputs, none);
  if (!record && unit == 0 && state.h_from.base != nullptr)
    accumulate<V, U, true>(sum, weights, state.h_from, hidden, prefetch, state.h_in);
  else
    accumulate<V, U>(sum, weights, Rows{state.h_in, kLanes<V>}, hidden, prefetch);
  prefetch.finish_block();
  gates<V, U, record>(sum, state, hidden, unit, planes);
  return weights;
}

template <int V, bool record>
FASTL2O_INLINE void layer_outputs(const LayerState& state, int hidden, const GatePlanes& planes) {
  int unit = 0;
  for (; unit + 4 <= hidden; unit += 4) outputs<V, 4, record>(state, hidden, unit, planes);
  for (; unit < hidden; ++unit) outputs<V, 1, record>(state, hidden, unit, planes);
}

// One layer: x (inputs rows) and the old state to the new state.
template <int V, bool record, typename Ahead>
static const float* layer_forward(const float* weights, const float* x, int inputs,
                                  const LayerState& state, int hidden, const GatePlanes& planes,
                                  Ahead& prefetch) {
  int unit = 0;
  for (; unit + kUnitBlock <= hidden; unit += kUnitBlock) {
    weights = unit_block<V, kUnitBlock, record>(weights, x, inputs, state, hidden, unit, planes,
                                                prefetch);
  }
  for (; unit < hidden; ++unit)
    weights = unit_block<V, 1, record>(weights, x, inputs, state, hidden, unit, planes, prefetch);
  layer_outputs<V, record>(state, hidden, planes);
  return weights;
}

// out = weight . x + bias over `rows` rows.
template <int V>
FASTL2O_INLINE void dense_row(const float* weight, float bias, const float* x, int rows,
                              Vec (&out)[V]) {
  for (int v = 0; v < V; ++v) out[v] = splat(bias);
  for (int k = 0; k < rows; ++k)
    for (int v = 0; v < V; ++v)
      out[v] = fma(splat(weight[k]), load(x + k * kLanes<V> + v * kWidth), out[v]);
}

// LSTM rule: the one or two inputs of specs "gradient preprocessing" (arXiv 1606.04474, appendix
// A).
template <int V>
FASTL2O_INLINE void gradient_features(const RuleConfig& config, float exp_p, const float* grad,
                                      float* x) {
  for (int v = 0; v < V; ++v) {
    const Vec g = load(grad + v * kWidth);
    if (!config.log_sign) {
      store(x + v * kWidth, g);
      continue;
    }
    const Vec magnitude = log_vec(absolute(g) + config.eps) / float(config.p);
    store(x + v * kWidth, maximum(splat(-1.0f), magnitude));
    store(x + kLanes<V> + v * kWidth, maximum(splat(-1.0f), minimum(splat(1.0f), g * exp_p)));
  }
}

struct MomentDecay {
  float beta1, beta2, one_minus_beta1, one_minus_beta2;

  explicit MomentDecay(const RuleConfig& config)
      : beta1(float(config.beta1)),
        beta2(float(config.beta2)),
        one_minus_beta1(float(1.0 - config.beta1)),
        one_minus_beta2(float(1.0 - config.beta2)) {}
};

struct MomentCorrection {
  float first, second;  // 1 / (1 - beta^t), t = 1 at the first step

  MomentCorrection(const RuleConfig& config, double t)
      : first(float(1.0 / (1.0 - __builtin_pow(config.beta1, t)))),
        second(float(1.0 / (1.0 - __builtin_pow(config.beta2, t)))) {}
};

// RNNprop: m, v and the scaled gradient and momentum (arXiv 1703.03633, section 4.2).
FASTL2O_INLINE void moment_features(const MomentDecay& decay, Vec correction1, Vec correction2,
                                    Vec g, Vec& m, Vec& v, Vec& g_scaled, Vec& m_scaled) {
  m = fma(splat(decay.one_minus_beta1), g, m * decay.beta1);
  v = fma(g * decay.one_minus_beta2, g, v * decay.beta2);
  const Vec root = square_root(v * correction2) + 1e-8f;
  g_scaled = g / root;
  m_scaled = (m * correction1) / root;
}

// z = ELU(P x + b), the first layer's inputs.
template <int V>
FASTL2O_INLINE void project(const float* weight, const float* bias, const float* x, float* z,
                            int hidden) {
  for (int k = 0; k < hidden; ++k) {
    Vec out[V];
    dense_row<V>(weight + 2 * k, bias[k], x, 2, out);
    for (int v = 0; v < V; ++v) store(z + k * kLanes<V> + v * kWidth, elu(out[v]));
  }
}
