// Products over the rows of a panel: kPanel coordinates, each quantity a row of that many floats.

inline constexpr int kPanel = 128;

template <int R>
FASTL2O_INLINE void panel_rows(const float* weight, int64_t stride, const float* bias,
                               const float* input, int columns, int at, Vec (&sum)[R]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) sum[r] = splat(bias[r]);
  for (int k = 0; k < columns; ++k) {
    const Vec value = load(input + k * kPanel + at);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sum[r] = fma(splat(weight[k * stride + r]), value, sum[r]);
  }
}

// to (columns) += weight^T d (rows), weight stored by columns `stride` apart.
static void add_transposed(const float* weight, int stride, const float* d, int rows, int columns,
                           int lanes, float* to) {
  auto block = [&]<int K>(int k) {
    for (int at = 0; at < lanes; at += kWidth) {
      Vec sum[K];
#pragma GCC unroll 8
      for (int j = 0; j < K; ++j) sum[j] = load(to + (k + j) * kPanel + at);
      for (int r = 0; r < rows; ++r) {
        const Vec value = load(d + r * kPanel + at);
#pragma GCC unroll 8
        for (int j = 0; j < K; ++j)
          sum[j] = fma(splat(weight[(k + j) * stride + r]), value, sum[j]);
      }
#pragma GCC unroll 8
      for (int j = 0; j < K; ++j) store(to + (k + j) * kPanel + at, sum[j]);
    }
  };
  int k = 0;
  for (; k + 8 <= columns; k += 8) block.template operator()<8>(k);
  for (; k < columns; ++k) block.template operator()<1>(k);
}

// sums (rows, columns, kWidth lanes) += a (rows) times b (columns), lane by lane.
static void add_outer(const float* a, int rows, const float* b, int columns, int lanes,
                      float* sums) {
  auto block = [&]<int R, int K>(int r, int k) {
    Vec sum[R * K];
#pragma GCC unroll 32
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < K; ++j)
        sum[i * K + j] = load(sums + ((r + i) * columns + k + j) * kWidth);
    for (int at = 0; at < lanes; at += kWidth) {
      Vec left[R];
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) left[i] = load(a + (r + i) * kPanel + at);
#pragma GCC unroll 8
      for (int j = 0; j < K; ++j) {
        const Vec right = load(b + (k + j) * kPanel + at);
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) sum[i * K + j] = fma(left[i], right, sum[i * K + j]);
      }
    }
#pragma GCC unroll 32
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < K; ++j)
        store(sums + ((r + i) * columns + k + j) * kWidth, sum[i * K + j]);
  };
  constexpr int wide = kWidth == 16 ? 5 : 3, deep = kWidth == 16 ? 4 : 3;
  int r = 0;
  for (; r + wide <= rows; r += wide) {
    int k = 0;
    for (; k + deep <= columns; k += deep) block.template operator()<wide, deep>(r, k);
    for (; k < columns; ++k) block.template operator()<wide, 1>(r, k);
  }
  for (; r < rows; ++r)
    for (int k = 0; k < columns; ++k) block.template operator()<1, 1>(r, k);
}

// sum (kWidth lanes) += row
FASTL2O_INLINE void add_lanes(const float* row, int lanes, float* sum) {
  Vec total = load(sum);
  for (int at = 0; at < lanes; at += kWidth) total = total + load(row + at);
  store(sum, total);
}
