// Members of UnrollTile: from dL/d(first layer's inputs) back to the gradient and the moments.

// Through ELU, the projection and the moment averages to g, m and v.
void rnnprop_features_backward(int64_t t, const float* after) const {
  const float* z = after + record.z * lanes;
  float* d_projection = d_gates;
  for (int64_t at = 0; at < int64_t(hidden) * lanes; at += kWidth) {
    const Vec out = load(z + at), d = load(dx + at);
    store(d_projection + at, out > 0.0f ? d : d * (out + 1.0f));
  }
  add_columns(hidden, sums + GradientLayout(config).projection,
              {{after + record.features * lanes, config.num_features()}});
  const float* weight = context.meta + layout.projection_weight;
  const MomentCorrection correction(config, args.first_step + double(t) + 1.0);
  alignas(64) float grad[lanes];
  load_row(args.grads + t * total, grad);
  for (int at = 0; at < lanes; at += kWidth) {
    Vec d_g_scaled{}, d_m_scaled{};
    for (int k = 0; k < hidden; ++k) {
      const Vec d = load(d_projection + k * lanes + at);
      d_g_scaled = fma(splat(weight[2 * k]), d, d_g_scaled);
      d_m_scaled = fma(splat(weight[2 * k + 1]), d, d_m_scaled);
    }
    const float* x = after + record.features * lanes + at;
    const Vec v = load(after + (record.moments + 1) * lanes + at);
    const Vec root = square_root(v * correction.second), divisor = root + 1e-8f;
    const Vec d_divisor = -(d_g_scaled * load(x) + d_m_scaled * load(x + lanes)) / divisor;
    // The square root has no slope at zero; there v is zero because every gradient was.
    const Vec d_v = root == 0.0f ? Vec{} : d_divisor * (0.5f * correction.second) / root;
    float* d_m_total = d_moments + at;
    float* d_v_total = d_moments + lanes + at;
    const Vec m_sum = load(d_m_total) + d_m_scaled * correction.first / divisor;
    const Vec v_sum = load(d_v_total) + d_v;
    if (args.d_grads != nullptr) {
      const Vec d_g = d_g_scaled / divisor + m_sum * decay.one_minus_beta1 +
                      v_sum * load(grad + at) * (2.0f * decay.one_minus_beta2);
      store(grad + at, d_g);
    }
    store(d_m_total, m_sum * decay.beta1);
    store(d_v_total, v_sum * decay.beta2);
  }
  if (args.d_grads != nullptr) store_row(grad, args.d_grads + t * total);
}

// dx1/dg = 1 / (p g) where |g| > e^-p, dx2/dg = e^p below; both zero where their clip is active.
void log_sign_backward(int64_t t) const {
  alignas(64) float grad[lanes];
  load_row(args.grads + t * total, grad);
  for (int at = 0; at < lanes; at += kWidth) {
    const Vec g = load(grad + at);
    Vec d_g = load(dx + at);
    if (config.log_sign) {
      const Vec shifted = absolute(g) + config.eps;
      const IVec logarithmic = log_vec(shifted) / float(config.p) >= -1.0f;
      const Vec sign = from_bits(bits(splat(1.0f)) | (bits(g) & isplat(int(0x80000000u))));
      const Vec slope = sign / (shifted * float(config.p));
      const IVec linear = absolute(g * context.exp_p) <= 1.0f;
      // Slopes are selected before the product, so that NaN gets through.
      const Vec log_slope = logarithmic & (g != 0.0f) ? slope : Vec{};
      const Vec linear_slope = linear ? splat(context.exp_p) : Vec{};
      d_g = d_g * log_slope + load(dx + lanes + at) * linear_slope;
    }
    store(grad + at, d_g);
  }
  store_row(grad, args.d_grads + t * total);
}
