// The products of 32 coordinates by one warp, 2 x 20 units.
//
// Products are (coordinates x units) (units x gates). A warp's two row tiles of 16 are its 32
// coordinates: rows g and g + 8 of tile a are coordinates 2a and 2a + 1 of the lanes with
// lane / 4 == g. The 80 gates are ten column tiles of 8: with t = lane % 4, columns 2t and 2t + 1
// of tiles 2p and 2p + 1 are gates i, f and g, o of unit 4p + t. So a lane ends up with all gates
// of units 4p + t of its four coordinates, and, the inner index being ordered so that inner group p
// is the units 4p + (0..3), with just those entries of the next product's left operand: gates, h
// and c never leave the lane. Multiply-adds leave every number where it is and give the units of
// the quad's other lanes around, one after the other.
#pragma once

#include "cells.cuh"
#include "mma.cuh"
#include "state_io.cuh"
#include "step_args.h"
#include "step_layout.h"

namespace fastl2o::cuda {

// The fragments of one layer. Inner index k of group 2s or 2s + 1 is entry 0 or 1 of step s; an odd
// last group is a step of its own. A lane's entries lie together: {hi0, hi1, lo0, lo1}.
template <bool kExact>
__device__ void pack_fragments(const StepArgs& args, int layer, int groups, int inputs,
                               float* out) {
  constexpr int parts = kExact ? 2 : 1;
  const int unit_inputs = 4 * groups - kHidden;  // 0 where the inputs are features
  const int per_tile = 32 * groups;
  for (int i = threadIdx.x; i < 2 * kPairs * per_tile; i += blockDim.x) {
    const int tile = i / per_tile, rest = i % per_tile, group = rest / 32, lane = rest % 32;
    const int k = 4 * group + lane % 4, column = lane / 4;
    const int gate = 2 * (tile % 2) + column % 2, unit = 4 * (tile / 2) + column / 2;
    const int row = gate * kHidden + unit;
    const float weight = k < unit_inputs
                             ? args.meta[args.weight_ih[layer] + row * inputs + k]
                             : args.meta[args.weight_hh[layer] + row * kHidden + k - unit_inputs];
    const bool alone = group == groups - 1 && groups % 2 == 1;
    const int width = alone ? 1 : 2;  // groups of this step
    float* at = out + (tile * groups + group / 2 * 2) * 32 * parts + lane * width * parts +
                (alone ? 0 : group % 2);
    const float high = __uint_as_float(tf32_high(weight));
    at[0] = high;
    if (kExact) at[width] = __uint_as_float(tf32_high(weight - high));
  }
}

// The same for multiply-adds: (inner index, unit, gate).
__device__ inline void pack_rows(const StepArgs& args, int layer, int groups, int inputs,
                                 float* out) {
  const int unit_inputs = 4 * groups - kHidden;
  for (int i = threadIdx.x; i < 4 * groups * 4 * kHidden; i += blockDim.x) {
    const int k = i / (4 * kHidden), unit = i / 4 % kHidden, row = i % 4 * kHidden + unit;
    out[i] = k < unit_inputs ? args.meta[args.weight_ih[layer] + row * inputs + k]
                             : args.meta[args.weight_hh[layer] + row * kHidden + k - unit_inputs];
  }
}

template <Products kProducts>
__device__ void pack_layer(const StepArgs& args, int layer, int groups, int inputs, float* out) {
  if constexpr (kProducts == Products::fma)
    pack_rows(args, layer, groups, inputs, out);
  else
    pack_fragments<kProducts == Products::tf32_split>(args, layer, groups, inputs, out);
}

template <bool kRnnprop, Products kProducts>
__device__ void pack(const StepArgs& args, float* shared) {
  using Layout = SharedLayout<kRnnprop, kProducts>;
  const int inputs = kRnnprop ? kHidden : args.features;
  pack_layer<kProducts>(args, 0, kFirstGroups<kRnnprop>, inputs, shared + Layout::kFirst);
  pack_layer<kProducts>(args, 1, kSecondGroups, kHidden, shared + Layout::kSecond);
  for (int i = threadIdx.x; i < 4 * kHidden; i += blockDim.x) {
    const int gate = i % 4, unit = i / 4, row = gate * kHidden + unit;
    float* affine = shared + Layout::kAffine + 4 * Layout::kAffineRows * unit + gate;
    affine[0] = args.meta[args.bias[0] + row];
    if (!kRnnprop) {
      affine[4] = args.meta[args.weight_ih[0] + row * inputs];
      affine[8] = inputs < 2 ? 0.0f : args.meta[args.weight_ih[0] + row * inputs + 1];
    }
    shared[Layout::kAffineSecond + i] = args.meta[args.bias[1] + row];
    if (kRnnprop)
      shared[Layout::kProjection + i] = gate < 2
                                            ? args.meta[args.projection_weight + 2 * unit + gate]
                                            : args.meta[args.projection_bias + unit];
    if (i <= kHidden)
      shared[Layout::kReadout + i] =
          args.meta[i < kHidden ? args.readout_weight + i : args.readout_bias];
  }
}

// A left operand: units 4G + t of the lane's four coordinates, as they are, rounded or in two
// parts.
template <Products kProducts>
struct Operand {
  static constexpr bool kSplit = kProducts == Products::tf32_split;
  uint32_t high[4];
  uint32_t low[kSplit ? 4 : 1];

  __device__ __forceinline__ void set(const float (&x)[4]) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if constexpr (kProducts == Products::fma)
        high[j] = __float_as_uint(x[j]);
      else if constexpr (kSplit)
        split<false>(x[j], high[j], low[j]);  // h and inputs that the projection gives
      else
        high[j] = tf32_nearest(x[j]);
    }
  }
};

// sums[a] = x times the fragments of one column tile, for both row tiles a. The three partial
// products go to two accumulators: what the small ones round off stays small.
template <int kGroups, Products kProducts>
__device__ __forceinline__ void multiply(const Operand<kProducts> (&x)[kGroups],
                                         const float* fragments, int lane, float (&sums)[2][4]) {
  constexpr bool kExact = kProducts == Products::tf32_split;
  constexpr int parts = kExact ? 2 : 1;
  float small[2][4] = {};
#pragma unroll
  for (int a = 0; a < 2; ++a)
#pragma unroll
    for (int r = 0; r < 4; ++r) sums[a][r] = 0.0f;
#pragma unroll
  for (int s = 0; s < kGroups / 2; ++s) {
    uint32_t b[2 * parts];
    const float* at = fragments + 2 * s * 32 * parts + lane * 2 * parts;
    if constexpr (kExact) {
      const uint4 four = *reinterpret_cast<const uint4*>(at);
      b[0] = four.x, b[1] = four.y, b[2] = four.z, b[3] = four.w;
    } else {
      const uint2 two = *reinterpret_cast<const uint2*>(at);
      b[0] = two.x, b[1] = two.y;
    }
    const Operand<kProducts>&even = x[2 * s], &odd = x[2 * s + 1];
#pragma unroll
    for (int a = 0; a < 2; ++a) {
      if constexpr (kExact) {
        mma_k8(small[a], even.low[2 * a], even.low[2 * a + 1], odd.low[2 * a], odd.low[2 * a + 1],
               b[0], b[1]);
        mma_k8(small[a], even.high[2 * a], even.high[2 * a + 1], odd.high[2 * a],
               odd.high[2 * a + 1], b[2], b[3]);
      }
      mma_k8(sums[a], even.high[2 * a], even.high[2 * a + 1], odd.high[2 * a], odd.high[2 * a + 1],
             b[0], b[1]);
    }
  }
  if constexpr (kGroups % 2 == 1) {
    const Operand<kProducts>& last = x[kGroups - 1];
    uint32_t b[parts];
    const float* at = fragments + (kGroups - 1) * 32 * parts + lane * parts;
    if constexpr (kExact) {
      const uint2 two = *reinterpret_cast<const uint2*>(at);
      b[0] = two.x, b[1] = two.y;
    } else {
      b[0] = *reinterpret_cast<const uint32_t*>(at);
    }
#pragma unroll
    for (int a = 0; a < 2; ++a) {
      if constexpr (kExact) {
        mma_k4(small[a], last.low[2 * a], last.low[2 * a + 1], b[0]);
        mma_k4(small[a], last.high[2 * a], last.high[2 * a + 1], b[1]);
      }
      mma_k4(sums[a], last.high[2 * a], last.high[2 * a + 1], b[0]);
    }
  }
  if constexpr (kExact)
#pragma unroll
    for (int a = 0; a < 2; ++a)
#pragma unroll
      for (int r = 0; r < 4; ++r) sums[a][r] += small[a][r];
}

// A lane's gates of one unit.
using UnitSums = float[2][2][4];
// Gate i, f, g or o of coordinate j.
__device__ __forceinline__ float& gate_of(UnitSums& sums, int gate, int j) {
  return sums[gate / 2][j / 2][2 * (j % 2) + gate % 2];
}

// sums[p] += x times the weights of the lane's unit of group p, for all groups. Only the loop over
// the quad's lanes can be rolled, as registers have no index; rolled, it fits the instruction
// cache.
template <int kGroups>
__device__ __forceinline__ void multiply_rows(const Operand<Products::fma> (&x)[kGroups],
                                              const float* weights, const Lane& lane,
                                              UnitSums (&sums)[kPairs]) {
  const float4* const own = reinterpret_cast<const float4*>(weights) + lane.quad;
#pragma unroll 1
  for (int other = 0; other < 4; ++other) {
#pragma unroll
    for (int q = 0; q < kGroups; ++q) {
      float unit[4];
#pragma unroll
      for (int j = 0; j < 4; ++j)
        unit[j] = __uint_as_float(__shfl_sync(0xffffffffu, x[q].high[j], (lane.lane & ~3) + other));
#pragma unroll
      for (int p = 0; p < kPairs; ++p) {
        const float4 four = own[(4 * q + other) * kHidden + 4 * p];
        const float weight[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int gate = 0; gate < 4; ++gate)
#pragma unroll
          for (int j = 0; j < 4; ++j)
            gate_of(sums[p], gate, j) = fmaf(weight[gate], unit[j], gate_of(sums[p], gate, j));
      }
    }
  }
}

}  // namespace fastl2o::cuda
