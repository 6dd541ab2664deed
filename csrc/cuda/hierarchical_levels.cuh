// The levels above the parameters': a block for each tensor, a block for each problem.
#pragma once

#include "hierarchical_gru.cuh"
#include "hierarchical_tables.cuh"

namespace fastl2o::cuda {

// The second pass: sums, RMS, state and mean log rate of each tensor.
__global__ void __launch_bounds__(kLevelThreads)
    hierarchical_tensors_kernel(const __grid_constant__ HierarchicalArgs args) {
  constexpr int inputs = kUnits + kInputs;
  constexpr GruLayout layout = kMeta.tensor;
  __shared__ float x[inputs], h[kTensorUnits], z[kGlobalUnits];
  if (rests(args)) return;
  const HierarchicalEntry* const entries = entries_of(args);
  const int thread = threadIdx.x;
  for (int index = blockIdx.x; index < args.entries; index += gridDim.x) {
    const HierarchicalEntry& entry = entries[index];
    if (skipped(args, entry)) continue;
    const float4* const sums =
        reinterpret_cast<const float4*>(args.sums) + int64_t(entry.first_chunk) * (kSums / 4);
    const double mean = add_rows<kSums / 4>(chunk_count(entry.numel),
                                            [&](int64_t r) { return sums + r * (kSums / 4); }) /
                        double(entry.numel);
    if (thread < inputs) x[thread] = float(mean);
    if (thread == inputs) args.inverse_rms[index] = float(1.0 / sqrt(mean + double(kRmsEps)));
    if (thread == inputs + 1) entry.state[kTensorUnits] = float(mean);
    if (thread < kTensorUnits) h[thread] = entry.state[thread];
    if (thread < kGlobalUnits)
      z[thread] = args.global_states[int64_t(entry.problem) * kGlobalUnits + thread];
    __syncthreads();
    float injected = 0.0f;
    if (thread < 3 * kTensorUnits)
      injected = add_dot(args.meta + kMeta.global_to_tensor + thread * kGlobalUnits, z,
                         kGlobalUnits, args.meta[kMeta.global_to_tensor_bias + thread]);
    const float next = level_gru<inputs>(args.meta, layout, x, h, injected);
    if (thread < kTensorUnits) {
      entry.state[thread] = next;
      args.states[int64_t(index) * kTensorUnits + thread] = next;
    }
    if (thread == 0) *entry.step += 1.0f;
    __syncthreads();  // before x and h are written again
  }
}

// A problem's global state, from the new states of its tensors.
__device__ inline void step_global(const HierarchicalArgs& args, int problem) {
  constexpr GruLayout layout = kMeta.global;
  __shared__ float x[kTensorUnits], z[kGlobalUnits];
  const HierarchicalEntry* const entries = entries_of(args);
  const Range range = problem_entries(args, problem);
  int active = range.last - range.first;
  if (args.flags != nullptr) {
    active = 0;
    for (int i = range.first + int(threadIdx.x); i - int(threadIdx.x) < range.last;
         i += kLevelThreads)
      active += __syncthreads_count(i < range.last && !skipped(args, entries[i]));
  }
  if (active == 0) return;
  const float4* const states = reinterpret_cast<const float4*>(args.states);
  const double total = add_rows<kTensorUnits / 4>(range.last - range.first, [&](int64_t r) {
    const int64_t i = range.first + r;
    return skipped(args, entries[i]) ? nullptr : states + i * (kTensorUnits / 4);
  });
  float* const own = args.global_states + int64_t(problem) * kGlobalUnits;
  if (threadIdx.x < kTensorUnits) x[threadIdx.x] = float(total / active);
  if (threadIdx.x < kGlobalUnits) z[threadIdx.x] = own[threadIdx.x];
  __syncthreads();
  const float next = level_gru<kTensorUnits>(args.meta, layout, x, z, 0.0f);
  if (threadIdx.x < kGlobalUnits) own[threadIdx.x] = next;
}

// theta <- keep theta + lr u for a chunk; a float64 parameter is not rounded to float32 on the way.
__device__ __forceinline__ void apply_chunk(const HierarchicalArgs& args, int index, int chunk) {
  constexpr int together = 8;  // reads of a lane under way at once
  const HierarchicalEntry& entry = entries_of(args)[index];
  if (skipped(args, entry)) return;
  const Span span(entry, chunk);
  const DType dtype = DType(entry.dtype);
  void* const param = in_global_memory(entry.param);
  const float inverse_rms = args.inverse_rms[index];
  const float* const raw = args.raw + kRawUnit * int64_t(entry.first_raw) + span.first;
  for (int first = threadIdx.x % 32; first < span.size; first += 32 * together) {
    float update[together];
#pragma unroll
    for (int j = 0; j < together; ++j) {
      const int at = first + 32 * j;
      update[j] = at < span.size ? -inverse_rms * raw[at] : 0.0f;
    }
    if (dtype == DType::f64) {
      double* const theta = static_cast<double*>(param) + span.first;
      for (int j = 0; j < together; ++j) {
        const int at = first + 32 * j;
        if (at < span.size) theta[at] = entry.keep * theta[at] + entry.lr * double(update[j]);
      }
      continue;
    }
    const float keep = float(entry.keep), lr = float(entry.lr);
    float theta[together];
#pragma unroll
    for (int j = 0; j < together; ++j) {
      const int at = first + 32 * j;
      theta[j] = at < span.size ? load_element(param, dtype, span.first + at) : 0.0f;
    }
#pragma unroll
    for (int j = 0; j < together; ++j) {
      const int at = first + 32 * j;
      if (at < span.size)
        store_element(param, dtype, span.first + at, fmaf(keep, theta[j], lr * update[j]));
    }
  }
}

// The third pass: a block for each problem, then the parameters.
__global__ void __launch_bounds__(kLevelThreads)
    hierarchical_apply_kernel(const __grid_constant__ HierarchicalArgs args) {
  if (rests(args)) return;
  if (int(blockIdx.x) < args.problems) {
    step_global(args, blockIdx.x);
    return;
  }
  for_chunks(args, blockIdx.x - args.problems, gridDim.x - args.problems,
             [&](int, int index, int chunk) { apply_chunk(args, index, chunk); });
}

}  // namespace fastl2o::cuda
