// The pieces of the tensor-core window backward that lie within one layer, 2 x 20 units.
//
// A warp has 16 coordinates, the rows of its products; with g = lane / 4 and t = lane % 4 a lane
// holds rows g and g + 8 (its coordinates 0 and 1) of units 4p + t. Gates are ordered as in the
// step, and inputs alike: columns 2t and 2t + 1 of input tile r are unit t of input groups 2r and
// 2r + 1. So what a product leaves in a lane is what the lane needs as operand of the next one,
// forward (inputs to gates) and backward (gates to inputs), and one copy of the weights serves
// both.
#pragma once

#include "cells.cuh"
#include "mma.cuh"
#include "unroll_args.h"

namespace fastl2o::cuda::tensor {

// One inner index of a left operand for the lane's two rows, or of a right one for two inner
// indices; rounded to TF32, or in two parts.
template <bool kExact>
struct Split {
  uint32_t high[2];
  uint32_t low[kExact ? 2 : 1];

  // kAny: beyond kTf32Max too. h and what the projection gives are never there, as in the step.
  template <bool kAny>
  __device__ __forceinline__ void set(float first, float second) {
    if constexpr (kExact) {
      split<kAny>(first, high[0], low[0]);
      split<kAny>(second, high[1], low[1]);
    } else {
      high[0] = tf32_nearest(first);
      high[1] = tf32_nearest(second);
    }
  }
};

// Products of 8 inner indices added to a sum; of the left operand inner index t is `even`, t + 4 is
// `odd`. The high parts alone, and what the low parts add to them.
template <bool kExact>
__device__ __forceinline__ void add_large(float (&sum)[4], const Split<kExact>& even,
                                          const Split<kExact>& odd, const Split<kExact>& right) {
  mma_k8(sum, even.high[0], even.high[1], odd.high[0], odd.high[1], right.high[0], right.high[1]);
}
template <bool kExact, bool kRightLow = true>
__device__ __forceinline__ void add_small(float (&sum)[4], const Split<kExact>& even,
                                          const Split<kExact>& odd, const Split<kExact>& right) {
  mma_k8(sum, even.low[0], even.low[1], odd.low[0], odd.low[1], right.high[0], right.high[1]);
  if constexpr (kRightLow)
    mma_k8(sum, even.high[0], even.high[1], odd.high[0], odd.high[1], right.low[0], right.low[1]);
}

// A sum of products only. The small parts have an accumulator of their own, as in the step.
template <bool kExact>
struct Sum {
  float large[4] = {};
  float small[kExact ? 4 : 1] = {};

  __device__ __forceinline__ void add(const Split<kExact>& even, const Split<kExact>& odd,
                                      const Split<kExact>& right) {
    if constexpr (kExact) add_small(small, even, odd, right);
    add_large(large, even, odd, right);
  }
  // The same where the right operand is a TF32 number.
  __device__ __forceinline__ void add_exact(const Split<kExact>& even, const Split<kExact>& odd,
                                            const Split<kExact>& right) {
    if constexpr (kExact) add_small<kExact, false>(small, even, odd, right);
    add_large(large, even, odd, right);
  }
  __device__ __forceinline__ float operator[](int i) const {
    if constexpr (kExact)
      return large[i] + small[i];
    else
      return large[i];
  }
};

// Weights lie in blocks of 8 gates x 8 inputs: {gates 2q, 2q + 1} x {units 4p ..} by {input groups
// 2s, 2s + 1} x {units 0 .. 3}. Slot (unit u, gate a, input v) of a block holds the weights of both
// groups, each as its parts. Slots are permuted so that neither the forward reading (a whole slot a
// lane) nor the backward one (a half) has bank conflicts.
template <bool kExact>
__device__ __forceinline__ int slot_of(int u, int a, int v) {
  const int permuted = kExact ? 4 * (u & 1) + (u & 2) : 2 * (u & 2);
  return (8 * u + 4 * a + v) ^ permuted;
}

// Blocks ((p, q), s) of one layer: its inputs that are units, then h, then, for the LSTM rule's
// first layer, a group of two features, a constant one for the bias, and zero.
template <bool kExact, int kSteps>
__device__ void load_blocks(const WindowArgs& args, int layer, bool features, float* out) {
  constexpr int parts = kExact ? 2 : 1;
  const float* input = args.meta + args.layout.weight_ih[layer];
  const float* hidden = args.meta + args.layout.weight_hh[layer];
  const float* bias = args.meta + args.layout.bias[layer];
  const int unit_inputs = features ? 0 : kHidden;
  for (int i = threadIdx.x; i < 2 * kPairs * kSteps * 64; i += blockDim.x) {
    const int group = i % 2, v = i / 2 % 4, a = i / 8 % 2, u = i / 16 % 4;
    const int block = i / 64, step = block % kSteps, tile = block / kSteps;
    const int row = (2 * (tile % 2) + a) * kHidden + 4 * (tile / 2) + u;
    const int k = 8 * step + 4 * group + v;
    float weight = 0.0f;
    if (k < unit_inputs)
      weight = input[row * kHidden + k];
    else if (k < unit_inputs + kHidden)
      weight = hidden[row * kHidden + k - unit_inputs];
    else if (v < args.features)
      weight = input[row * args.features + v];
    else if (v == 2)
      weight = bias[row];
    float* at = out + 64 * parts * block + 2 * parts * slot_of<kExact>(u, a, v) + parts * group;
    const float high = __uint_as_float(tf32_high(weight));
    at[0] = high;
    if (kExact) at[1] = __uint_as_float(tf32_high(weight - high));
  }
}

// Where a lane finds its operands in a block of weights and in the rows of the group's buffer.
template <bool kExact>
struct Place {
  static constexpr int kParts = kExact ? 2 : 1;
  int lane, g, t;
  int forward;      // floats into a block: the lane's slot
  int backward[2];  // its halves of the slots of gates 2q and 2q + 1
  int write, read;  // floats into four rows: t's, written; into eight or sixteen: g's, read

  __device__ __forceinline__ Place()
      : lane(threadIdx.x % 32), g(threadIdx.x % 32 / 4), t(threadIdx.x % 4) {
    forward = 2 * kParts * slot_of<kExact>(g / 2, g % 2, t);
#pragma unroll
    for (int a = 0; a < 2; ++a)
      backward[a] = 2 * kParts * slot_of<kExact>(t, a, g / 2) + kParts * (g % 2);
    // Halves of every other two rows are swapped, which makes both accesses free of conflicts.
    write = 16 * t + ((2 * g) ^ (4 * (t & 2)));
    read = 16 * g + ((4 * t) ^ (4 * (g & 2)));
  }

  __device__ __forceinline__ Split<kExact> forward_weights(const float* block) const {
    Split<kExact> out;
    if constexpr (kExact) {
      const uint4 four = *reinterpret_cast<const uint4*>(block + forward);
      out.high[0] = four.x, out.low[0] = four.y;
      out.high[1] = four.z, out.low[1] = four.w;
    } else {
      const uint2 two = *reinterpret_cast<const uint2*>(block + forward);
      out.high[0] = two.x, out.high[1] = two.y;
    }
    return out;
  }
  __device__ __forceinline__ Split<kExact> backward_weights(const float* block) const {
    Split<kExact> out;
#pragma unroll
    for (int a = 0; a < 2; ++a) {
      if constexpr (kExact) {
        const uint2 two = *reinterpret_cast<const uint2*>(block + backward[a]);
        out.high[a] = two.x, out.low[a] = two.y;
      } else {
        out.high[a] = *reinterpret_cast<const uint32_t*>(block + backward[a]);
      }
    }
    return out;
  }
};

// A branch that is never taken, as `number` is not negative. ptxas moves nothing across it; else it
// starts the products of units to come so early that registers spill.
__device__ __forceinline__ void fence_schedule(int number) {
  asm volatile("{.reg .pred p; setp.lt.s32 p, %0, 0; @p exit;}" ::"r"(number) : "memory");
}

// Of units 4p + t, for the lane's two coordinates.
struct Gates {
  float i[2], f[2], cand[2], o[2];
};

// `blocks` starts at group p of units; `bias` is of unit 4p + t.
template <bool kExact, int kSteps>
__device__ __forceinline__ Gates gates_of(const Split<kExact> (&x)[2 * kSteps], const float* blocks,
                                          const float4& bias, const Place<kExact>& place) {
  constexpr int size = 64 * Place<kExact>::kParts;
  Sum<kExact> sums[2];
#pragma unroll
  for (int q = 0; q < 2; ++q)
#pragma unroll
    for (int s = 0; s < kSteps; ++s)
      sums[q].add(x[2 * s], x[2 * s + 1], place.forward_weights(blocks + (q * kSteps + s) * size));
  Gates out;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    out.i[j] = sigmoid(sums[0][2 * j] + bias.x);
    out.f[j] = sigmoid(sums[0][2 * j + 1] + bias.y);
    out.cand[j] = tanh_accurate(sums[1][2 * j] + bias.z);
    out.o[j] = sigmoid(sums[1][2 * j + 1] + bias.w);
  }
  return out;
}

// dL/da of units 4p + t, gate by gate; d_c becomes dL/dc of the step before.
__device__ __forceinline__ void cell_backward(const Gates& gates, const float (&tanh_c)[2],
                                              const float (&c_before)[2], const float (&d_h)[2],
                                              float (&d_c)[2], float (&out)[4][2]) {
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const float i = gates.i[j], f = gates.f[j], cand = gates.cand[j], o = gates.o[j];
    const float d = fmaf(d_h[j] * o, 1.0f - tanh_c[j] * tanh_c[j], d_c[j]);
    out[0][j] = d * cand * (i * (1.0f - i));
    out[1][j] = d * c_before[j] * (f * (1.0f - f));
    out[2][j] = d * i * (1.0f - cand * cand);
    out[3][j] = d_h[j] * tanh_c[j] * (o * (1.0f - o));
    d_c[j] = d * f;
  }
}

// Adds to the sums of input tiles what the gates of group p give them. Exact, a group has a chain
// of its own, and the chains' sums are added rounded to nearest: ten products truncated in a row
// cost the derivative of RNNprop's v, a difference of large numbers, its last bits.
template <bool kExact, int kSteps>
__device__ __forceinline__ void transposed_product(const float (&d_gates)[4][2],
                                                   const float* blocks, const Place<kExact>& place,
                                                   float (&sums)[kSteps][4]) {
  constexpr int size = 64 * Place<kExact>::kParts;
  float own[kExact ? kSteps : 1][4] = {};
#pragma unroll
  for (int q = 0; q < 2; ++q) {
    Split<kExact> even, odd;
    even.template set<true>(d_gates[2 * q][0], d_gates[2 * q][1]);
    odd.template set<true>(d_gates[2 * q + 1][0], d_gates[2 * q + 1][1]);
#pragma unroll
    for (int r = 0; r < kSteps; ++r) {
      const Split<kExact> right = place.backward_weights(blocks + (q * kSteps + r) * size);
      if constexpr (kExact) add_small(own[r], even, odd, right);
      add_large(kExact ? own[r] : sums[r], even, odd, right);
    }
  }
  if constexpr (kExact)
#pragma unroll
    for (int r = 0; r < kSteps; ++r)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[r][i] += own[r][i];
}

// A warp's share of a layer's weight gradient, in tiles of 16 gates x 8 inputs: row m is gate m / 4
// of unit 4p + m % 4, and with kOnes a last tile has the bias in column 0. Warp w of four has all
// tiles of p = w and every fourth of p = 4, from (w + kFrom) % 4 on.
template <bool kExact, int kSteps, bool kOnes, int kFrom>
struct WeightGradient {
  static constexpr int kTiles = kSteps + (kOnes ? 1 : 0);
  static constexpr int kCount = kTiles + (kTiles + kGroupWarps - 1) / kGroupWarps;
  using Sums = float[kCount][4];

  static __device__ __forceinline__ int first_extra(int warp) {
    return (warp + kFrom) % kGroupWarps;
  }

  struct Rows {  // of 16 gates, at the four inner indices that the lane reads
    Split<kExact> k[4];

    __device__ __forceinline__ explicit Rows(const float* at) {
      const float4 upper = *reinterpret_cast<const float4*>(at);
      const float4 lower = *reinterpret_cast<const float4*>(at + 8 * kWarpTile);
      k[0].template set<true>(upper.x, lower.x);
      k[1].template set<true>(upper.y, lower.y);
      k[2].template set<true>(upper.z, lower.z);
      k[3].template set<true>(upper.w, lower.w);
    }
  };

  // One step's, over all coordinates of the group. It is then added to a sum over steps: chains of
  // roundings are shorter, and tensor cores round towards zero.
  static __device__ __forceinline__ void of_step(const float* buffer, int warp,
                                                 const Place<kExact>& place, Sums& out) {
    Sum<kExact> sums[kCount];
    const int extra = first_extra(warp);
    const float* at = buffer + place.read;
#pragma unroll 1
    for (int chunk = 0; chunk < kGroupWarps; ++chunk, at += kBufferRows * kWarpTile) {
      const Rows own(at + 16 * warp * kWarpTile), shared(at + 16 * kGroupWarps * kWarpTile);
#pragma unroll
      for (int r = 0; r < kTiles; ++r) {
        const bool both = r % kGroupWarps == extra;
        if (r == kSteps) {
          Split<kExact> ones;
          ones.high[0] = ones.high[1] = place.g == 0 ? __float_as_uint(1.0f) : 0u;
#pragma unroll
          for (int k = 0; k < 4; k += 2) {
            sums[r].add_exact(own.k[k], own.k[k + 1], ones);
            if (both) sums[kTiles + r / kGroupWarps].add_exact(shared.k[k], shared.k[k + 1], ones);
          }
          continue;
        }
        const float4 four =
            *reinterpret_cast<const float4*>(at + (4 * kHidden + 8 * r) * kWarpTile);
        Split<kExact> right[2];
        if (!kOnes && r + 1 == kSteps) {  // features
          right[0].template set<true>(four.x, four.y);
          right[1].template set<true>(four.z, four.w);
        } else {
          right[0].template set<false>(four.x, four.y);
          right[1].template set<false>(four.z, four.w);
        }
#pragma unroll
        for (int k = 0; k < 2; ++k) sums[r].add(own.k[2 * k], own.k[2 * k + 1], right[k]);
        if (both)
#pragma unroll
          for (int k = 0; k < 2; ++k)
            sums[kTiles + r / kGroupWarps].add(shared.k[2 * k], shared.k[2 * k + 1], right[k]);
      }
    }
#pragma unroll
    for (int n = 0; n < kCount; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) out[n][i] = sums[n][i];
  }

  // Into a partial in MetaLayout's order.
  static __device__ __forceinline__ void store(const Sums& sums, const WindowArgs& args, int layer,
                                               int warp, const Place<kExact>& place,
                                               float* partial) {
    const int inputs = kOnes ? kHidden : args.features;
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      const bool own = n < kTiles;
      const int r = own ? n : first_extra(warp) + kGroupWarps * (n - kTiles);
      if (r >= kTiles) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int m = place.g + 8 * (i / 2);
        const int row = m / 4 * kHidden + 4 * (own ? warp : kGroupWarps) + m % 4;
        const int k = 8 * r + 2 * place.t + i % 2;
        const int h = kOnes ? k - kHidden : k;  // units of the layer below come first
        if (h < 0)
          partial[args.layout.weight_ih[layer] + row * inputs + k] = sums[n][i];
        else if (h < kHidden)
          partial[args.layout.weight_hh[layer] + row * kHidden + h] = sums[n][i];
        else if (h - kHidden < (kOnes ? 0 : inputs))
          partial[args.layout.weight_ih[layer] + row * inputs + h - kHidden] = sums[n][i];
        else if (h == kHidden + (kOnes ? 0 : 2))
          partial[args.layout.bias[layer] + row] = sums[n][i];
      }
    }
  }
};

}  // namespace fastl2o::cuda::tensor
