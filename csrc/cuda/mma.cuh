// Tensor-core products m16n8k8 and m16n8k4 in TF32 (compute capability 8.0 on), and operands split
// in two TF32 numbers: hi * hi + hi * lo + lo * hi is as accurate as float32 (the dropped lo * lo
// is below 2^-22 of the product). Tensor cores truncate what they add: sums of products start from
// zero, and what else belongs to them is added afterwards, rounded to nearest.
#pragma once

#include <cstdint>

namespace fastl2o::cuda {

inline constexpr float kTf32Max = 0x1.ffcp127f;

// Rounded to the 11 significant bits of TF32, ties away from zero, where |x| <= kTf32Max. NaN may
// become -0 here; its `split` low part is NaN, so no product loses it.
__device__ __forceinline__ uint32_t tf32_high(float x) {
  return (__float_as_uint(x) + 0x1000u) & 0xffffe000u;
}

// x = hi + lo. The tensor core reads the leading 11 bits of lo's 12. With kAny beyond kTf32Max too:
// hi stays finite, so lo is infinite where x is and NaN where x is, and the products with the high
// part of a finite number add up to what x times the number would be.
template <bool kAny>
__device__ __forceinline__ void split(float x, uint32_t& hi, uint32_t& lo) {
  hi = tf32_high(kAny ? fmaxf(fminf(x, kTf32Max), -kTf32Max) : x);
  lo = __float_as_uint(x - __uint_as_float(hi));
}

// The nearest TF32 number; NaN stays NaN.
__device__ __forceinline__ uint32_t tf32_nearest(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

// c += a b. With g = lane / 4 and t = lane % 4: a = {(g, t), (g + 8, t), (g, t + 4), (g + 8, t +
// 4)}, b = {(t, g), (t + 4, g)}, c = {(g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)}.
__device__ __forceinline__ void mma_k8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                       uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The same with k = 4: a = {(g, t), (g + 8, t)}, b = {(t, g)}.
__device__ __forceinline__ void mma_k4(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
  asm("mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(b0));
}

}  // namespace fastl2o::cuda
