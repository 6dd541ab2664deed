// Elementary functions of the cells on the device, accurate float32: a few units in the last place,
// NaN in gives NaN out, no overflow to NaN. Two special-function instructions a sigmoid or tanh.
#pragma once

#include <cstdint>

namespace fastl2o::cuda {

// 2^x and 1 / x, at most 2 and 1 units in the last place off. Denormal results are flushed to zero,
// which saves the range checks of the plain forms and is below every sum they enter.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

inline constexpr float kLog2E = 1.44269504f;

// 1 / (1 + e^-x). An infinite exponential gives 0.
__device__ __forceinline__ float sigmoid(float x) {
  return reciprocal(1.0f + exp2_approx(-kLog2E * x));
}

// 1 - 2 / (1 + e^2x) cancels near zero: there the odd minimax polynomial, relative error 3.7e-8.
__device__ __forceinline__ float tanh_accurate(float x) {
  const float far = fmaf(-2.0f, reciprocal(1.0f + exp2_approx(2.0f * kLog2E * x)), 1.0f);
  const float s = x * x;
  float series = fmaf(s, 0.016437571495771408f, -0.05267180874943733f);
  series = fmaf(series, s, 0.13320724666118622f);
  series = fmaf(series, s, -0.3333294689655304f);
  const float near = fmaf(x * s, series, x);
  return fabsf(x) < 0.55f ? near : far;
}

// ELU with alpha 1 (arXiv 1511.07289): e^x - 1 below zero, by a polynomial of relative error 1.5e-8
// where that would cancel.
__device__ __forceinline__ float elu(float x) {
  const float far = exp2_approx(kLog2E * x) - 1.0f;
  float series = fmaf(x, 0.007231934927403927f, 0.0413486510515213f);
  series = fmaf(series, x, 0.1666298657655716f);
  series = fmaf(series, x, 0.49999865889549255f);
  const float near = fmaf(x * x, series, x);
  const float negative = x > -0.35f ? near : far;
  return x > 0.0f ? x : negative;
}

// Comparisons rather than fmaxf and fminf, which would turn NaN into the bound.
__device__ __forceinline__ float at_least(float x, float low) { return x < low ? low : x; }
__device__ __forceinline__ float at_most(float x, float high) { return x > high ? high : x; }

// x1 = max(log(|g| + eps) / p, -1). Once a coordinate, so the library's logarithm: it is accurate
// near 1 and takes denormals.
__device__ __forceinline__ float log_feature(float grad, float inverse_p, float eps) {
  return at_least(logf(fabsf(grad) + eps) * inverse_p, -1.0f);
}

// x2 = clip(e^p g, -1, 1).
__device__ __forceinline__ float sign_feature(float grad, float exp_p) {
  return at_most(at_least(grad * exp_p, -1.0f), 1.0f);
}

struct Moments {
  float m, v;                // the new averages
  float root;                // sqrt(v / (1 - beta2^t))
  float inverse_rms;         // 1 / (root + 1e-8)
  float g_scaled, m_scaled;  // grad / rms and m / ((1 - beta1^t) rms)
};

struct MomentDecay {
  float beta1, beta2, one_minus_beta1, one_minus_beta2;
  // log(beta) as a sum of two floats: rounded once, beta^t would be off by t roundings.
  float log_beta1[2], log_beta2[2];
};

// 1 / (1 - beta^t) for t >= 1 steps, without the cancellation of computing beta^t first. beta = 0
// is log_beta = {-inf, 0}.
__device__ __forceinline__ float moment_correction(const float (&log_beta)[2], float t) {
  return -1.0f / expm1f(fmaf(t, log_beta[0], t * log_beta[1]));
}

// RNNprop's averages and features (arXiv 1703.03633, section 4.2); corrections as above.
__device__ __forceinline__ Moments moment_features(const MomentDecay& decay, float correction1,
                                                   float correction2, float grad, float m,
                                                   float v) {
  Moments out;
  out.m = fmaf(decay.one_minus_beta1, grad, m * decay.beta1);
  out.v = fmaf(grad * decay.one_minus_beta2, grad, v * decay.beta2);
  out.root = sqrtf(out.v * correction2);
  out.inverse_rms = reciprocal(out.root + 1e-8f);
  out.g_scaled = grad * out.inverse_rms;
  out.m_scaled = out.m * correction1 * out.inverse_rms;
  return out;
}

}  // namespace fastl2o::cuda
