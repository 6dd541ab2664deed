// The pieces of the backward pass of a tile: one cell, products with the transposed weights, and
// the weight gradients summed over a segment's steps and lanes.

inline constexpr int kTransposedBlock = FASTL2O_WIDTH == 16 ? 8 : 4;
// Columns of the weight gradient per block, beside four rows: fills the accumulators.
inline constexpr int kGradientColumns = FASTL2O_WIDTH == 16 ? 6 : 2;

// Blocks of columns of one matrix (rows, columns) of weights: within a block all rows in order.
static float* pack_columns(const float* matrix, int rows, int columns, float* packed) {
  for (int first = 0; first < columns;) {
    const int block = columns - first >= kTransposedBlock ? kTransposedBlock : 1;
    for (int row = 0; row < rows; ++row)
      for (int k = 0; k < block; ++k) *packed++ = matrix[int64_t(row) * columns + first + k];
    first += block;
  }
  return packed;
}

// The same weights as the forward ones, without the biases, so no longer.
static void pack_backward(const RuleConfig& config, const float* meta, float* packed) {
  const MetaLayout layout(config);
  const int rows = 4 * config.hidden_size;
  for (int layer = 0; layer < config.num_layers; ++layer) {
    packed = pack_columns(meta + layout.weight_hh[layer], rows, config.hidden_size, packed);
    packed = pack_columns(meta + layout.weight_ih[layer], rows, config.layer_inputs(layer), packed);
  }
}

template <int V, int B, bool add>
FASTL2O_INLINE const float* transposed_block(const float* packed, const float* d, int rows,
                                             float* out) {
  Vec sum[B][V];
  for (int k = 0; k < B; ++k)
    for (int v = 0; v < V; ++v) sum[k][v] = add ? load(out + k * kLanes<V> + v * kWidth) : Vec{};
  for (int row = 0; row < rows; ++row) {
    Vec value[V];
    for (int v = 0; v < V; ++v) value[v] = load(d + row * kLanes<V> + v * kWidth);
#pragma GCC unroll 8
    for (int k = 0; k < B; ++k) {
      const Vec weight = splat(packed[k]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[k][v] = fma(weight, value[v], sum[k][v]);
    }
    packed += B;
  }
  for (int k = 0; k < B; ++k)
    for (int v = 0; v < V; ++v) store(out + k * kLanes<V> + v * kWidth, sum[k][v]);
  return packed;
}

// out (columns) = or += matrix^T d (rows), for a matrix packed by pack_columns.
template <int V, bool add>
static void transposed_product(const float* packed, const float* d, int rows, int columns,
                               float* out) {
  int first = 0;
  for (; first + kTransposedBlock <= columns; first += kTransposedBlock)
    packed = transposed_block<V, kTransposedBlock, add>(packed, d, rows, out + first * kLanes<V>);
  for (; first < columns; ++first)
    packed = transposed_block<V, 1, add>(packed, d, rows, out + first * kLanes<V>);
}

// Turns the recorded activations of one layer into dL/d(preactivations), in place, and dL/dc of
// this step into that of the step before.
template <int V>
static void cell_backward(float* gates, const float* tanh_c, const float* c_before, const float* dh,
                          float* dc, int hidden) {
  const int stride = hidden * kLanes<V>;
  for (int at = 0; at < stride; at += kWidth) {
    const Vec i = load(gates + at), f = load(gates + stride + at);
    const Vec cand = load(gates + 2 * stride + at), o = load(gates + 3 * stride + at);
    const Vec th = load(tanh_c + at), d_h = load(dh + at);
    const Vec d_c = fma(d_h * o, 1.0f - th * th, load(dc + at));
    store(gates + at, d_c * cand * (i * (1.0f - i)));
    store(gates + stride + at, d_c * load(c_before + at) * (f * (1.0f - f)));
    store(gates + 2 * stride + at, d_c * i * (1.0f - cand * cand));
    store(gates + 3 * stride + at, d_h * th * (o * (1.0f - o)));
    store(dc + at, d_c * f);
  }
}

FASTL2O_INLINE float sum_lanes(Vec x) {
#if FASTL2O_WIDTH == 16
  return _mm512_reduce_add_ps((__m512)x);
#else
  float part[kWidth];
  store(part, x);
  for (int half = kWidth / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) part[lane] += part[lane + half];
  return part[0];
#endif
}

// Planes of successive steps: row r of step t is base + t * step_stride + r * kLanes<V>.
struct StepPlanes {
  const float* base;
  int64_t step_stride;
};

template <int V, int R, int C>
FASTL2O_INLINE void gradient_block(StepPlanes d, StepPlanes x, int64_t steps, double* out,
                                   int columns) {
  Vec sum[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sum[r][c] = Vec{};
  for (int64_t t = 0; t < steps; ++t) {
    const float* d_row = d.base + t * d.step_stride;
    const float* x_row = x.base + t * x.step_stride;
#pragma GCC unroll 1
    for (int v = 0; v < V; ++v) {
      Vec left[R];
      for (int r = 0; r < R; ++r) left[r] = load(d_row + r * kLanes<V> + v * kWidth);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        const Vec right = load(x_row + c * kLanes<V> + v * kWidth);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sum[r][c] = fma(left[r], right, sum[r][c]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) out[r * columns + c] += double(sum_lanes(sum[r][c]));
}

template <int V, int R>
FASTL2O_INLINE void gradient_columns(StepPlanes d, StepPlanes x, int first, int count,
                                     int64_t steps, double* out, int columns) {
  x.base += first * kLanes<V>;
  out += first;
  if (count == kGradientColumns) {
    gradient_block<V, R, kGradientColumns>(d, x, steps, out, columns);
    return;
  }
  for (int c = 0; c < count; ++c, x.base += kLanes<V>, ++out)
    gradient_block<V, R, 1>(d, x, steps, out, columns);
}

// out (rows, columns) += sum over steps and lanes of d x^T.
template <int V>
static void weight_gradient(StepPlanes d, int rows, StepPlanes x, int columns, int64_t steps,
                            double* out) {
  for (int first = 0; first < columns; first += kGradientColumns) {
    const int count = columns - first < kGradientColumns ? columns - first : kGradientColumns;
    StepPlanes left = d;
    double* own = out;
    int row = 0;
    for (; row + 4 <= rows; row += 4, left.base += 4 * kLanes<V>, own += 4 * columns)
      gradient_columns<V, 4>(left, x, first, count, steps, own, columns);
    for (; row < rows; ++row, left.base += kLanes<V>, own += columns)
      gradient_columns<V, 1>(left, x, first, count, steps, own, columns);
  }
}

// out (rows) += sum over steps and lanes of d.
template <int V>
static void bias_gradient(StepPlanes d, int rows, int64_t steps, double* out) {
  for (int row = 0; row < rows; ++row) {
    Vec sum{};
    for (int64_t t = 0; t < steps; ++t)
      for (int v = 0; v < V; ++v)
        sum += load(d.base + t * d.step_stride + row * kLanes<V> + v * kWidth);
    out[row] += double(sum_lanes(sum));
  }
}
