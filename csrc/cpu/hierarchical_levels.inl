// The levels above the parameters: one column at a time, vectors along the rows.

// sums (padded rows) += weight x, whose columns lie `stride` apart.
static void add_product(const float* weight, int rows, const float* x, int columns, float* sums) {
  const int stride = padded(rows);
  auto block = [&]<int R>(int row) {
    Vec sum[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sum[r] = load(sums + row + r * kWidth);
    for (int k = 0; k < columns; ++k) {
      const Vec input = splat(x[k]);
      const float* column = weight + int64_t(k) * stride + row;
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[r] = fma(input, load(column + r * kWidth), sum[r]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) store(sums + row + r * kWidth, sum[r]);
  };
  constexpr int wide = 2 * kPad / kWidth;
  int row = 0;
  for (; row + wide * kWidth <= stride; row += wide * kWidth) block.template operator()<wide>(row);
  for (; row < stride; row += kWidth) block.template operator()<1>(row);
}

static void level_affine(const PackedMatrix& matrix, const float* x, const float* injected,
                         float* out) {
  for (int r = 0; r < padded(matrix.rows); ++r)
    out[r] = matrix.bias[r] + (injected == nullptr ? 0.0f : injected[r]);
  add_product(matrix.weight, matrix.rows, x, matrix.columns, out);
}

static void level_gru(const PackedGru& gru, const float* x, const float* h, const float* injected,
                      float* out) {
  const int size = gru.size, gates = padded(2 * size), rows = padded(size);
  alignas(64) float ru[2 * kMaxUnits], c[kMaxUnits], rh[kMaxUnits];
  for (int r = 0; r < gates; ++r) ru[r] = gru.gates.bias[r];
  for (int r = 0; r < rows; ++r) c[r] = gru.candidate.bias[r];
  if (injected != nullptr) {
    for (int r = 0; r < 2 * size; ++r) ru[r] += injected[r];
    for (int r = 0; r < size; ++r) c[r] += injected[2 * size + r];
  }
  add_product(gru.gates.weight, 2 * size, x, gru.inputs, ru);
  add_product(gru.gates.weight + int64_t(gru.inputs) * gates, 2 * size, h, size, ru);
  for (int r = 0; r < gates; r += kWidth) {
    Vec value[1] = {load(ru + r)};
    sigmoid_all(value);
    store(ru + r, value[0]);
  }
  for (int r = 0; r < size; ++r) rh[r] = ru[r] * h[r];
  add_product(gru.candidate.weight, size, x, gru.inputs, c);
  add_product(gru.candidate.weight + int64_t(gru.inputs) * rows, size, rh, size, c);
  for (int r = 0; r < rows; r += kWidth) {
    Vec value[1] = {load(c + r)};
    tanh_all(value);
    store(c + r, value[0]);
  }
  for (int r = 0; r < size; ++r) out[r] = ru[size + r] * (h[r] - c[r]) + c[r];
}
