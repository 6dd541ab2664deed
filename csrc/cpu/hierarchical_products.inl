// What the tiles of the hierarchical rule's sweep multiply, and the sizes they do it for.

// The sizes of the parameters' level. Known to the compiler, the addresses of all rows and weights
// are constants: with the sizes of a rule at hand, a third of a tile's instructions were integer
// ones, which take turns with the products on the same ports.
template <int Units, int Scales>
struct KnownSizes {
  explicit KnownSizes(const HierarchicalConfig&) {}
  static constexpr int units() { return Units; }
  static constexpr int scales() { return Scales; }
  static constexpr int inputs() { return 3 * Scales - 1; }
};

using DefaultSizes = KnownSizes<HierarchicalConfig{}.param_size, HierarchicalConfig{}.num_scales>;

struct AnySizes {
  const HierarchicalConfig& config;
  explicit AnySizes(const HierarchicalConfig& own) : config(own) {}
  int units() const { return config.param_size; }
  int scales() const { return config.num_scales; }
  int inputs() const { return sweep_inputs(config); }
};

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
  const float* end = x + columns * kLanes<V>;
#pragma GCC unroll 2
  for (; x != end; x += kLanes<V>, weight += stride) {
    Vec input[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) input[v] = load(x + v * kWidth);
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
#pragma GCC unroll 10
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
