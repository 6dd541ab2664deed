// A layer whose weights are read where the meta-parameters lie. Packing them takes as long as a
// step of ten coordinates does, which is too long where each set of them steps few. The products
// are added in the order of the packed layer, so both give the same bits.

struct LayerRows {
  const float* weight_ih;  // (4H, inputs), gates i, f, g, o
  const float* weight_hh;  // (4H, H)
  const float* bias;       // (4H)
};

// `weight`: the row of gate i of the first of U units; rows are `rows` long, gates H rows apart.
template <int V, int U>
FASTL2O_INLINE void accumulate_in_place(Vec (&sum)[4 * U][V], const float* weight, int hidden,
                                        const float* x, int rows) {
  const float* row[4 * U];
#pragma GCC unroll 16
  for (int r = 0; r < 4 * U; ++r) row[r] = weight + (int64_t(r % 4) * hidden + r / 4) * rows;
  for (int k = 0; k < rows; ++k) {
    Vec input[V];
    for (int v = 0; v < V; ++v) input[v] = load(x + k * kLanes<V> + v * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < 4 * U; ++r) {
      const Vec factor = splat(row[r][k]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[r][v] = fma(factor, input[v], sum[r][v]);
    }
  }
}

template <int V, int U>
FASTL2O_INLINE void unit_block_in_place(const LayerRows& weights, const float* x, int inputs,
                                        const LayerState& state, int hidden, int unit) {
  Vec sum[4 * U][V];
#pragma GCC unroll 16
  for (int r = 0; r < 4 * U; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = splat(weights.bias[r % 4 * hidden + unit + r / 4]);
  accumulate_in_place<V, U>(sum, weights.weight_ih + int64_t(unit) * inputs, hidden, x, inputs);
  accumulate_in_place<V, U>(sum, weights.weight_hh + int64_t(unit) * hidden, hidden, state.h_in,
                            hidden);
  gates<V, U, false>(sum, state, hidden, unit, GatePlanes{});
}

template <int V>
static void layer_in_place(const LayerRows& weights, const float* x, int inputs,
                           const LayerState& state, int hidden, Prefetch& prefetch) {
  int unit = 0;
  for (; unit + kUnitBlock <= hidden; unit += kUnitBlock) {
    prefetch.start_block();
    prefetch.finish_block();
    unit_block_in_place<V, kUnitBlock>(weights, x, inputs, state, hidden, unit);
  }
  for (; unit < hidden; ++unit) unit_block_in_place<V, 1>(weights, x, inputs, state, hidden, unit);
  layer_outputs<V, false>(state, hidden, GatePlanes{});
}
