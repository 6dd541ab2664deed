// Inside Panel (hierarchical_backward.inl): from the features to the old planes and to the decays.

// dL/dx of feature k, with what comes through the tensor's means; unused lanes hold that too.
FASTL2O_INLINE Vec d_feature(int k, int o) const {
  return load(dx + k * kPanel + o) + block.d_means[rule.config.param_size + k];
}

void features_backward(float* d_centred) const {
  const HierarchicalConfig& config = rule.config;
  const float* shortcut = rule.meta + rule.layout.shortcut;
  const int S = config.num_scales;
  float* d_rate = d_planes + config.log_rate_plane() * kPanel;
  // Two rows that are free by now.
  float *d_average_logit = d_eta, *d_square_logit = step;
  for (int o = 0; o < lanes; o += kWidth) {
    alignas(64) float last[kWidth];
    store(last, d_feature(3 * S - 1, o));
    if (o + kWidth > count)
      for (int i = count - o; i < kWidth; ++i) last[i] = 0.0f;
    store(d_centred, load(d_centred) + load(last));
    store(d_rate + o, load(d_rate + o) + load(last));
    Vec mean = {}, d_square_decay = {}, d_average_decay = {};
    for (int s = 0; s < S; ++s) mean = mean + d_feature(2 * S - 1 + s, o);
    mean = mean * (1.0f / float(S));
    const Vec g = bounded_gradient(load(grad + o)), kept = load(square_decay + o);
    float power = 1.0f;
    for (int s = 0; s < S; ++s, power *= 0.5f) {
      const int row = s * kPanel + o;
      Vec dm = fma(splat(shortcut[s]), load(d_direction + o), d_feature(s, o));
      if (s + 1 < S) dm = fma(d_feature(S + s, o), load(x + row + kPanel), dm);
      if (s > 0) dm = fma(d_feature(S + s - 1, o), load(x + row - kPanel), dm);
      const Vec a = load(average + row), quotient = load(ratio + row);
      const Vec inverse_root = reciprocal_root(load(square + row));
      const Vec d_quotient = dm * reciprocal_root(fma(quotient, quotient, splat(1.0f)));
      float* d_square = d_planes + config.squares_plane() * kPanel + row;
      float* d_average = d_planes + config.averages_plane() * kPanel + row;
      const Vec d_log = d_feature(2 * S - 1 + s, o) - mean - 0.5f * d_quotient * quotient;
      const Vec ds = fma(d_log * inverse_root, inverse_root, load(d_square));
      const Vec da = load(d_average) + d_quotient * inverse_root + ds * (1.0f - kept) * 2.0f * a;
      const Vec fresh = fma(a, a, splat(kSquareEps)), own_decay = load(decay + row);
      d_square_decay = fma(ds, load(square0 + row) - fresh, d_square_decay);
      d_average_decay = fma(da * (load(average0 + row) - g), own_decay * power, d_average_decay);
      store(d_square, ds * kept);
      store(d_average, da * own_decay);
    }
    store(d_average_logit + o, d_average_decay * (1.0f - load(average_decay + o)));
    store(d_square_logit + o, d_square_decay * kept * (1.0f - kept));
    if (o + kWidth > count) clear_unused(d_average_logit, o), clear_unused(d_square_logit, o);
  }
  decays_backward(d_average_logit, d_square_logit);
}

void decays_backward(const float* d_average_logit, const float* d_square_logit) const {
  const int size = rule.config.param_size;
  if (block.first_step) {
    __builtin_memcpy(d_planes, dh, sizeof(float) * size_t(size * kPanel));
    return;
  }
  const HierarchicalSums offsets(rule.config);
  const float *average_weight = rule.meta + rule.layout.average_decay,
              *square_weight = rule.meta + rule.layout.square_decay;
  for (int k = 0; k < size; ++k)
    for (int o = 0; o < lanes; o += kWidth) {
      const Vec d =
          fma(splat(average_weight[k]), load(d_average_logit + o), load(dh + k * kPanel + o));
      store(d_planes + k * kPanel + o, fma(splat(square_weight[k]), load(d_square_logit + o), d));
    }
  add_lanes(d_average_logit, lanes, sums(offsets.average_decay + size));
  add_lanes(d_square_logit, lanes, sums(offsets.square_decay + size));
  add_outer(d_average_logit, 1, h, size, lanes, sums(offsets.average_decay));
  add_outer(d_square_logit, 1, h, size, lanes, sums(offsets.square_decay));
}
