// What blocks of the upper levels compute together: sums of rows, and a GRU.
#pragma once

#include "hierarchical_args.h"
#include "hierarchical_cells.cuh"

namespace fastl2o::cuda {

inline constexpr int kLevelThreads = 256;
inline constexpr int kLevelUnits = 20;
static_assert(kTensorUnits == kLevelUnits && kGlobalUnits == kLevelUnits);

__device__ __forceinline__ float add_dot(const float* weights, const float* x, int count,
                                         float sum) {
#pragma unroll 4
  for (int k = 0; k < count; ++k) sum = fmaf(weights[k], x[k], sum);
  return sum;
}

// Sums rows of 4 Quads numbers in the order of groups of rows: row r belongs to group r modulo
// their number, which depends on Quads alone. The total of column t goes to thread t.
template <int Quads, typename Row>
__device__ __forceinline__ double add_rows(int64_t rows, Row row) {
  constexpr int groups = kLevelThreads / Quads;
  __shared__ double shared[groups][4 * Quads];
  const int quad = threadIdx.x % Quads, group = threadIdx.x / Quads;
  double sums[4] = {};
  if (group < groups) {
#pragma unroll 4
    for (int64_t r = group; r < rows; r += groups) {
      const float4* const from = row(r);
      const float4 four = from == nullptr ? make_float4(0.0f, 0.0f, 0.0f, 0.0f) : from[quad];
      sums[0] += double(four.x);
      sums[1] += double(four.y);
      sums[2] += double(four.z);
      sums[3] += double(four.w);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) shared[group][4 * quad + i] = sums[i];
  }
  __syncthreads();
  double total = 0.0;
  if (threadIdx.x < 4 * Quads)
    for (int g = 0; g < groups; ++g) total += shared[g][threadIdx.x];
  __syncthreads();
  return total;
}

// Of one column of a GRU of kLevelUnits.
struct LevelGates {
  float gates[2 * kLevelUnits];  // r, u
  float reset[kLevelUnits];      // r h
  float candidates[kLevelUnits];
};

// By a whole block: threads of kLevelUnits rows each for r, u and c. x, h and the result are
// shared; `injected` is thread t's part of preactivation t.
template <int Inputs>
__device__ __forceinline__ void level_gates(const float* meta, GruLayout at, const float* x,
                                            const float* h, float injected, LevelGates& out) {
  constexpr int columns = Inputs + kLevelUnits;
  const int row = threadIdx.x, unit = row % kLevelUnits;
  const bool candidate = row >= 2 * kLevelUnits;
  const float* weights =
      meta + (candidate ? at.candidate + unit * columns : at.gates + row * columns);
  float sum = 0.0f;
  if (row < 3 * kLevelUnits) {
    sum = injected + meta[candidate ? at.candidate_bias + unit : at.gates_bias + row];
    sum = add_dot(weights, x, Inputs, sum);
  }
  if (!candidate) {
    out.gates[row] = sigmoid(add_dot(weights + Inputs, h, kLevelUnits, sum));
    if (row < kLevelUnits) out.reset[row] = out.gates[row] * h[row];
  }
  __syncthreads();
  if (candidate && row < 3 * kLevelUnits)
    out.candidates[unit] = tanh_accurate(add_dot(weights + Inputs, out.reset, kLevelUnits, sum));
  __syncthreads();
}

// The new state, of unit t by thread t; arguments as above.
template <int Inputs>
__device__ __forceinline__ float level_gru(const float* meta, GruLayout at, const float* x,
                                           const float* h, float injected) {
  __shared__ LevelGates shared;
  level_gates<Inputs>(meta, at, x, h, injected, shared);
  const int row = threadIdx.x;
  if (row >= kLevelUnits) return 0.0f;
  const float c = shared.candidates[row];
  return fmaf(shared.gates[kLevelUnits + row], h[row] - c, c);
}

}  // namespace fastl2o::cuda
