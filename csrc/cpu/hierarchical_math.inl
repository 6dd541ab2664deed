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

// t <- log(1 + t), or log t where not OnePlus, of normal numbers > 0. With k such that 1 + f, the
// number times 2^-k, lies between sqrt(1/2) and sqrt(2), the logarithm is k ln 2 + 2 atanh(s) for
// s = f / (2 + f): |s| <= 0.172, and the series cut after s^9 is off by 2e-9 relative. Several at a
// time, operation by operation, as in math.inl. Infinity gives no number, as its difference from
// other logarithms would.
template <bool OnePlus, int K>
FASTL2O_INLINE void log_all(Vec (&t)[K]) {
  Vec exponent[K], s[K], series[K];
#pragma GCC unroll 16
  for (int i = 0; i < K; ++i) {
    // unsigned, which may wrap: states that no rule made can hold numbers below 0
    const UVec number = reinterpret_cast<UVec>(OnePlus ? t[i] + 1.0f : t[i]);
    const IVec k = reinterpret_cast<IVec>(number - 0x3f3504f3u) >> 23;
    exponent[i] = __builtin_convertvector(k, Vec);
    s[i] = reinterpret_cast<Vec>(0x3f800000u - (reinterpret_cast<UVec>(k) << 23));
  }
#pragma GCC unroll 16
  for (int i = 0; i < K; ++i) t[i] = fma(t[i], s[i], OnePlus ? s[i] - 1.0f : splat(-1.0f));
#pragma GCC unroll 16
  for (int i = 0; i < K; ++i) s[i] = t[i] * reciprocal(t[i] + 2.0f);
#pragma GCC unroll 16
  for (int i = 0; i < K; ++i) {
    t[i] = s[i] * s[i];
    s[i] = s[i] + s[i];
    series[i] = splat(1.0f / 9.0f);
  }
#pragma GCC unroll 4
  for (const float coefficient : {1.0f / 7.0f, 1.0f / 5.0f, 1.0f / 3.0f})
#pragma GCC unroll 16
    for (int i = 0; i < K; ++i) series[i] = fma(series[i], t[i], splat(coefficient));
#pragma GCC unroll 16
  for (int i = 0; i < K; ++i)
    t[i] = fma(exponent[i], splat(0.693147181f), fma(s[i] * t[i], series[i], s[i]));
}

// sign(x) log1p(a + a^2 / (1 + sqrt(1 + a^2))) with a = |x|: accurate at 0, no cancellation.
template <int K>
FASTL2O_INLINE void asinh_all(Vec (&x)[K]) {
  Vec u[K], t[K];
#pragma GCC unroll 16
  for (int i = 0; i < K; ++i) t[i] = fma(x[i], x[i], splat(1.0f));
#pragma GCC unroll 16
  for (int i = 0; i < K; ++i) u[i] = t[i] * reciprocal_root(t[i]);
#pragma GCC unroll 16
  for (int i = 0; i < K; ++i) t[i] = fma(x[i] * x[i], reciprocal(u[i] + 1.0f), absolute(x[i]));
  log_all<true>(t);
#pragma GCC unroll 16
  for (int i = 0; i < K; ++i) x[i] = from_bits(bits(t[i]) | (bits(x[i]) & (int)0x80000000));
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
