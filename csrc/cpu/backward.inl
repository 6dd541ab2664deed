// The pieces of the backward pass of a tile: one cell, and products with the transposed weights.

// Columns per block of the transposed products; two blocks, not a block and single columns, make
// up 20.
inline constexpr int kTransposedBlock = FASTL2O_WIDTH == 16 ? 10 : 4;
FASTL2O_INLINE int transposed_columns(int left) {
  return left >= kTransposedBlock       ? kTransposedBlock
         : left >= kTransposedBlock / 2 ? kTransposedBlock / 2
                                        : 1;
}

// Blocks of columns of one matrix (rows, columns) of weights: within a block all rows in order.
static float* pack_columns(const float* matrix, int rows, int columns, float* packed) {
  for (int first = 0; first < columns;) {
    const int block = transposed_columns(columns - first);
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
#pragma GCC unroll 16
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
  for (int first = 0; first < columns;) {
    const int block = transposed_columns(columns - first);
    float* own = out + first * kLanes<V>;
    if (block == kTransposedBlock)
      packed = transposed_block<V, kTransposedBlock, add>(packed, d, rows, own);
    else if (block > 1)
      packed = transposed_block<V, kTransposedBlock / 2, add>(packed, d, rows, own);
    else
      packed = transposed_block<V, 1, add>(packed, d, rows, own);
    first += block;
  }
}

// dL/d(preactivations), (4, H) planes, from the recorded activations of one layer; dL/dc of this
// step becomes that of the step before.
template <int V>
static void cell_backward(const float* gates, const float* tanh_c, const float* c_before,
                          const float* dh, float* dc, float* d_gates, int hidden) {
  const int stride = hidden * kLanes<V>;
  for (int at = 0; at < stride; at += kWidth) {
    const Vec i = load(gates + at), f = load(gates + stride + at);
    const Vec cand = load(gates + 2 * stride + at), o = load(gates + 3 * stride + at);
    const Vec th = load(tanh_c + at), d_h = load(dh + at);
    const Vec d_c = fma(d_h * o, 1.0f - th * th, load(dc + at));
    store(d_gates + at, d_c * cand * (i * (1.0f - i)));
    store(d_gates + stride + at, d_c * load(c_before + at) * (f * (1.0f - f)));
    store(d_gates + 2 * stride + at, d_c * i * (1.0f - cand * cand));
    store(d_gates + 3 * stride + at, d_h * th * (o * (1.0f - o)));
    store(dc + at, d_c * f);
  }
}
