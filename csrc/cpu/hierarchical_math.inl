// Elementary functions of the hierarchical rule on Vec.

// NaN for NaN.
FASTL2O_INLINE Vec bounded_gradient(Vec x) {
  return maximum(splat(-kGradientLimit), minimum(splat(kGradientLimit), x));
}

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

#if FASTL2O_WIDTH == 16

// t <- log(1 + t), or log t where not OnePlus, of normal numbers > 0. The number is 2^k m with
// 1 <= m < 2; the leading four bits of m choose c near 1 / m, and log m = log(1 + r) - log c with
// r = m c - 1, |r| <= 1/16. Below 1 + 1/16 c is 1, so that log(1 + t) is as accurate as t is. The
// fit of log(1 + r) is off by 1.2e-7 relative. Several at a time, operation by operation, as in
// math.inl. Infinity gives no number, as its difference from other logarithms would.
alignas(64) inline constexpr float kNearInverse[16] = {
    1.0f,       0.9142857f,  0.8648649f,  0.82051283f, 0.7804878f, 0.74418604f,
    0.7111111f, 0.68085104f, 0.6530612f,  0.627451f,   0.6037736f, 0.58181816f,
    0.5614035f, 0.5423729f,  0.52459013f, 0.50793654f};
alignas(64) inline constexpr float kNearLog[16] = {
    // -log c
    0.0f,        0.089612156f, 0.14518198f, 0.19782573f, 0.2478362f, 0.29546422f,
    0.34092656f, 0.38441172f,  0.42608443f, 0.4660897f,  0.504556f,  0.5415973f,
    0.57731533f, 0.61180156f,  0.645138f,   0.67739874f};

template <bool OnePlus, int K>
FASTL2O_INLINE void log_all(Vec (&t)[K]) {
  const __m512 inverses = _mm512_load_ps(kNearInverse), logs = _mm512_load_ps(kNearLog);
  Vec base[K], c[K], p[K];
#pragma GCC unroll 16
  for (int i = 0; i < K; ++i) {
    const Vec number = OnePlus ? t[i] + 1.0f : t[i];
    const __m512i place = (__m512i)(bits(number) >> 19);  // modulo 16
    const Vec k = (Vec)_mm512_getexp_ps((__m512)number);
    base[i] = fma(k, splat(0.693147181f), (Vec)_mm512_permutexvar_ps(place, logs));
    c[i] = (Vec)_mm512_permutexvar_ps(place, inverses);
    if (OnePlus)
      c[i] = (Vec)_mm512_scalef_ps((__m512)c[i], (__m512)-k);
    else
      t[i] = (Vec)_mm512_getmant_ps((__m512)number, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
  }
#pragma GCC unroll 16
  for (int i = 0; i < K; ++i) t[i] = fma(t[i], c[i], OnePlus ? c[i] - 1.0f : splat(-1.0f));
#pragma GCC unroll 16
  for (int i = 0; i < K; ++i) p[i] = fma(t[i], splat(-0.23806934f), splat(0.33345006f));
#pragma GCC unroll 16
  for (int i = 0; i < K; ++i) p[i] = fma(t[i], p[i], splat(-0.50000937f));
#pragma GCC unroll 16
  for (int i = 0; i < K; ++i) t[i] = base[i] + fma(t[i] * t[i], p[i], t[i]);
}

// a + a^2 / (1 + sqrt(1 + a^2)) with a = |x|. w = 1 / (1 + s), s the root, is also the root of
// a^2 w^2 + 2 w - 1, whose derivative there is 2 s: one Newton step, from estimates of 14 bits for
// both, is off by 4e-9.
template <int K>
FASTL2O_INLINE void asinh_arguments(const Vec (&x)[K], Vec (&u)[K]) {
  Vec square[K], root[K];
#pragma GCC unroll 16
  for (int i = 0; i < K; ++i) square[i] = x[i] * x[i];
#pragma GCC unroll 16
  for (int i = 0; i < K; ++i) u[i] = square[i] + 1.0f;
#pragma GCC unroll 16
  for (int i = 0; i < K; ++i) root[i] = (Vec)_mm512_rsqrt14_ps((__m512)u[i]);
#pragma GCC unroll 16
  for (int i = 0; i < K; ++i) u[i] = (Vec)_mm512_rcp14_ps((__m512)fma(u[i], root[i], splat(1.0f)));
#pragma GCC unroll 16
  for (int i = 0; i < K; ++i) {
    const Vec error = fma(fma(square[i], u[i], splat(2.0f)), u[i], splat(-1.0f));
    u[i] = fma(error, root[i] * -0.5f, u[i]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < K; ++i) u[i] = fma(square[i], u[i], absolute(x[i]));
}

#else

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

template <int K>
FASTL2O_INLINE void asinh_arguments(const Vec (&x)[K], Vec (&u)[K]) {
  Vec t[K];
#pragma GCC unroll 16
  for (int i = 0; i < K; ++i) t[i] = fma(x[i], x[i], splat(1.0f));
#pragma GCC unroll 16
  for (int i = 0; i < K; ++i) u[i] = t[i] * reciprocal_root(t[i]);
#pragma GCC unroll 16
  for (int i = 0; i < K; ++i) u[i] = fma(x[i] * x[i], reciprocal(u[i] + 1.0f), absolute(x[i]));
}

#endif

// sign(x) log1p(a + a^2 / (1 + sqrt(1 + a^2))) with a = |x|: accurate at 0, no cancellation.
template <int K>
FASTL2O_INLINE void asinh_all(Vec (&x)[K]) {
  Vec t[K];
  asinh_arguments(x, t);
  log_all<true>(t);
#pragma GCC unroll 16
  for (int i = 0; i < K; ++i) x[i] = from_bits(bits(t[i]) | (bits(x[i]) & (int)0x80000000));
}

// 1 / (1 + 2^y), which is sigmoid(x) for y = kSigmoidScale x.
template <int K>
FASTL2O_INLINE void sigmoids_of_exponents(Vec (&y)[K]) {
  Vec e[K];
  sigmoid_exponentials(y, e);
#pragma GCC unroll 32
  for (int k = 0; k < K; ++k) y[k] = reciprocal(e[k] + 1.0f);
}

template <int K>
FASTL2O_INLINE void sigmoid_all(Vec (&x)[K]) {
#pragma GCC unroll 32
  for (int k = 0; k < K; ++k) x[k] = x[k] * kSigmoidScale;
  sigmoids_of_exponents(x);
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
