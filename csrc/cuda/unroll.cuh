// The pieces of the window backward that lie within one layer, 2 x 20 units, exact float32.
//
// A block takes 32 coordinates through the whole window. In products with weights a lane is a
// coordinate and a warp owns units 4w .. 4w + 3: operands are rows of shared memory, weights are
// broadcast. In weight gradients a thread owns a block of (inputs x gates of one unit) and sums
// over the coordinates of a row.
#pragma once

#include "cells.cuh"
#include "unroll_args.h"

namespace fastl2o::cuda {

// Of the thread's units: the state and, in the reverse walk, the gates of one layer.
struct Cells {
  float h[kOwned], c[kOwned];
};
struct Gates {
  float i[kOwned], f[kOwned], cand[kOwned], o[kOwned], tanh_c[kOwned];
};

struct Place {
  int lane, warp;
  // The block of weight gradients: inputs `group` * kBlock .. of unit `unit`.
  int group, unit;

  __device__ __forceinline__ Place()
      : lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        group(threadIdx.x % 8),
        unit(threadIdx.x / 8) {}
  // Number of the thread's unit j.
  __device__ __forceinline__ int owned(int j) const { return kOwned * warp + j; }
};

// weights (rows, unit, gate) and bias (unit, gate) of one layer, h's rows first.
__device__ inline void load_weights(const WindowArgs& args, int layer, int inputs, int rows,
                                    float* weights, float* bias) {
  const float* input = args.meta + args.layout.weight_ih[layer];
  const float* hidden = args.meta + args.layout.weight_hh[layer];
  for (int at = threadIdx.x; at < rows * 4 * kHidden; at += kWindowThreads) {
    const int k = at / (4 * kHidden), unit = at / 4 % kHidden, row = at % 4 * kHidden + unit;
    weights[at] = k < kHidden            ? hidden[row * kHidden + k]
                  : k < kHidden + inputs ? input[row * inputs + k - kHidden]
                                         : 0.0f;
  }
  for (int at = threadIdx.x; at < 4 * kHidden; at += kWindowThreads)
    bias[at] = args.meta[args.layout.bias[layer] + at % 4 * kHidden + at / 4];
}

// The thread's units from `rows` operand rows: state.c to c', state.h to h'.
template <int kRows, int kRow>
__device__ __forceinline__ Gates layer_forward(const float* operands, const float* weights,
                                               const float* bias, const Place& place,
                                               Cells& state) {
  const float4* weight = reinterpret_cast<const float4*>(weights) + place.owned(0);
  float4 sum[kOwned];
#pragma unroll
  for (int j = 0; j < kOwned; ++j) sum[j] = reinterpret_cast<const float4*>(bias)[place.owned(j)];
#pragma unroll 4
  for (int k = 0; k < kRows; ++k) {
    const float x = operands[k * kRow + place.lane];
#pragma unroll
    for (int j = 0; j < kOwned; ++j) {
      const float4 w = weight[k * kHidden + j];
      sum[j].x = fmaf(w.x, x, sum[j].x);
      sum[j].y = fmaf(w.y, x, sum[j].y);
      sum[j].z = fmaf(w.z, x, sum[j].z);
      sum[j].w = fmaf(w.w, x, sum[j].w);
    }
  }
  Gates gates;
#pragma unroll
  for (int j = 0; j < kOwned; ++j) {
    gates.i[j] = sigmoid(sum[j].x);
    gates.f[j] = sigmoid(sum[j].y);
    gates.cand[j] = tanh_accurate(sum[j].z);
    gates.o[j] = sigmoid(sum[j].w);
    state.c[j] = fmaf(gates.f[j], state.c[j], gates.i[j] * gates.cand[j]);
    gates.tanh_c[j] = tanh_accurate(state.c[j]);
    state.h[j] = gates.o[j] * gates.tanh_c[j];
  }
  return gates;
}

// Numbers of the thread into and out of shared memory: registers are short in the walk back.
template <int kCount>
__device__ __forceinline__ void stash(const float (&values)[kCount], float* out) {
#pragma unroll
  for (int k = 0; k < kCount; ++k) out[k * kWindowThreads + threadIdx.x] = values[k];
}
template <int kCount>
__device__ __forceinline__ void fetch(const float* stashed, float (&values)[kCount]) {
#pragma unroll
  for (int k = 0; k < kCount; ++k) values[k] = stashed[k * kWindowThreads + threadIdx.x];
}
// The same of a layer's gates and old c.
__device__ __forceinline__ void stash(const Gates& gates, const float (&c_before)[kOwned],
                                      float* out) {
  constexpr int part = kOwned * kWindowThreads;
  stash(gates.i, out);
  stash(gates.f, out + part);
  stash(gates.cand, out + 2 * part);
  stash(gates.o, out + 3 * part);
  stash(gates.tanh_c, out + 4 * part);
  stash(c_before, out + 5 * part);
}
__device__ __forceinline__ void fetch(const float* stashed, Gates& gates,
                                      float (&c_before)[kOwned]) {
  constexpr int part = kOwned * kWindowThreads;
  fetch(stashed, gates.i);
  fetch(stashed + part, gates.f);
  fetch(stashed + 2 * part, gates.cand);
  fetch(stashed + 3 * part, gates.o);
  fetch(stashed + 4 * part, gates.tanh_c);
  fetch(stashed + 5 * part, c_before);
}

// dL/da of the thread's units into rows (gate, unit) of `out`; adjoint.c to dL/dc of the step
// before.
template <int kRow>
__device__ __forceinline__ void cell_backward(const Gates& gates, const float (&c_before)[kOwned],
                                              const Place& place, Cells& adjoint, float* out) {
#pragma unroll
  for (int j = 0; j < kOwned; ++j) {
    const float i = gates.i[j], f = gates.f[j], cand = gates.cand[j], o = gates.o[j];
    const float th = gates.tanh_c[j], d_h = adjoint.h[j];
    const float d_c = fmaf(d_h * o, 1.0f - th * th, adjoint.c[j]);
    float* own = out + place.owned(j) * kRow + place.lane;
    own[0] = d_c * cand * (i * (1.0f - i));
    own[kHidden * kRow] = d_c * c_before[j] * (f * (1.0f - f));
    own[2 * kHidden * kRow] = d_c * i * (1.0f - cand * cand);
    own[3 * kHidden * kRow] = d_h * th * (o * (1.0f - o));
    adjoint.c[j] = d_c * f;
  }
}

// Sums over all gates of weight times dL/da, for the thread's h (`d_h`) and, from row kHidden on,
// as many inputs (`d_x`).
template <bool kInputs, int kRow>
__device__ __forceinline__ void transposed_product(const float* d_gates, const float* weights,
                                                   const Place& place, float (&d_h)[kOwned],
                                                   float (&d_x)[kOwned]) {
  const float4* weight = reinterpret_cast<const float4*>(weights) + place.owned(0) * kHidden;
#pragma unroll
  for (int j = 0; j < kOwned; ++j) d_h[j] = d_x[j] = 0.0f;
#pragma unroll 4
  for (int unit = 0; unit < kHidden; ++unit) {
    float d[4];
#pragma unroll
    for (int gate = 0; gate < 4; ++gate)
      d[gate] = d_gates[(gate * kHidden + unit) * kRow + place.lane];
#pragma unroll
    for (int j = 0; j < kOwned; ++j) {
      const float4 w = weight[j * kHidden + unit];
      d_h[j] = fmaf(w.x, d[0], fmaf(w.y, d[1], fmaf(w.z, d[2], fmaf(w.w, d[3], d_h[j]))));
      if constexpr (kInputs) {
        const float4 v = weight[(kHidden + j) * kHidden + unit];
        d_x[j] = fmaf(v.x, d[0], fmaf(v.y, d[1], fmaf(v.z, d[2], fmaf(v.w, d[3], d_x[j]))));
      }
    }
  }
}

// The thread's block of one layer's weight gradient, and half of one bias gradient.
template <int kRows, int kRow>
struct WeightGradient {
  static constexpr int kBlock = kRows / 8;
  // Eight threads read rows kBlock apart at once.
  static_assert(kRows % 8 == 0 && kBlock % 2 == 1, "free of bank conflicts");
  static constexpr int kCount = 4 * kBlock + 1;
  float sums[kCount] = {};  // (input, gate), then the bias

  __device__ __forceinline__ void operator+=(const WeightGradient& other) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) sums[k] += other.sums[k];
  }

  // That of one step. Sums of a step and then of steps are shorter chains of roundings than one.
  static __device__ __forceinline__ WeightGradient of_step(const float* operands,
                                                           const float* d_gates,
                                                           const Place& place) {
    WeightGradient out;
    float (&sum)[kCount] = out.sums;
#pragma unroll 1
    for (int at = 0; at < kWindowTile; at += 4) {
      float4 d[4];
#pragma unroll
      for (int gate = 0; gate < 4; ++gate)
        d[gate] =
            *reinterpret_cast<const float4*>(d_gates + (gate * kHidden + place.unit) * kRow + at);
#pragma unroll
      for (int k = 0; k < kBlock; ++k) {
        const float4 x =
            *reinterpret_cast<const float4*>(operands + (place.group * kBlock + k) * kRow + at);
#pragma unroll
        for (int gate = 0; gate < 4; ++gate)
          sum[4 * k + gate] = fmaf(
              x.x, d[gate].x,
              fmaf(x.y, d[gate].y, fmaf(x.z, d[gate].z, fmaf(x.w, d[gate].w, sum[4 * k + gate]))));
      }
    }
    const float* row = d_gates + (place.group % 4 * kHidden + place.unit) * kRow +
                       place.group / 4 * (kWindowTile / 2);
    float total = 0.0f;
#pragma unroll
    for (int at = 0; at < kWindowTile / 2; at += 4) {
      const float4 d = *reinterpret_cast<const float4*>(row + at);
      total += (d.x + d.y) + (d.z + d.w);
    }
    sum[4 * kBlock] = total;
    return out;
  }

  // Into a partial in MetaLayout's order. The bias's other half lies four lanes on.
  __device__ __forceinline__ void store(const MetaLayout& layout, int layer, int inputs,
                                        const Place& place, float* partial) const {
#pragma unroll
    for (int k = 0; k < kBlock; ++k)
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) {
        const int row = gate * kHidden + place.unit, column = place.group * kBlock + k;
        if (column < kHidden)
          partial[layout.weight_hh[layer] + row * kHidden + column] = sums[4 * k + gate];
        else if (column < kHidden + inputs)
          partial[layout.weight_ih[layer] + row * inputs + column - kHidden] = sums[4 * k + gate];
      }
    const float total = sums[4 * kBlock] + __shfl_down_sync(0xffffffffu, sums[4 * kBlock], 4);
    if (place.group < 4) partial[layout.bias[layer] + place.group * kHidden + place.unit] = total;
  }
};

// The same sum in every lane of the warp.
__device__ __forceinline__ float sum_lanes(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

}  // namespace fastl2o::cuda
