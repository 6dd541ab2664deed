// Reading and writing parameters, gradients and state planes of any stored type as float32.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "rounding.h"
#include "step_args.h"

namespace fastl2o::cuda {

using bf16 = uint16_t;  // its bits

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(bf16 bits) {
  return __uint_as_float(uint32_t(bits) << 16);
}

__device__ __forceinline__ float half_to_float(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
__device__ __forceinline__ uint16_t float_to_half(float value) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
// Two at once: `low` in the lower half.
__device__ __forceinline__ uint32_t floats_to_bf16(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  const auto rounded = [](float value) {  // to nearest even; NaN is 0x7fff, as in the instruction
    const uint32_t bits = __float_as_uint(value);
    return value == value ? (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16 : 0x7fffu;
  };
  return rounded(low) | rounded(high) << 16;
#else
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#endif
}

// One element of a parameter or gradient. The branch is the same for a whole launch.
__device__ __forceinline__ float load_element(const void* data, DType dtype, int64_t at) {
  switch (dtype) {
    case DType::f32: return static_cast<const float*>(data)[at];
    case DType::f64: return float(static_cast<const double*>(data)[at]);
    case DType::bf16: return to_float(static_cast<const bf16*>(data)[at]);
    default: return half_to_float(static_cast<const uint16_t*>(data)[at]);
  }
}
__device__ __forceinline__ void store_element(void* data, DType dtype, int64_t at, float value) {
  switch (dtype) {
    case DType::f32: static_cast<float*>(data)[at] = value; return;
    case DType::f64: static_cast<double*>(data)[at] = value; return;
    case DType::bf16: static_cast<bf16*>(data)[at] = bf16(floats_to_bf16(value, 0.0f)); return;
    default: static_cast<uint16_t*>(data)[at] = float_to_half(value);
  }
}

__device__ __forceinline__ bool is_finite(const void* data, DType dtype, int64_t at) {
  if (dtype == DType::f64) return isfinite(static_cast<const double*>(data)[at]);
  return isfinite(load_element(data, dtype, at));
}

// `random`: its lower 16 bits. NaN and infinity stay.
__device__ __forceinline__ bf16 round_stochastically(float value, uint32_t random) {
  const uint32_t bits = __float_as_uint(value);
  return is_finite_bits(bits) ? round_finite(bits, random) : bf16(floats_to_bf16(value, 0.0f));
}

// Where the lanes of a warp stand in a tile. With g = lane / 4 and t = lane % 4 a lane holds four
// coordinates of the rows that its matrix fragments need, and owns one, of which it alone reads the
// gradient and writes the parameter. Vector form: coordinates 4g + j, so that planes are read 16
// bytes at a time (8 in bf16), and owns 4g + t. Else g + 8j, which keeps scalar reads of any
// alignment in whole sectors, and owns g + 8t.
struct Lane {
  int lane, group, quad;  // lane, g, t
  bool vector;
  int count;  // coordinates of this tile
  int first;  // the first of the four
  int own;
  bool owns;  // `own` lies inside the tensor

  __device__ Lane(bool vector_, int count_) : vector(vector_), count(count_) {
    lane = threadIdx.x % 32;
    group = lane / 4;
    quad = lane % 4;
    first = vector ? 4 * group : group;
    own = vector ? lane : group + 8 * quad;
    owns = own < count;
  }
  // A value of each of the four coordinates from its owner.
  __device__ __forceinline__ void gather(float value, float (&out)[4]) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) out[j] = __shfl_sync(0xffffffffu, value, (lane & ~3) + j);
  }
};

// Written as instructions: the compiler would share scalar accesses between the vector form and the
// other one, with an eighth of the sectors used.
__device__ __forceinline__ void load_vector(const void* from, uint4& out) {
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(out.x), "=r"(out.y), "=r"(out.z), "=r"(out.w)
               : "l"(__cvta_generic_to_global(from))
               : "memory");
}
__device__ __forceinline__ void load_vector(const void* from, uint2& out) {
  asm volatile("ld.global.v2.u32 {%0, %1}, [%2];"
               : "=r"(out.x), "=r"(out.y)
               : "l"(__cvta_generic_to_global(from))
               : "memory");
}
__device__ __forceinline__ void store_vector(void* to, uint4 in) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(to)), "r"(in.x), "r"(in.y), "r"(in.z), "r"(in.w)
               : "memory");
}
__device__ __forceinline__ void store_vector(void* to, uint2 in) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};"
               :
               : "l"(__cvta_generic_to_global(to)), "r"(in.x), "r"(in.y)
               : "memory");
}

// `plane` points at the tile's first coordinate. Coordinates beyond the tensor read as 0.
__device__ __forceinline__ void load_four(const float* plane, const Lane& lane, float (&out)[4]) {
  if (lane.vector) {
    uint4 four = make_uint4(0, 0, 0, 0);
    if (lane.first < lane.count) load_vector(plane + lane.first, four);
    out[0] = __uint_as_float(four.x), out[1] = __uint_as_float(four.y);
    out[2] = __uint_as_float(four.z), out[3] = __uint_as_float(four.w);
    return;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int at = lane.first + 8 * j;
    out[j] = at < lane.count ? plane[at] : 0.0f;
  }
}
__device__ __forceinline__ void load_four(const bf16* plane, const Lane& lane, float (&out)[4]) {
  if (lane.vector) {
    uint2 four = make_uint2(0, 0);
    if (lane.first < lane.count) load_vector(plane + lane.first, four);
    out[0] = __uint_as_float(four.x << 16), out[1] = __uint_as_float(four.x & 0xffff0000u);
    out[2] = __uint_as_float(four.y << 16), out[3] = __uint_as_float(four.y & 0xffff0000u);
    return;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int at = lane.first + 8 * j;
    out[j] = at < lane.count ? to_float(plane[at]) : 0.0f;
  }
}

// `random`, its lower 16 bits for each value, is for stochastic rounding only.
__device__ __forceinline__ void store_four(float* plane, const Lane& lane, const float (&in)[4],
                                           bool, const uint32_t (&)[4]) {
  if (lane.vector) {
    if (lane.first < lane.count)
      store_vector(plane + lane.first, make_uint4(__float_as_uint(in[0]), __float_as_uint(in[1]),
                                                  __float_as_uint(in[2]), __float_as_uint(in[3])));
    return;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int at = lane.first + 8 * j;
    if (at < lane.count) plane[at] = in[j];
  }
}
__device__ __forceinline__ void store_four(bf16* plane, const Lane& lane, const float (&in)[4],
                                           bool stochastic, const uint32_t (&random)[4]) {
  uint32_t low, high;
  if (stochastic) {
    low = round_stochastically(in[0], random[0]) | uint32_t(round_stochastically(in[1], random[1]))
                                                       << 16;
    high = round_stochastically(in[2], random[2]) | uint32_t(round_stochastically(in[3], random[3]))
                                                        << 16;
  } else {
    low = floats_to_bf16(in[0], in[1]);
    high = floats_to_bf16(in[2], in[3]);
  }
  if (lane.vector) {
    if (lane.first < lane.count) store_vector(plane + lane.first, make_uint2(low, high));
    return;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int at = lane.first + 8 * j;
    const uint32_t pair = j < 2 ? low : high;
    if (at < lane.count) plane[at] = bf16(j % 2 == 0 ? pair : pair >> 16);
  }
}

// One value of the owner's coordinate.
__device__ __forceinline__ void store_one(float* plane, int at, float value, bool, uint32_t) {
  plane[at] = value;
}
__device__ __forceinline__ void store_one(bf16* plane, int at, float value, bool stochastic,
                                          uint32_t random) {
  plane[at] = stochastic ? round_stochastically(value, random) : bf16(floats_to_bf16(value, 0.0f));
}

}  // namespace fastl2o::cuda
