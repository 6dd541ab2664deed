// The upper levels of the hierarchical window backward: blocks of the problems and of the tensors.
#pragma once

#include "hierarchical_gru.cuh"
#include "hierarchical_tables.cuh"
#include "hierarchical_window_args.h"

namespace fastl2o::cuda {

// Where the gradient of a meta-parameter of the upper levels is added up by this block.
struct LevelRow {
  float* row;

  __device__ explicit LevelRow(const HierarchicalWindowArgs& args)
      : row(args.level_rows + int64_t(blockIdx.x) * kLevelRow) {}
  __device__ float& operator[](int64_t meta) const { return row[meta - kFirstLevel]; }
};

// Where a state lies that an entry's pointer has in the replay's.
__device__ __forceinline__ const float* before_of(const HierarchicalWindowArgs& args,
                                                  const void* pointer) {
  return args.before + (static_cast<const float*>(pointer) - args.current);
}
// Its gradient.
__device__ __forceinline__ float* gradient_of(const HierarchicalWindowArgs& args,
                                              const void* pointer) {
  return args.d_rows + (static_cast<const float*>(pointer) - args.current);
}

// sum of d[row] weights[row][column] over rows.
__device__ __forceinline__ float transposed_dot(const float* weights, const float* d, int rows,
                                                int columns, int column) {
  float sum = 0.0f;
#pragma unroll 4
  for (int row = 0; row < rows; ++row) sum = fmaf(weights[row * columns + column], d[row], sum);
  return sum;
}

// Adds the gradients of weights (rows, columns) and bias of an affine map of x, by a whole block.
__device__ __forceinline__ void add_affine(const LevelRow& to, int64_t weights, int64_t bias,
                                           const float* d, const float* x, int rows, int columns) {
  for (int i = threadIdx.x; i < rows * columns; i += kLevelThreads)
    to[weights + i] += d[i / columns] * x[i % columns];
  if (int(threadIdx.x) < rows) to[bias + threadIdx.x] += d[threadIdx.x];
}

struct LevelGradients {
  float gates[3 * kLevelUnits];  // of preactivations r, u, c
  float x[kUnits + kInputs], h[kLevelUnits];
};

// A GRU backwards by a whole block, from the gradient of the new state, of unit t in thread t. All
// that is pointed to is shared but for meta; arguments are those of level_gates.
template <int Inputs>
__device__ __forceinline__ void level_backward(const float* meta, GruLayout at, const float* x,
                                               const float* h, float injected, float d_next,
                                               const LevelRow& to, LevelGradients& d) {
  constexpr int columns = Inputs + kLevelUnits;
  __shared__ LevelGates cell;
  const int thread = threadIdx.x, unit = thread - Inputs;
  level_gates<Inputs>(meta, at, x, h, injected, cell);
  if (thread < kLevelUnits) {
    const float u = cell.gates[kLevelUnits + thread], c = cell.candidates[thread];
    d.gates[kLevelUnits + thread] = d_next * (h[thread] - c) * u * (1.0f - u);
    d.gates[2 * kLevelUnits + thread] = d_next * (1.0f - u) * fmaf(-c, c, 1.0f);
    d.h[thread] = d_next * u;
  }
  __syncthreads();
  float sum = 0.0f;
  if (thread < columns)
    sum = transposed_dot(meta + at.candidate, d.gates + 2 * kLevelUnits, kLevelUnits, columns,
                         thread);
  if (unit >= 0 && unit < kLevelUnits) {
    const float r = cell.gates[unit];
    d.gates[unit] = sum * h[unit] * r * (1.0f - r);
    sum = fmaf(sum, r, d.h[unit]);
  }
  __syncthreads();
  if (thread < columns) {
    sum += transposed_dot(meta + at.gates, d.gates, 2 * kLevelUnits, columns, thread);
    (unit < 0 ? d.x[thread] : d.h[unit]) = sum;
  }
  for (int i = thread; i < 3 * kLevelUnits * columns; i += kLevelThreads) {
    const int row = i / columns, column = i % columns;
    const bool candidate = row >= 2 * kLevelUnits;
    const float* state = candidate ? cell.reset : h;
    const float input = column < Inputs ? x[column] : state[column - Inputs];
    to[candidate ? at.candidate + i - 2 * kLevelUnits * columns : at.gates + i] +=
        d.gates[row] * input;
  }
  if (thread < 3 * kLevelUnits)
    to[thread < 2 * kLevelUnits ? at.gates_bias + thread
                                : at.candidate_bias + thread - 2 * kLevelUnits] += d.gates[thread];
  __syncthreads();
}

// A problem's global state back by a step, from what its tensors left one step later; and what all
// its tensors need to know.
__device__ inline void global_backward(const HierarchicalWindowArgs& args, int problem) {
  constexpr int quads = kTensorUnits / 4;
  __shared__ float x[kTensorUnits], z[kGlobalUnits];
  __shared__ LevelGradients d;
  const int thread = threadIdx.x;
  const Range range = problem_entries(args, problem);
  const int count = range.last - range.first;
  const auto total = [&](const float* rows) {
    const float4* const from = reinterpret_cast<const float4*>(rows) + int64_t(range.first) * quads;
    return float(add_rows<quads>(count, [&](int64_t r) { return from + r * quads; }));
  };
  float* const d_global = args.d_global + int64_t(problem) * kGlobalUnits;
  float* const d_means = args.d_means + int64_t(problem) * 32;
  float d_next = 0.0f;
  if (args.follows) {
    d_next = total(args.d_injecting);
    if (thread < kGlobalUnits) d_next += d_global[thread];
  }
  RateSum rates, centred;
  // In the replay's order: the features are to be those of its step to the last bit.
  if (!args.closing)
    rates = sum_rates<kLevelThreads>(range, [&](RateSum& sum, int i) {
      sum.add(args.list[i].numel, before_of(args, args.list[i].state)[kTensorUnits]);
    });
  if (args.follows)
    centred = sum_rates<kLevelThreads>(range, [&](RateSum& sum, int i) {
      sum.rates += double(gradient_of(args, args.list[i].state)[kTensorUnits]);
    });
  const float d_rate = -float(centred.rates) / float(args.coordinates);
  if (args.closing) {
    if (thread < kGlobalUnits)
      args.d_rows[(problem + 1) * args.width - kGlobalUnits + thread] = d_next;
    if (thread < 32)
      for (int i = range.first + thread; i < range.last; i += 32)
        gradient_of(args, args.list[i].state)[kTensorUnits] = d_rate * float(args.list[i].numel);
    return;
  }
  if (thread < 32)
    args.problem_values[int64_t(problem) * 32 + thread] =
        problem_value(args, problem, thread, rates);
  const float state = total(args.states);
  if (thread < kTensorUnits) x[thread] = state / float(count);
  if (thread < kGlobalUnits)
    z[thread] = args.global_states[int64_t(problem) * kGlobalUnits + thread];
  __syncthreads();
  level_backward<kTensorUnits>(args.meta, kMeta.global, x, z, 0.0f, d_next, LevelRow(args), d);
  if (thread < kGlobalUnits) d_global[thread] = d.h[thread];
  if (thread < kTensorUnits) d_means[thread] = d.x[thread] / float(count);
  if (thread == kTensorUnits) d_means[thread] = d_rate;
  __syncthreads();
}

// adjoint <- w g + keep adjoint, or dL/du where that is given (lr is 1 then), for a chunk, and the
// sum of -lr adjoint raw.
__device__ __forceinline__ void advance_chunk(const HierarchicalWindowArgs& args, int index,
                                              int chunk) {
  const HierarchicalEntry& entry = args.list[index];
  const Span span(entry, chunk);
  const int64_t at = static_cast<const float*>(entry.grad) - args.current_grads + span.first;
  const float* const raw = args.raw + kRawUnit * int64_t(entry.first_raw) + span.first;
  const bool given = args.next_grads != nullptr && args.next_weights == nullptr;
  const bool weighted = args.next_grads != nullptr && !given;
  const float weight = weighted ? args.next_weights[entry.problem] : 1.0f;
  float sum = 0.0f;
#pragma unroll 4
  for (int i = threadIdx.x % 32; i < span.size; i += 32) {
    float adjoint = args.next_grads == nullptr ? 0.0f : weight * args.next_grads[at + i];
    if (args.follows && !given) adjoint = fmaf(args.keep, args.adjoint[at + i], adjoint);
    args.adjoint[at + i] = adjoint;
    sum = fmaf(-args.lr * adjoint, raw[i], sum);
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (threadIdx.x % 32 == 0) args.chunk_sums[int64_t(chunk) * kChunkSums + kProductSum] = sum;
}

// The global states, a block each, and the adjoint of the parameters.
__global__ void __launch_bounds__(kLevelThreads, 2)
    window_ahead_kernel(const __grid_constant__ HierarchicalWindowArgs args) {
  // Of many problems a block takes several, which share its row.
  const int blocks = min(args.problems, args.level_row_count);
  if (int(blockIdx.x) < blocks)
    for (int problem = blockIdx.x; problem < args.problems; problem += blocks)
      global_backward(args, problem);
  else
    for_chunks(args, blockIdx.x - blocks, gridDim.x - blocks,
               [&](int, int index, int chunk) { advance_chunk(args, index, chunk); });
}

// The sums of an entry's chunks, of column t in thread t.
__device__ __forceinline__ double chunk_totals(const HierarchicalWindowArgs& args,
                                               const HierarchicalEntry& entry) {
  constexpr int quads = kChunkSums / 4;
  const float4* const from =
      reinterpret_cast<const float4*>(args.chunk_sums) + int64_t(entry.first_chunk) * quads;
  return add_rows<quads>(chunk_count(entry.numel), [&](int64_t r) { return from + r * quads; });
}

// The tensors' states back by a step, and what their coordinates are told.
__global__ void __launch_bounds__(kLevelThreads, 2)
    window_tensors_kernel(const __grid_constant__ HierarchicalWindowArgs args) {
  constexpr int inputs = kUnits + kInputs, quads = kSums / 4;
  __shared__ float x[inputs], h[kTensorUnits], z[kGlobalUnits];
  __shared__ LevelGradients d;
  const float* const meta = args.meta;
  const LevelRow to(args);
  const int thread = threadIdx.x;
  for (int index = blockIdx.x; index < args.entries; index += gridDim.x) {
    const HierarchicalEntry& entry = args.list[index];
    const float* const problem = args.problem_values + int64_t(entry.problem) * 32;
    const float* const d_means = args.d_means + int64_t(entry.problem) * 32;
    const float* const state = before_of(args, entry.state);
    float* const d_state = gradient_of(args, entry.state);
    float* const told = args.told + int64_t(index) * kTold;
    const double numel = double(entry.numel), product = chunk_totals(args, entry);
    const float4* const sums =
        reinterpret_cast<const float4*>(args.sums) + int64_t(entry.first_chunk) * quads;
    const double mean =
        add_rows<quads>(chunk_count(entry.numel), [&](int64_t r) { return sums + r * quads; });
    if (thread < inputs) x[thread] = float(mean / numel);
    if (thread < kTensorUnits) h[thread] = state[thread];
    if (thread < kGlobalUnits)
      z[thread] = args.global_states[int64_t(entry.problem) * kGlobalUnits + thread];
    __syncthreads();
    float injected = 0.0f, d_next = 0.0f;
    if (thread < 3 * kTensorUnits)
      injected = add_dot(meta + kMeta.global_to_tensor + thread * kGlobalUnits, z, kGlobalUnits,
                         meta[kMeta.global_to_tensor_bias + thread]);
    if (thread < kTensorUnits) d_next = d_state[thread] + d_means[thread];
    level_backward<inputs>(meta, kMeta.tensor, x, h, injected, d_next, to, d);
    if (thread < kTensorUnits) d_state[thread] = d.h[thread];
    if (thread < kGlobalUnits)
      args.d_injecting[int64_t(index) * kGlobalUnits + thread] = transposed_dot(
          meta + kMeta.global_to_tensor, d.gates, 3 * kTensorUnits, kGlobalUnits, thread);
    add_affine(to, kMeta.global_to_tensor, kMeta.global_to_tensor_bias, d.gates, z,
               3 * kTensorUnits, kGlobalUnits);
    if (thread < inputs) told[thread] = d.x[thread] / float(numel);
    if (thread < 3 * kUnits)
      told[kToldBiases + thread] = add_dot(meta + kMeta.tensor_to_param + thread * kTensorUnits, h,
                                           kTensorUnits, problem[thread]);
    if (thread == kProductSum)
      told[kMeanProduct] = float(product * double(args.inverse_rms[index]) / numel);
    if (thread == 0) {
      told[kRateGradient] = d_means[kTensorUnits];
      told[kMeanRate] = problem[3 * kUnits];
      told[kInverseRms] = args.inverse_rms[index];
    }
    __syncthreads();  // before x, h and z are written again
  }
}

// From the sums of preactivations' gradients to the states that injected the biases.
__global__ void __launch_bounds__(kLevelThreads, 2)
    window_injected_kernel(const __grid_constant__ HierarchicalWindowArgs args) {
  constexpr int rows = 3 * kUnits;
  __shared__ float d[rows], h[kTensorUnits], z[kGlobalUnits];
  const float* const meta = args.meta;
  const LevelRow to(args);
  const int thread = threadIdx.x;
  for (int index = blockIdx.x; index < args.entries; index += gridDim.x) {
    const HierarchicalEntry& entry = args.list[index];
    const double total = chunk_totals(args, entry);
    float* const d_state = gradient_of(args, entry.state);
    if (thread < rows) d[thread] = float(total);
    // Of the centred log rates: the problem's block sums it up.
    if (thread == kCentredSum) d_state[kTensorUnits] = float(total);
    if (thread < kTensorUnits) h[thread] = before_of(args, entry.state)[thread];
    if (thread < kGlobalUnits)
      z[thread] = args.global_states[int64_t(entry.problem) * kGlobalUnits + thread];
    __syncthreads();
    if (thread < kTensorUnits)
      d_state[thread] +=
          transposed_dot(meta + kMeta.tensor_to_param, d, rows, kTensorUnits, thread);
    if (thread < kGlobalUnits)
      args.d_injecting[int64_t(index) * kGlobalUnits + thread] +=
          transposed_dot(meta + kMeta.global_to_param, d, rows, kGlobalUnits, thread);
    add_affine(to, kMeta.tensor_to_param, kMeta.tensor_to_param_bias, d, h, rows, kTensorUnits);
    add_affine(to, kMeta.global_to_param, kMeta.global_to_param_bias, d, z, rows, kGlobalUnits);
    __syncthreads();  // before d, h and z are written again
  }
}

}  // namespace fastl2o::cuda
