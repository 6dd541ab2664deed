// Weight gradients of a tile: d x^T summed over lanes and steps, for the rows d of one layer and
// its input columns x. With d transposed to (lanes, rows) each is a product of a broadcast input
// with vectors of rows, so nothing is summed across lanes.

// Rows (in vectors) and columns per block: their product is the number of accumulators.
inline constexpr int kRowVectors = FASTL2O_WIDTH == 16 ? 5 : 2;
inline constexpr int kGradientColumns = 5;

FASTL2O_INLINE int64_t padded_rows(int64_t rows) { return (rows + kWidth - 1) / kWidth * kWidth; }

// Where each gradient lies in the sums: (columns, padded rows) for each layer, whose columns are
// the inputs, the hidden values and the bias; the projection's likewise; then the readout's weights
// and bias.
struct GradientLayout {
  int64_t layer[kMaxLayers], projection, readout, total;

  explicit GradientLayout(const RuleConfig& config) {
    int64_t at = 0;
    const int64_t hidden = config.hidden_size;
    for (int l = 0; l < config.num_layers; ++l) {
      layer[l] = at;
      at += padded_rows(4 * hidden) * (config.layer_inputs(l) + hidden + 1);
    }
    projection = at;
    if (config.is_rnnprop()) at += padded_rows(hidden) * (config.num_features() + 1);
    readout = at;
    total = at + padded_rows(config.readout_inputs() + 1);
  }
};

static int64_t gradient_sums(const RuleConfig& config) { return GradientLayout(config).total; }

// From the order of the sums to that of the meta-parameters.
static void unpack_gradient(const RuleConfig& config, const double* sums, float* d_meta) {
  const GradientLayout from(config);
  const MetaLayout to(config);
  auto matrix = [&](const double* columns, int64_t rows, int64_t count,
                    int64_t target) __attribute__((always_inline)) {
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t c = 0; c < count; ++c)
        d_meta[target + row * count + c] = float(columns[c * padded_rows(rows) + row]);
    return columns + count * padded_rows(rows);
  };
  const int64_t hidden = config.hidden_size, rows = 4 * hidden;
  for (int l = 0; l < config.num_layers; ++l) {
    const double* columns = sums + from.layer[l];
    columns = matrix(columns, rows, config.layer_inputs(l), to.weight_ih[l]);
    columns = matrix(columns, rows, hidden, to.weight_hh[l]);
    matrix(columns, rows, 1, to.bias[l]);
  }
  if (config.is_rnnprop()) {
    const double* columns = sums + from.projection;
    columns = matrix(columns, hidden, config.num_features(), to.projection_weight);
    matrix(columns, hidden, 1, to.projection_bias);
  }
  for (int k = 0; k < config.readout_inputs(); ++k)
    d_meta[to.readout_weight + k] = float(sums[from.readout + k]);
  d_meta[to.readout_bias] = float(sums[from.readout + config.readout_inputs()]);
}

// kWidth vectors of kWidth lanes, transposed: each round interleaves the halves of the list.
FASTL2O_INLINE void transpose(Vec (&x)[kWidth]) {
  IVec low, high;
  for (int lane = 0; lane < kWidth; ++lane) {
    low[lane] = lane / 2 + lane % 2 * kWidth;
    high[lane] = low[lane] + kWidth / 2;
  }
#pragma GCC unroll 8
  for (int round = 1; round < kWidth; round *= 2) {
    Vec next[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth / 2; ++i) {
      next[2 * i] = __builtin_shuffle(x[i], x[i + kWidth / 2], low);
      next[2 * i + 1] = __builtin_shuffle(x[i], x[i + kWidth / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) x[i] = next[i];
  }
}

#if FASTL2O_WIDTH == 16
// The same for whole vectors at `from`, `stride` floats apart: quarters of rows j, 4 + j, 8 + j and
// 12 + j are brought together by loads, which leaves two rounds for the one port that shuffles.
FASTL2O_INLINE void load_transposed(const float* from, int64_t stride, Vec (&x)[kWidth]) {
#pragma GCC unroll 4
  for (int quarter = 0; quarter < 4; ++quarter) {
    __m512 row[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const float* at = from + j * stride + 4 * quarter;
      row[j] = _mm512_castps128_ps512(_mm_loadu_ps(at));
      row[j] = _mm512_insertf32x4(row[j], _mm_loadu_ps(at + 4 * stride), 1);
      row[j] = _mm512_insertf32x4(row[j], _mm_loadu_ps(at + 8 * stride), 2);
      row[j] = _mm512_insertf32x4(row[j], _mm_loadu_ps(at + 12 * stride), 3);
    }
    const __m512d low01 = (__m512d)_mm512_unpacklo_ps(row[0], row[1]);
    const __m512d low23 = (__m512d)_mm512_unpacklo_ps(row[2], row[3]);
    const __m512d high01 = (__m512d)_mm512_unpackhi_ps(row[0], row[1]);
    const __m512d high23 = (__m512d)_mm512_unpackhi_ps(row[2], row[3]);
    x[4 * quarter] = (Vec)_mm512_unpacklo_pd(low01, low23);
    x[4 * quarter + 1] = (Vec)_mm512_unpackhi_pd(low01, low23);
    x[4 * quarter + 2] = (Vec)_mm512_unpacklo_pd(high01, high23);
    x[4 * quarter + 3] = (Vec)_mm512_unpackhi_pd(high01, high23);
  }
}
#else
FASTL2O_INLINE void load_transposed(const float* from, int64_t stride, Vec (&x)[kWidth]) {
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) x[i] = load(from + i * stride);
  transpose(x);
}
#endif

// planes (rows) of V vectors to (lanes, padded rows); the padding is zero.
template <int V>
static void transpose_planes(const float* planes, int64_t rows, float* transposed) {
  const int64_t stride = padded_rows(rows);
  for (int64_t row = 0; row < rows; row += kWidth)
    for (int v = 0; v < V; ++v) {
      Vec x[kWidth];
      const float* from = planes + row * kLanes<V> + v * kWidth;
      if (row + kWidth <= rows) {
        load_transposed(from, kLanes<V>, x);
      } else {
        for (int i = 0; i < kWidth; ++i) x[i] = row + i < rows ? load(from + i * kLanes<V>) : Vec{};
        transpose(x);
      }
      float* to = transposed + int64_t(v) * kWidth * stride + row;
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) store(to + i * stride, x[i]);
    }
}

// The sum over lanes starts from zero and is then added, so that rounding grows with the root of
// the number of lanes and steps, not of their product.
template <int V, int R, int C>
FASTL2O_INLINE void gradient_block(const float* d, int64_t stride, const float* x, float* sums) {
  Vec sum[C][R];
  for (int c = 0; c < C; ++c)
    for (int r = 0; r < R; ++r) sum[c][r] = Vec{};
#pragma GCC unroll 1
  for (int lane = 0; lane < kLanes<V>; ++lane, d += stride) {
    Vec rows[R];
    for (int r = 0; r < R; ++r) rows[r] = load(d + r * kWidth);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const Vec input = splat(x[c * kLanes<V> + lane]);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[c][r] = fma(input, rows[r], sum[c][r]);
    }
  }
  for (int c = 0; c < C; ++c)
    for (int r = 0; r < R; ++r) {
      float* own = sums + c * stride + r * kWidth;
      store(own, load(own) + sum[c][r]);
    }
}

template <int V, int R>
FASTL2O_INLINE void gradient_rows(const float* d, int64_t stride, const float* x, int columns,
                                  float* sums) {
  int c = 0;
  for (; c + kGradientColumns <= columns; c += kGradientColumns)
    gradient_block<V, R, kGradientColumns>(d, stride, x + c * kLanes<V>, sums + c * stride);
  // In pairs, as a single column would wait for its own sums.
  for (; c + 2 <= columns; c += 2)
    gradient_block<V, R, 2>(d, stride, x + c * kLanes<V>, sums + c * stride);
  for (; c < columns; ++c) gradient_block<V, R, 1>(d, stride, x + c * kLanes<V>, sums + c * stride);
}

// sums (columns, stride) += the sum over lanes of x (columns planes) times d (lanes, stride); the
// sums of the next columns follow.
template <int V>
static float* add_gradient(const float* d, int64_t stride, const float* x, int columns,
                           float* sums) {
  int64_t row = 0;
  for (; row + kRowVectors * kWidth <= stride; row += kRowVectors * kWidth)
    gradient_rows<V, kRowVectors>(d + row, stride, x, columns, sums + row);
  for (; row < stride; row += kWidth) gradient_rows<V, 1>(d + row, stride, x, columns, sums + row);
  return sums + columns * stride;
}

FASTL2O_INLINE float sum_lanes(const float* values, int count) {
  float sum = 0.0f;
  for (int lane = 0; lane < count; ++lane) sum += values[lane];
  return sum;
}
