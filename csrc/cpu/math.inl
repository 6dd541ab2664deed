// Elementary functions on Vec. Polynomials are minimax fits on [0, 1] or |r| <= 1/2; the error
// bounds are those of the fits, rounding adds about one unit in the last place.

inline constexpr float kLog2E = 1.44269504f;

// A denominator below is at most 2^41, so a product of three is finite. sigmoid is off by at most
// 2^-40 beyond the clamp and tanh within a unit in the last place of 1. NaN passes. On AVX-512
// scalef underflows by itself; elsewhere the exponent must stay within the format.
inline constexpr float kMaxExponent = 40.0f;
FASTL2O_INLINE Vec clamp_exponent(Vec y) {
#if FASTL2O_WIDTH == 16
  return minimum(splat(kMaxExponent), y);
#else
  return maximum(splat(-126.0f), minimum(splat(kMaxExponent), y));
#endif
}

// Several at a time, operation by operation: one polynomial alone would wait for its own results.
// kSigmoidScale and kTanhScale turn x into the exponent y. (Folding them into the weights saves
// four multiplications a unit but rounds each weight once more, an error that does not average
// out.)

inline constexpr float kSigmoidScale = -kLog2E;
// e = 2^y with sigmoid(x) = 1 / (1 + e) for y = -x log2(e). Relative error 7.5e-8.
template <int K>
FASTL2O_INLINE void sigmoid_exponentials(const Vec (&exponent)[K], Vec (&out)[K]) {
  const float coefficients[] = {0.0089893398766f, 0.0558263182317f, 0.240153616983f,
                                0.693153073207f, 0.999999925064f};
  Vec y[K], r[K];
#pragma GCC unroll 16
  for (int k = 0; k < K; ++k) y[k] = clamp_exponent(exponent[k]);
#pragma GCC unroll 16
  for (int k = 0; k < K; ++k) r[k] = above_floor(y[k]);
#pragma GCC unroll 16
  for (int k = 0; k < K; ++k) out[k] = splat(0.00187757676566f);
#pragma GCC unroll 8
  for (const float coefficient : coefficients)
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) out[k] = fma(out[k], r[k], splat(coefficient));
#pragma GCC unroll 16
  for (int k = 0; k < K; ++k) out[k] = scale_by_floor(out[k], y[k], r[k]);
}

inline constexpr float kTanhScale = 2.0f * kLog2E;
// m = 2^y - 1 with tanh(x) = m / (m + 2) for y = 2 x log2(e). Relative error 1.1e-8 near zero,
// where 2^y - 1 would cancel.
template <int K>
FASTL2O_INLINE void tanh_numerators(const Vec (&exponent)[K], Vec (&out)[K]) {
  const float coefficients[] = {0.00133907354776f, 0.00961823749491f, 0.0555035743364f,
                                0.24022649795f, 0.693147187927f};
  Vec n[K], r[K];
#pragma GCC unroll 16
  for (int k = 0; k < K; ++k) split(clamp_exponent(exponent[k]), n[k], r[k]);
#pragma GCC unroll 16
  for (int k = 0; k < K; ++k) out[k] = splat(0.000154035123676f);
#pragma GCC unroll 8
  for (const float coefficient : coefficients)
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) out[k] = fma(out[k], r[k], splat(coefficient));
#pragma GCC unroll 16
  for (int k = 0; k < K; ++k) {
    const Vec power = scale_by_power(splat(1.0f), n[k]);
    out[k] = fma(power, out[k] * r[k], power - 1.0f);
  }
}

#if FASTL2O_WIDTH == 16
// tanh(n) at n mod 32, rounded; 1 from 10 on.
alignas(64) inline constexpr float kTanhOfWhole[32] = {
    0.0f,          0.761594176f,  0.964027584f,  0.995054781f,  0.999329329f,  0.999909222f,
    0.999987721f,  0.999998331f,  0.999999762f,  0.99999994f,   1.0f,          1.0f,
    1.0f,          1.0f,          1.0f,          1.0f,          -1.0f,         -1.0f,
    -1.0f,         -1.0f,         -1.0f,         -1.0f,         -1.0f,         -0.99999994f,
    -0.999999762f, -0.999998331f, -0.999987721f, -0.999909222f, -0.999329329f, -0.995054781f,
    -0.964027584f, -0.761594176f};
#endif

// tanh(x) = top / bottom. On AVX-512 by the addition theorem from the whole part of x, whose tanh a
// table holds, and tanh(r) = r / q(r^2) for the rest, |r| < 1: three operations fewer. Both have
// the sign of x, so nothing cancels. Relative error 3.1e-8. From 10 on the table holds 1, so that
// top = bottom whatever r is.
template <int K>
FASTL2O_INLINE void tanh_fractions(const Vec (&x)[K], Vec (&top)[K], Vec (&bottom)[K]) {
#if FASTL2O_WIDTH == 16
  const float coefficients[] = {0.00208205986f, -0.0222114492f, 0.33333227f, 1.0f};
  Vec r[K], r2[K];
#pragma GCC unroll 16
  for (int k = 0; k < K; ++k) top[k] = look_up(kTanhOfWhole, clamp_magnitude(x[k], 10.0f));
#pragma GCC unroll 16
  for (int k = 0; k < K; ++k) r[k] = fraction(x[k]);  // of x itself, so that NaN passes
#pragma GCC unroll 16
  for (int k = 0; k < K; ++k) {
    r2[k] = r[k] * r[k];
    bottom[k] = splat(-0.00016764991f);
  }
#pragma GCC unroll 8
  for (const float coefficient : coefficients)
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) bottom[k] = fma(bottom[k], r2[k], splat(coefficient));
#pragma GCC unroll 16
  for (int k = 0; k < K; ++k) {
    const Vec whole = top[k];
    top[k] = fma(whole, bottom[k], r[k]);
    bottom[k] = fma(whole, r[k], bottom[k]);
  }
#else
  Vec exponent[K];
#pragma GCC unroll 16
  for (int k = 0; k < K; ++k) exponent[k] = x[k] * kTanhScale;
  tanh_numerators(exponent, top);
#pragma GCC unroll 16
  for (int k = 0; k < K; ++k) bottom[k] = top[k] + 2.0f;
#endif
}

FASTL2O_INLINE Vec tanh_vec(Vec x) {
  const Vec y[1] = {x * kTanhScale};
  Vec m[1];
  tanh_numerators(y, m);
  return m[0] * reciprocal(m[0] + 2.0f);
}

// ELU with alpha 1, Clevert et al. (arXiv 1511.07289).
FASTL2O_INLINE Vec elu(Vec x) {
  const Vec y[1] = {minimum(splat(0.0f), x) * kLog2E};
  Vec negative[1];
  tanh_numerators(y, negative);
  return x > 0.0f ? x : negative[0];
}

// Natural logarithm of x >= 0, denormals, zero, infinity and NaN included. log m = 2 atanh(s) with
// s = (m - 1) / (m + 1), |s| <= 0.172: the series cut after s^9 is off by 2e-9 relative.
FASTL2O_INLINE Vec log_vec(Vec x) {
  const IVec tiny = x < 1.17549435e-38f;
  const Vec normal = tiny ? x * 16777216.0f : x;
  IVec exponent = (bits(normal) >> 23) - 127;
  Vec mantissa = from_bits((bits(normal) & 0x007fffff) | 0x3f800000);
  const IVec high = mantissa > 1.41421356f;
  mantissa = high ? mantissa * 0.5f : mantissa;
  exponent = exponent - high - (tiny & 24);  // a true lane is -1
  const Vec s = (mantissa - 1.0f) / (mantissa + 1.0f);
  const Vec s2 = s * s;
  Vec series = splat(1.0f / 9.0f);
  series = fma(series, s2, splat(1.0f / 7.0f));
  series = fma(series, s2, splat(1.0f / 5.0f));
  series = fma(series, s2, splat(1.0f / 3.0f));
  const Vec log_mantissa = fma(series * s2, s + s, s + s);
  const Vec value = fma(__builtin_convertvector(exponent, Vec), splat(0.693147181f), log_mantissa);
  const Vec finite = x == 0.0f ? splat(-__builtin_inff()) : value;
  return x < __builtin_inff() ? finite : x;  // infinity and NaN give themselves
}
