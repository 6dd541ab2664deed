// The derivative of the first sweep on a panel: activations are recomputed from the planes before
// the step. With y = d / rms, step = -exp(eta + o) y and y' = dL/dy:
//   d' = (y' - y mean(y' y)) / rms,  eta' += step' step,
//   beta_s = beta^(1/2^s):  d beta_s / d logit = beta_s (1 - beta) / 2^s.

struct Panel {
  const PackedHierarchical& rule;
  const BackwardBlock& block;
  int64_t at;            // first coordinate
  int count;             // coordinates
  int lanes;             // the same up to whole vectors; those beyond the count are kept at zero
  float *h, *x, *rh;     // (H), (F), (H), one after the other
  float *r, *u, *c;      // (H) each, one after the other
  float *dr, *du, *dc;   // of their arguments: the same
  float* h_next;         // (H)
  float* d_planes;       // (P)
  float *dh, *dx, *drh;  // (H), (F), (H), one after the other
  float *grad, *rate, *d_update, *step, *average_decay, *square_decay, *d_eta, *d_direction;
  float *average0, *square0, *average, *square, *ratio, *decay;  // (S) each

  static int rows(const HierarchicalConfig& c) {
    return 11 * c.param_size + 2 * c.num_features() + c.state_planes() + 8 + 6 * c.num_scales;
  }

  Panel(const PackedHierarchical& own_rule, const BackwardBlock& own_block, float* scratch)
      : rule(own_rule), block(own_block), at(0), count(0), lanes(0) {
    const HierarchicalConfig& config = rule.config;
    const int size = config.param_size, inputs = config.num_features();
    auto take = [&scratch](int rows) {
      float* own = scratch;
      scratch += rows * kPanel;
      return own;
    };
    h = take(size), x = take(inputs), rh = take(size);
    r = take(size), u = take(size), c = take(size);
    dr = take(size), du = take(size), dc = take(size);
    h_next = take(size), d_planes = take(config.state_planes());
    dh = take(size), dx = take(inputs), drh = take(size);
    for (float** row :
         {&grad, &rate, &d_update, &step, &average_decay, &square_decay, &d_eta, &d_direction})
      *row = take(1);
    for (float** row : {&average0, &square0, &average, &square, &ratio, &decay})
      *row = take(config.num_scales);
  }

  float* sums(int row) const { return block.sums + int64_t(row) * kWidth; }

  // Lanes that hold no coordinate must add nothing to any sum.
  FASTL2O_INLINE void clear_unused(float* row, int o) const {
    for (int i = count - o < 0 ? 0 : count - o; i < kWidth; ++i) row[o + i] = 0.0f;
  }
  FASTL2O_INLINE void clear_unused(float* row) const {
    if (count < lanes) clear_unused(row, lanes - kWidth);
  }

  void read_row(const float* from, float* to) const {
    __builtin_memcpy(to, from + at, sizeof(float) * size_t(count));
    clear_unused(to);
  }

  void read() const {
    const HierarchicalConfig& config = rule.config;
    const int64_t n = block.numel;
    for (int k = 0; k < config.param_size; ++k) read_row(block.planes + k * n, h + k * kPanel);
    for (int s = 0; s < config.num_scales; ++s) {
      read_row(block.planes + (config.averages_plane() + s) * n, average0 + s * kPanel);
      read_row(block.planes + (config.squares_plane() + s) * n, square0 + s * kPanel);
    }
    read_row(block.planes + config.log_rate_plane() * n, rate);
    read_row(block.grad, grad);
    read_row(block.d_update, d_update);
    read_row(block.raw_step, step);
    for (int k = 0; k < config.state_planes(); ++k)
      read_row(block.d_planes + k * n, d_planes + k * kPanel);
  }

  void features() const {
    const HierarchicalConfig& config = rule.config;
    const float *meta = rule.meta, *average_weight = meta + rule.layout.average_decay,
                *square_weight = meta + rule.layout.square_decay;
    const int S = config.num_scales;
    for (int o = 0; o < lanes; o += kWidth) {
      Vec both[2] = {};
      if (!block.first_step) {
        both[0] = splat(meta[rule.layout.average_decay_bias]);
        both[1] = splat(meta[rule.layout.square_decay_bias]);
        for (int k = 0; k < config.param_size; ++k) {
          const Vec value = load(h + k * kPanel + o);
          both[0] = fma(splat(average_weight[k]), value, both[0]);
          both[1] = fma(splat(square_weight[k]), value, both[1]);
        }
        sigmoid_all(both);
      }
      store(average_decay + o, both[0]);
      store(square_decay + o, both[1]);
      const Vec g = bounded_gradient(load(grad + o));
      Vec log_sum = {};
      for (int s = 0; s < S; ++s) {
        const int row = s * kPanel + o;
        const Vec a = fma(both[0], load(average0 + row) - g, g);
        const Vec fresh = fma(a, a, splat(kSquareEps));
        const Vec lam = fma(both[1], load(square0 + row) - fresh, fresh) + kRmsEps;
        const Vec quotient = a * reciprocal_root(lam);
        Vec m[1] = {quotient}, log_square[1] = {lam};
        asinh_all(m);
        log_all<false>(log_square);
        store(decay + row, both[0]);
        store(average + row, a);
        store(square + row, lam);
        store(ratio + row, quotient);
        store(x + row, m[0]);
        if (s > 0) store(x + (S - 1) * kPanel + row, m[0] * load(x + row - kPanel));
        store(x + (2 * S - 1) * kPanel + row, log_square[0]);
        log_sum = log_sum + log_square[0];
        if (!block.first_step) both[0] = both[0] * reciprocal_root(both[0]);
      }
      const Vec mean = log_sum * (1.0f / float(S));
      for (int s = 0; s < S; ++s) {
        float* row = x + (2 * S - 1 + s) * kPanel + o;
        store(row, load(row) - mean);
      }
      store(x + (3 * S - 1) * kPanel + o, load(rate + o) - block.mean_log_rate);
    }
  }

  void cell() const {
    const int size = rule.config.param_size, inputs = rule.config.num_features();
    for_units(2 * size, [&]<int R>(int unit) {
      for (int o = 0; o < lanes; o += kWidth) {
        Vec sum[R];
        panel_rows(rule.param_gates + unit, 2 * size, block.bias + unit, h, size + inputs, o, sum);
        sigmoid_all(sum);
        for (int k = 0; k < R; ++k) store(r + (unit + k) * kPanel + o, sum[k]);
      }
    });
    for (int k = 0; k < size; ++k)
      for (int o = k * kPanel; o < k * kPanel + lanes; o += kWidth)
        store(rh + o, load(r + o) * load(h + o));
    for_units(size, [&]<int R>(int unit) {
      for (int o = 0; o < lanes; o += kWidth) {
        Vec sum[R];
        panel_rows(rule.param_candidate + unit, size, block.bias + 2 * size + unit, x,
                   inputs + size, o, sum);
        tanh_all(sum);
        for (int k = 0; k < R; ++k) {
          const int row = (unit + k) * kPanel + o;
          store(c + row, sum[k]);
          store(h_next + row, fma(load(u + row), load(h + row) - sum[k], sum[k]));
        }
      }
    });
  }

  // Update, log rate and the two readouts of the new h.
  void readouts_backward() const {
    const HierarchicalConfig& config = rule.config;
    const HierarchicalLayout& layout = rule.layout;
    const HierarchicalSums offsets(config);
    const float* meta = rule.meta;
    const int size = config.param_size;
    float* d_rate = d_planes + config.log_rate_plane() * kPanel;
    Vec d_offset = {}, d_momentum = {};
    for (int o = 0; o < lanes; o += kWidth) {
      Vec eta = splat(meta[layout.rate_bias]);
      for (int k = 0; k < size; ++k)
        eta = fma(splat(meta[layout.rate + k]), load(h_next + k * kPanel + o), eta);
      const Vec old = load(rate + o);
      eta = maximum(splat(-kLogRateLimit), minimum(splat(kLogRateLimit), old + eta));
      const Vec scale = exp_vec(eta + meta[layout.log_rate_offset]);
      // The forward pass's own direction: what is left of dL/dd in a tensor of few coordinates is a
      // difference that another rounding of a small d would not leave.
      const Vec d = load(step + o) / scale;
      const Vec upstream = load(d_update + o), y = d * block.inverse_rms;
      const Vec through_step = -(upstream * load(step + o)) * block.inverse_rms;
      d_offset = d_offset + through_step;
      store(d_direction + o, (-(scale * upstream) - y * block.mean_product) * block.inverse_rms);
      store(d_rate + o, load(d_rate + o) + block.rate_shift);
      if (o + kWidth > count) clear_unused(d_direction, o), clear_unused(d_rate, o);
      const Vec new_rate = load(d_rate + o);
      d_momentum = fma(new_rate, old - eta, d_momentum);
      const Vec both = fma(splat(1.0f - rule.rate_momentum), new_rate, through_step);
      store(d_eta + o, both);
      store(d_rate + o, fma(splat(rule.rate_momentum), new_rate, both));
    }
    const Vec slope = splat(rule.rate_momentum * (1.0f - rule.rate_momentum));
    store(sums(offsets.rate_momentum), fma(slope, d_momentum, load(sums(offsets.rate_momentum))));
    store(sums(offsets.log_rate_offset), load(sums(offsets.log_rate_offset)) + d_offset);
    add_lanes(d_eta, lanes, sums(offsets.rate + size));
    add_outer(d_direction, 1, h_next, size, lanes, sums(offsets.direction));
    add_outer(d_direction, 1, x, config.num_scales, lanes, sums(offsets.shortcut));
    add_outer(d_eta, 1, h_next, size, lanes, sums(offsets.rate));
  }

  // From dL/dh' to the arguments of the gates, to the features and to h.
  void cell_backward() const {
    const HierarchicalConfig& config = rule.config;
    const HierarchicalSums offsets(config);
    const int size = config.param_size, inputs = config.num_features();
    const float *direction = rule.meta + rule.layout.direction,
                *rate_weight = rule.meta + rule.layout.rate;
    for (int k = 0; k < size; ++k)
      for (int o = 0; o < lanes; o += kWidth) {
        const int row = k * kPanel + o;
        Vec d = load(d_planes + row) + block.d_means[k];
        d = fma(splat(direction[k]), load(d_direction + o), d);
        store(dh + row, fma(splat(rate_weight[k]), load(d_eta + o), d));
        if (o + kWidth > count) clear_unused(dh + k * kPanel, o);
        d = load(dh + row);
        const Vec gate = load(u + row), candidate = load(c + row);
        store(dc + row, d * (1.0f - gate) * (1.0f - candidate * candidate));
        store(du + row, d * (load(h + row) - candidate) * gate * (1.0f - gate));
        store(dh + row, d * gate);
      }
    __builtin_memset(dx, 0, sizeof(float) * size_t((inputs + size) * kPanel));
    add_transposed(rule.param_candidate, size, dc, size, inputs + size, lanes, dx);
    for (int k = 0; k < size; ++k)
      for (int o = k * kPanel; o < k * kPanel + lanes; o += kWidth) {
        const Vec d = load(drh + o), gate = load(r + o);
        store(dr + o, d * load(h + o) * gate * (1.0f - gate));
        store(dh + o, fma(d, gate, load(dh + o)));
      }
    add_transposed(rule.param_gates, 2 * size, dr, 2 * size, size + inputs, lanes, dh);
    add_outer(dr, 2 * size, h, size + inputs, lanes, sums(0));
    add_outer(dc, size, x, inputs + size, lanes, sums(offsets.candidate));
  }

#include "hierarchical_features_backward.inl"

  void run(int64_t first, int64_t number, float* step_sums) {
    at = first;
    count = int(number);
    lanes = (count + kWidth - 1) / kWidth * kWidth;
    read();
    features();
    cell();
    readouts_backward();
    cell_backward();
    features_backward(step_sums + 3 * rule.config.param_size * kWidth);
    for (int k = 0; k < 3 * rule.config.param_size; ++k)
      add_lanes(dr + k * kPanel, lanes, step_sums + k * kWidth);
    for (int k = 0; k < rule.config.state_planes(); ++k)
      __builtin_memcpy(block.d_planes + k * block.numel + at, d_planes + k * kPanel,
                       sizeof(float) * size_t(count));
  }
};

static int64_t backward_scratch(const HierarchicalConfig& config) {
  return int64_t(Panel::rows(config)) * kPanel;
}

static void backward_block(const PackedHierarchical& rule, const BackwardBlock& block,
                           float* scratch) {
  const FlushDenormals guard;
  const int num_sums = 3 * rule.config.param_size + 1;
  alignas(64) float step_sums[(3 * kMaxUnits + 1) * kWidth] = {};
  Panel panel(rule, block, scratch);
  for (int64_t at = block.first; at < block.last; at += kPanel)
    panel.run(at, block.last - at < kPanel ? block.last - at : kPanel, step_sums);
  for (int k = 0; k < num_sums; ++k) {
    block.step_sums[k] = 0.0;
    for (int lane = 0; lane < kWidth; ++lane)
      block.step_sums[k] += double(step_sums[k * kWidth + lane]);
  }
}
