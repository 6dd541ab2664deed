// Elementary functions of the hierarchical rule on the device, as accurate as those of cells.cuh.
#pragma once

#include "cells.cuh"
#include "hierarchical_config.h"

namespace fastl2o::cuda {

__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float inverse_root(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// By Newton's step on the approximation, for x > 0.
__device__ __forceinline__ float root_accurate(float x) {
  const float inverse = inverse_root(x), root = x * inverse;
  return fmaf(fmaf(-root, root, x), 0.5f * inverse, root);
}
__device__ __forceinline__ float root_approx(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

inline constexpr float kLn2 = 0.693147181f;

// A decay, above 0 so that its roots are defined. What an average takes of a new value is 1 less
// this, so the reciprocal's error would count many times over.
__device__ __forceinline__ float decay_of(float x) {
  const float bottom = at_most(1.0f + exp2_approx(-kLog2E * x), 1e30f);
  const float decay = reciprocal(bottom);
  return fmaf(fmaf(-bottom, decay, 1.0f), decay, decay);
}

// log(|x| + sqrt(1 + x^2)) cancels near zero only as a logarithm of about 1: there an odd minimax
// polynomial, relative error 2.9e-8.
__device__ __forceinline__ float asinh_accurate(float x) {
  const float s = x * x;
  const float far = kLn2 * log2_approx(fabsf(x) + root_approx(1.0f + s));
  float series = fmaf(s, 0.020121985275700225f, -0.04269933265471015f);
  series = fmaf(series, s, 0.07484758497844636f);
  series = fmaf(series, s, -0.1666628812982101f);
  const float near = fmaf(x * s, series, x);
  return fabsf(x) < 0.5f ? near : copysignf(far, x);
}

// x = 2^exponent mantissa with the mantissa in sqrt(1/2) .. sqrt(2), where the logarithm's absolute
// error is least; for x normal, Inf or NaN.
__device__ __forceinline__ void split_float(float x, int& exponent, float& mantissa) {
  const int bits = __float_as_int(x);
  exponent = (bits - 0x3f3504f3) >> 23;
  mantissa = __int_as_float(bits - (exponent << 23));
}

// Of NaN and a number NaN, unlike fminf.
__device__ __forceinline__ float minimum(float x, float most) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  return at_most(x, most);
#else
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(most));
  return y;
#endif
}

// u h + (1 - u) c with u = sigmoid(update) and c = tanh(candidate), over one denominator:
// u = 1 / (1 + e) and c = (m - 1) / (m + 1) with e = e^-update and m = e^2candidate, which are kept
// so small that their product is finite.
__device__ __forceinline__ float next_unit(float update, float candidate, float h) {
  const float e = exp2_approx(minimum(-kLog2E * update, 60.0f));
  const float m = exp2_approx(minimum(2.0f * kLog2E * candidate, 60.0f));
  const float bottom = m + 1.0f;
  const float top = fmaf(h, bottom, e * (m - 1.0f));
  return top * reciprocal(fmaf(e, bottom, bottom));
}

// The rounding of x log2(e) is made up for: x may be as large as 34.
__device__ __forceinline__ float exp_accurate(float x) {
  const float high = x * kLog2E;
  const float low = fmaf(x, kLog2E, -high) + x * 1.92596303e-8f;
  const float y = exp2_approx(high);
  return fmaf(y, kLn2 * low, y);
}

// NaN for NaN.
__device__ __forceinline__ float bounded_gradient(float x) {
  return at_most(at_least(x, -kGradientLimit), kGradientLimit);
}

// The share of the old value and the rest of the new one: a difference of the two would make NaN of
// infinities.
__device__ __forceinline__ float mixed(float share, float old_value, float new_value) {
  return fmaf(share, old_value, (1.0f - share) * new_value);
}

}  // namespace fastl2o::cuda
