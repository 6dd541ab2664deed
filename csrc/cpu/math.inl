// Elementary functions on Vec. Polynomials are minimax fits on |r| <= 1/2; the error bounds are
// those of the fits, rounding adds about one unit in the last place.

inline constexpr float kLog2E = 1.44269504f;

// 2^y for y in [-126, 60], relative error 7.5e-8.
FASTL2O_INLINE Vec exp2_clamped(Vec y) {
  Vec n, r;
  split(y, n, r);
  Vec value = splat(0.0013276472632f);
  value = fma(value, r, splat(0.00967554134312f));
  value = fma(value, r, splat(0.0555071327186f));
  value = fma(value, r, splat(0.240221197237f));
  value = fma(value, r, splat(0.693146967065f));
  value = fma(value, r, splat(1.00000007165f));
  return scale_by_power(value, n);
}

// 2^y - 1 for y in [-126, 60]. Relative error 1.1e-8 near y = 0, where 2^y - 1 would cancel.
FASTL2O_INLINE Vec exp2_minus_one_clamped(Vec y) {
  Vec n, r;
  split(y, n, r);
  Vec value = splat(0.000154035123676f);
  value = fma(value, r, splat(0.00133907354776f));
  value = fma(value, r, splat(0.00961823749491f));
  value = fma(value, r, splat(0.0555035743364f));
  value = fma(value, r, splat(0.24022649795f));
  value = fma(value, r, splat(0.693147187927f));
  const Vec power = scale_by_power(splat(1.0f), n);
  return fma(power, value * r, power - 1.0f);
}

// Exponents stop at 60 so that a product of two denominators below stays finite; sigmoid is off by
// at most 2^-60 there and tanh is 1 to the last bit. NaN passes both clamps.
FASTL2O_INLINE Vec clamp_exponent(Vec y) { return maximum(splat(-126.0f), minimum(splat(60.0f), y)); }

// 1 + e^-x, the denominator of sigmoid(x).
FASTL2O_INLINE Vec sigmoid_denominator(Vec x) {
#if FASTL2O_WIDTH == 16
  // scalef underflows by itself, so only the upper clamp is needed.
  return exp2_clamped(minimum(splat(60.0f), x * -kLog2E)) + 1.0f;
#else
  return exp2_clamped(clamp_exponent(x * -kLog2E)) + 1.0f;
#endif
}

// e^2x - 1 = m, with tanh(x) = m / (m + 2): accurate relative to x near zero.
FASTL2O_INLINE Vec tanh_numerator(Vec x) {
#if FASTL2O_WIDTH == 16
  return exp2_minus_one_clamped(minimum(splat(60.0f), x * (2.0f * kLog2E)));
#else
  return exp2_minus_one_clamped(clamp_exponent(x * (2.0f * kLog2E)));
#endif
}

FASTL2O_INLINE Vec tanh_vec(Vec x) {
  const Vec m = tanh_numerator(x);
  return m * reciprocal(m + 2.0f);
}

// ELU with alpha 1, Clevert et al. (arXiv 1511.07289).
FASTL2O_INLINE Vec elu(Vec x) {
  const Vec negative = exp2_minus_one_clamped(clamp_exponent(minimum(splat(0.0f), x) * kLog2E));
  return x > 0.0f ? x : negative;
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
