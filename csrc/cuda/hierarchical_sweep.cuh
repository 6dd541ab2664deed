// The first pass over the parameters: features, GRU, readouts, new planes, the step before it is
// normalised, and the sums that the tensors' level needs.
//
// A lane holds kPer coordinates, a warp's first 32 first, so that planes of any alignment are read
// in whole sectors and a weight that comes from shared memory serves kPer multiply-adds.
#pragma once

#include "hierarchical_cells.cuh"
#include "hierarchical_tables.cuh"
#include "hierarchical_weights.cuh"
#include "step_layout.h"

namespace fastl2o::cuda {

inline constexpr int kPer = 2;
inline constexpr int kSweepTile = 32 * kPer;
inline constexpr int kSweepThreads = 128;
// A multiprocessor, which has 65,536 registers: 128 a thread spill from compute capability 9.0 on.
inline constexpr int kSweepBlocks = kDeviceMajor < 9 ? 4 : 3;
inline constexpr int kSumTiles = 16;  // whose sums a lane adds before lanes are added up
inline constexpr int kSumStride = 33;
inline constexpr int kMeanLogRate = 30, kFirstStep = 31;  // in a row of biases

struct SweepShared {
  ParamRows rows;
  float to_param[kTensorUnits][32];  // the tensors' map, transposed
  float shortcut[kScales];
  float square_decay_bias, average_decay_bias, rate_bias, offset;
  float momentum;  // share of the old log rate in the new one
  // Of each warp's tensor: of r, u and c, then the mean log rate and whether this is a first step;
  // below that the problem's part of it. Not in registers, as they are needed for the cell.
  float biases[kSweepThreads / 32][32];
  float problem[kSweepThreads / 32][32];
  double totals[kSweepThreads / 32][kSums];
  // Of the coordinates of each lane. The odd stride lets lanes add up a row each without conflicts.
  float sums[kSweepThreads / 32][kSums][kSumStride];
};

__device__ inline void load_weights(const float* meta, SweepShared& shared) {
  load_rows(meta, shared.rows);
  for (int i = threadIdx.x; i < kTensorUnits * 32; i += blockDim.x) {
    const int row = i % 32, k = i / 32;
    shared.to_param[k][row] =
        row < 3 * kUnits ? meta[kMeta.tensor_to_param + row * kTensorUnits + k] : 0.0f;
  }
  if (threadIdx.x < kScales) shared.shortcut[threadIdx.x] = meta[kMeta.shortcut + threadIdx.x];
  if (threadIdx.x == 0) {
    shared.square_decay_bias = meta[kMeta.square_decay_bias];
    shared.average_decay_bias = meta[kMeta.average_decay_bias];
    shared.rate_bias = meta[kMeta.rate_bias];
    shared.offset = meta[kMeta.log_rate_offset];
    shared.momentum = sigmoid(meta[kMeta.rate_momentum]);
  }
}

using Values = float[kPer];

// Coordinates of a tile, kPer a lane. Stochastic: planes in bf16 are rounded so.
template <typename State, bool Stochastic>
struct SweepTile {
  const HierarchicalArgs& args;
  const SweepShared& shared;
  const float* bias;
  float* sums;    // the lane's, kSumStride apart
  State* planes;  // at the lane's first coordinate
  void* grad;
  DType dtype;        // of the gradient
  float* raw;         // as `planes`
  int64_t numel, at;  // the lane's first coordinate
  int count;          // of the chunk's coordinates from there on; may be negative
  uint32_t bases[Stochastic ? kPer : 1];  // of the coordinates' random bits

  __device__ __forceinline__ SweepTile(const HierarchicalArgs& args_,
                                       const HierarchicalEntry& entry, SweepShared& shared_,
                                       int64_t at_, int count_)
      : args(args_),
        shared(shared_),
        bias(shared_.biases[threadIdx.x / 32]),
        sums(&shared_.sums[threadIdx.x / 32][0][threadIdx.x % 32]),
        planes(in_global_memory(static_cast<State*>(entry.planes)) + at_),
        grad(in_global_memory(entry.grad)),
        dtype(DType(entry.dtype)),
        raw(args_.raw + kRawUnit * int64_t(entry.first_raw) + at_),
        numel(entry.numel),
        at(at_),
        count(count_) {
    if constexpr (Stochastic) {
      const uint32_t key = rounding_key(args.seed, entry.index);
#pragma unroll
      for (int j = 0; j < kPer; ++j) bases[j] = rounding_base(key, at + 32 * j);
    }
  }

  __device__ __forceinline__ bool inside(int j) const { return 32 * j < count; }

  __device__ __forceinline__ State* plane(int number) const { return planes + number * numel; }
  // Reads or writes the coordinates of a plane, of which the written one's number decides the
  // random bits, and moves on to the next one.
  __device__ __forceinline__ void read(State*& from, Values& out) const {
#pragma unroll
    for (int j = 0; j < kPer; ++j) out[j] = inside(j) ? to_float(from[32 * j]) : 0.0f;
    from += numel;
  }
  __device__ __forceinline__ void write(State*& to, int number, const Values& in) const {
#pragma unroll
    for (int j = 0; j < kPer; ++j) {
      uint32_t random = 0;
      if constexpr (Stochastic) random = rounding_bits(bases[j], uint32_t(number)) & 0xffffu;
      if (inside(j)) store_one(to, 32 * j, in[j], Stochastic, random);
    }
    // Computed anew rather than held in registers since the plane was read.
    asm volatile("" : "+l"(to));
    to = in_global_memory(to) + numel;
  }

  __device__ __forceinline__ void read_grad(Values& out) const {
#pragma unroll
    for (int j = 0; j < kPer; ++j)
      out[j] = inside(j) ? load_element(grad, dtype, at + 32 * j) : 0.0f;
  }
  // What the rule sees of the gradient that was read.
  __device__ __forceinline__ void adjust_grad(Values& g) const {
#pragma unroll
    for (int j = 0; j < kPer; ++j) {
      if (args.grad_scale != nullptr) {
        g[j] /= *args.grad_scale;
        if (inside(j)) store_element(grad, dtype, at + 32 * j, g[j]);
      }
      if (args.maximize) g[j] = -g[j];
      g[j] = bounded_gradient(g[j]);
    }
  }

  // Of the averages, not for a first step, and of the squares, from the old h.
  __device__ __forceinline__ void decays(const Values (&h)[kUnits], Values& average,
                                         Values& square) const {
#pragma unroll
    for (int j = 0; j < kPer; ++j) {
      average[j] = shared.average_decay_bias;
      square[j] = shared.square_decay_bias;
    }
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
      const float2 weight = *reinterpret_cast<const float2*>(&shared.rows[k][kColumns]);
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        square[j] = fmaf(weight.x, h[k][j], square[j]);
        average[j] = fmaf(weight.y, h[k][j], average[j]);
      }
    }
    const bool first_step = bias[kFirstStep] != 0.0f;
#pragma unroll
    for (int j = 0; j < kPer; ++j) {
      average[j] = decay_of(average[j]);
      square[j] = first_step ? 0.0f : decay_of(square[j]);
    }
  }

  // x from the gradient and the old averages and squares, whose new values are written.
  __device__ __forceinline__ void features(const Values& grad, const Values& rate,
                                           const Values (&averages)[kScales],
                                           const Values (&squares)[kScales], Values average_decay,
                                           const Values& square_decay,
                                           Values (&x)[kColumns]) const {
    State *average_plane = plane(kAverages), *square_plane = plane(kSquares);
    const bool first_step = bias[kFirstStep] != 0.0f;
    Values logs[kScales], mean = {};
    int exponents[kPer];
#pragma unroll
    for (int s = 0; s < kScales; ++s) {
      Values average, square;
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        average[j] = mixed(first_step ? 0.0f : average_decay[j], averages[s][j], grad[j]);
        const float fresh = fmaf(average[j], average[j], kSquareEps);
        square[j] = mixed(square_decay[j], squares[s][j], fresh);
        const float sum = square[j] + kRmsEps;
        x[s][j] = asinh_accurate(average[j] * inverse_root(sum));
        int exponent;
        float mantissa;
        split_float(sum, exponent, mantissa);
        if (s == 0) exponents[j] = exponent;
        // Relative to the first scale's exponent: the mean is taken off anyway. Infinity, whose
        // mantissa is 1, becomes NaN.
        logs[s][j] = log2_approx(mantissa) + fmaf(sum, 0.0f, float(exponent - exponents[j]));
        mean[j] += logs[s][j];
        if (s + 1 < kScales) average_decay[j] = root_accurate(average_decay[j]);
      }
      write(average_plane, kAverages + s, average);
      write(square_plane, kSquares + s, square);
    }
#pragma unroll
    for (int j = 0; j < kPer; ++j) {
#pragma unroll
      for (int s = 0; s + 1 < kScales; ++s) x[kScales + s][j] = x[s][j] * x[s + 1][j];
      const float shift = mean[j] * (-kLn2 / kScales);
#pragma unroll
      for (int s = 0; s < kScales; ++s) x[2 * kScales - 1 + s][j] = fmaf(logs[s][j], kLn2, shift);
      x[kInputs - 1][j] = rate[j] - bias[kMeanLogRate];
    }
  }

  // sums = bias + weights of a row times the inputs, of which the last kUnits come from `units`.
  __device__ __forceinline__ float4 product(int row, float start, const Values (&x)[kColumns],
                                            const Values (&units)[kUnits], Values& sums) const {
    const float4* weights = reinterpret_cast<const float4*>(shared.rows[row]);
    float4 weight;
#pragma unroll
    for (int j = 0; j < kPer; ++j) sums[j] = start;
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      if (k % 4 == 0) weight = weights[k / 4];
      const float w = k % 4 == 0   ? weight.x
                      : k % 4 == 1 ? weight.y
                      : k % 4 == 2 ? weight.z
                                   : weight.w;
#pragma unroll
      for (int j = 0; j < kPer; ++j)
        sums[j] = fmaf(w, k < kInputs ? x[k][j] : units[k < kInputs ? 0 : k - kInputs][j], sums[j]);
    }
    return weight;
  }

  __device__ __forceinline__ void run() const {
    Values g, rate, h[kUnits], averages[kScales], squares[kScales], x[kColumns];
    State *from = plane(0), *to = from;
    read_grad(g);
#pragma unroll
    for (int k = 0; k < kUnits; ++k) read(from, h[k]);
#pragma unroll
    for (int s = 0; s < kScales; ++s) read(from, averages[s]);
#pragma unroll
    for (int s = 0; s < kScales; ++s) read(from, squares[s]);
    read(from, rate);
    adjust_grad(g);  // after all reads have been issued

    Values average_decay, square_decay, mask;
    decays(h, average_decay, square_decay);
    features(g, rate, averages, squares, average_decay, square_decay, x);
#pragma unroll
    for (int j = 0; j < kPer; ++j) mask[j] = inside(j) ? 1.0f : 0.0f;
    // Coordinates beyond the tensor hold finite numbers that are not to count.
    const auto add = [&](int row, const Values& values) {
      float sum = sums[row * kSumStride];
#pragma unroll
      for (int j = 0; j < kPer; ++j) sum = fmaf(values[j], mask[j], sum);
      sums[row * kSumStride] = sum;
    };
#pragma unroll
    for (int k = 0; k < kInputs; ++k) add(kUnits + k, x[k]);

    Values reset[kUnits], d, eta;
#pragma unroll
    for (int j = 0; j < kPer; ++j) {
      d[j] = 0.0f;
      eta[j] = shared.rate_bias;
    }
#pragma unroll
    for (int s = 0; s < kScales; ++s)
#pragma unroll
      for (int j = 0; j < kPer; ++j) d[j] = fmaf(shared.shortcut[s], x[s][j], d[j]);
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
      Values gate;
      __syncwarp();  // one unit after the other: their weights together do not fit the registers
      product(k, bias[k], x, h, gate);
#pragma unroll
      for (int j = 0; j < kPer; ++j) reset[k][j] = sigmoid(gate[j]) * h[k][j];
    }
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
      Values update, candidate, next;
      __syncwarp();  // as above
      product(kUnits + k, bias[kUnits + k], x, h, update);
      const float4 last = product(2 * kUnits + k, bias[2 * kUnits + k], x, reset, candidate);
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        next[j] = next_unit(update[j], candidate[j], h[k][j]);
        d[j] = fmaf(last.z, next[j], d[j]);
        eta[j] = fmaf(last.w, next[j], eta[j]);
      }
      write(to, k, next);
      add(k, next);
    }

    Values squared;
#pragma unroll
    for (int j = 0; j < kPer; ++j) {
      const float log_rate = at_least(at_most(rate[j] + eta[j], kLogRateLimit), -kLogRateLimit);
      if (inside(j)) raw[32 * j] = exp_accurate(log_rate + shared.offset) * d[j];
      rate[j] = fmaf(shared.momentum, rate[j] - log_rate, log_rate);
      squared[j] = d[j] * d[j];
    }
    to = plane(kLogRate);
    write(to, kLogRate, rate);
    add(kUnits + kInputs, squared);
    add(kUnits + kInputs + 1, rate);
  }
};

// In pairs, so that the additions do not all wait for one another.
__device__ __forceinline__ double add_row(const float (&row)[kSumStride]) {
  float even = 0.0f, odd = 0.0f;
#pragma unroll
  for (int i = 0; i < 32; i += 2) {
    even += row[i];
    odd += row[i + 1];
  }
  return double(even + odd);
}

// A warp comes to another tensor; `problem` holds the values of problem `held`, -1 for none.
__device__ __forceinline__ void load_biases(const HierarchicalArgs& args, int& held,
                                            const HierarchicalEntry& entry,
                                            const float (&to_param)[kTensorUnits][32],
                                            float (&problem)[32], float (&biases)[32]) {
  const int lane = threadIdx.x % 32;
  if (held != entry.problem) problem[lane] = problem_values(args, entry.problem);
  held = entry.problem;
  float value = problem[lane];
  for (int k = 0; k < kTensorUnits; ++k) value = fmaf(to_param[k][lane], entry.state[k], value);
  if (lane == kFirstStep) value = *entry.step == 0.0f ? 1.0f : 0.0f;
  __syncwarp();
  biases[lane] = value;
  __syncwarp();
}

template <typename State, bool Stochastic>
__global__ void __launch_bounds__(kSweepThreads, kSweepBlocks)
    hierarchical_sweep_kernel(const __grid_constant__ HierarchicalArgs args) {
  __shared__ __align__(16) SweepShared shared;
  if (rests(args)) return;
  load_weights(args.meta, shared);
  __syncthreads();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float (*const sums)[kSumStride] = shared.sums[warp];
  int problem = -1;
  for_chunks(args, blockIdx.x, gridDim.x, [&](int before, int index, int chunk) {
    const HierarchicalEntry& entry = entries_of(args)[index];
    if (skipped(args, entry)) return;
    if (index != before)
      load_biases(args, problem, entry, shared.to_param, shared.problem[warp], shared.biases[warp]);
    const Span span(entry, chunk);
    if (lane < kSums) shared.totals[warp][lane] = 0.0;
    for (int start = 0; start < span.size; start += kSumTiles * kSweepTile) {
#pragma unroll
      for (int row = 0; row < kSums; ++row) sums[row][lane] = 0.0f;
      for (int tile = start; tile < min(start + kSumTiles * kSweepTile, span.size);
           tile += kSweepTile)
        SweepTile<State, Stochastic>(args, entry, shared, span.first + tile + lane,
                                     span.size - tile - lane)
            .run();
      __syncwarp();
      if (lane < kSums) shared.totals[warp][lane] += add_row(sums[lane]);
      __syncwarp();
    }
    if (lane < kSums) args.sums[int64_t(chunk) * kSums + lane] = float(shared.totals[warp][lane]);
  });
}

}  // namespace fastl2o::cuda
