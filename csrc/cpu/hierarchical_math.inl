// Elementary functions of the hierarchical rule on Vec.

// exp of |x| up to 87, by 2^n e^r with ln 2 in two parts: relative error about 1e-7.
FASTL2O_INLINE Vec exp_vec(Vec x) {
  Vec n, r;
  split(x * kLog2E, n, r);
  r = fma(n, splat(-0.693145752f), x);
  r = fma(n, splat(-1.42860677e-6f), r);
  Vec p = splat(1.0f / 5040);
#pragma GCC unroll 8
  for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    p = fma(p, r, splat(c));
  return scale_by_power(p, n);
}

// The power of two that brings a normal u > 0 into [sqrt(1/2), sqrt(2)), and its logarithm's share.
FASTL2O_INLINE void normalise(Vec u, Vec& scale, Vec& exponent_part) {
  const IVec k = (bits(u) - 0x3f3504f3) >> 23;
  scale = from_bits(0x3f800000 - (k << 23));
  exponent_part = __builtin_convertvector(k, Vec) * 0.693147181f;
}

// log(1 + f) for 1 + f in [sqrt(1/2), sqrt(2)), as 2 atanh(s) with s = f / (2 + f): |s| <= 0.172,
// and the cubic fits the series to 3e-9.
FASTL2O_INLINE Vec log1p_reduced(Vec f, Vec exponent_part) {
  const Vec s = f * reciprocal(f + 2.0f);
  const Vec s2 = s * s;
  Vec series = splat(1.0f / 9.0f);
  series = fma(series, s2, splat(1.0f / 7.0f));
  series = fma(series, s2, splat(1.0f / 5.0f));
  series = fma(series, s2, splat(1.0f / 3.0f));
  const Vec twice = s + s;
  return fma(twice * s2, series, twice) + exponent_part;
}

// log of a normal x > 0. Infinity gives no number, as its difference from other logarithms would.
FASTL2O_INLINE Vec log_normal(Vec x) {
  Vec scale, exponent_part;
  normalise(x, scale, exponent_part);
  return log1p_reduced(fma(x, scale, splat(-1.0f)), exponent_part);
}

// sign(x) log1p(a + a^2 / (1 + sqrt(1 + a^2))) with a = |x|: accurate at 0, no cancellation.
FASTL2O_INLINE Vec asinh_vec(Vec x) {
  const Vec a = absolute(x), square = a * a, sum = square + 1.0f;
  const Vec root = sum * reciprocal_root(sum);
  const Vec t = fma(square, reciprocal(root + 1.0f), a);
  Vec scale, exponent_part;
  normalise(t + 1.0f, scale, exponent_part);
  const Vec value = log1p_reduced(fma(t, scale, scale - 1.0f), exponent_part);
  return from_bits(bits(value) | (bits(x) & (int)0x80000000));
}

// 1 + e^-x, whose reciprocal is sigmoid(x).
template <int K>
FASTL2O_INLINE void sigmoid_denominators(Vec (&x)[K]) {
  Vec e[K];
#pragma GCC unroll 32
  for (int k = 0; k < K; ++k) x[k] = x[k] * kSigmoidScale;
  sigmoid_exponentials(x, e);
#pragma GCC unroll 32
  for (int k = 0; k < K; ++k) x[k] = e[k] + 1.0f;
}

template <int K>
FASTL2O_INLINE void sigmoid_all(Vec (&x)[K]) {
  sigmoid_denominators(x);
#pragma GCC unroll 32
  for (int k = 0; k < K; ++k) x[k] = reciprocal(x[k]);
}

template <int K>
FASTL2O_INLINE void tanh_all(Vec (&x)[K]) {
  Vec m[K];
#pragma GCC unroll 32
  for (int k = 0; k < K; ++k) x[k] = x[k] * kTanhScale;
  tanh_numerators(x, m);
#pragma GCC unroll 32
  for (int k = 0; k < K; ++k) x[k] = m[k] * reciprocal(m[k] + 2.0f);
}
