// Which tensors a launch works on, and what the tensors of a problem share.
#pragma once

#include "hierarchical_args.h"
#include "state_io.cuh"

namespace fastl2o::cuda {

__device__ __forceinline__ const HierarchicalEntry* entries_of(const HierarchicalArgs& args) {
  return args.list != nullptr ? args.list : args.table;
}

// What the compiler cannot know of addresses that it finds in the list.
template <typename T>
__device__ __forceinline__ T* in_global_memory(T* pointer) {
  __builtin_assume(__isGlobal(pointer));
  return pointer;
}

// Nothing is to be done at all.
__device__ __forceinline__ bool rests(const HierarchicalArgs& args) {
  return (args.found_inf != nullptr && *args.found_inf != 0.0f) ||
         (args.any != nullptr && *args.any != 0);
}

__device__ __forceinline__ bool skipped(const HierarchicalArgs& args,
                                        const HierarchicalEntry& entry) {
  return args.flags != nullptr && args.flags[entry.index] != 0;
}

// The first entry in [low, high) for which `before` does not hold; it holds for all below that.
template <typename Before>
__device__ __forceinline__ int first_entry(int low, int high, Before before) {
  while (low < high) {
    const int middle = (low + high) / 2;
    if (before(middle))
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

struct Range {
  int first, last;
};

template <typename Args>
__device__ __forceinline__ Range problem_entries(const Args& args, int problem) {
  const auto below = [&](int limit) {
    return first_entry(0, args.entries, [&](int i) { return entries_of(args)[i].problem < limit; });
  };
  return {below(problem), below(problem + 1)};
}

// The coordinates of a chunk of an entry.
struct Span {
  int64_t first;
  int size;

  __device__ __forceinline__ Span(const HierarchicalEntry& entry, int chunk) {
    const int64_t most = chunk_size(entry.numel);
    first = (chunk - entry.first_chunk) * most;
    size = int(min(most, entry.numel - first));
  }
};

// Calls visit(entry before or -1, entry, chunk). Neighbouring chunks go to different blocks, so
// that a few of them already fill the device.
template <typename Args, typename Visit>
__device__ __forceinline__ void for_chunks(const Args& args, unsigned block, unsigned blocks,
                                           Visit visit) {
  int index = -1;
  for (unsigned chunk = block + threadIdx.x / 32 * blocks; chunk < unsigned(args.chunks);
       chunk += blockDim.x / 32 * blocks) {
    const HierarchicalEntry* const entries = entries_of(args);
    const int before = index;
    if (index < 0 || (index + 1 < args.entries && int(chunk) >= entries[index + 1].first_chunk))
      index = first_entry(index + 1, args.entries,
                          [&](int i) { return entries[i].first_chunk <= int(chunk); }) -
              1;
    visit(before, index, int(chunk));
  }
}

// Log rates of a problem's tensors, summed in proportion to their sizes.
struct RateSum {
  double coordinates = 0.0, rates = 0.0;

  __device__ __forceinline__ void add(const HierarchicalArgs& args,
                                      const HierarchicalEntry& entry) {
    if (!skipped(args, entry)) add(entry.numel, entry.state[kTensorUnits]);
  }
  __device__ __forceinline__ void add(int64_t numel, float rate) {
    coordinates += double(numel);
    rates += double(numel) * double(rate);
  }
  __device__ __forceinline__ void add_lanes() {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      coordinates += __shfl_xor_sync(0xffffffffu, coordinates, offset);
      rates += __shfl_xor_sync(0xffffffffu, rates, offset);
    }
  }
  __device__ __forceinline__ float mean() const {
    return coordinates == 0.0 ? 0.0f : float(rates / coordinates);
  }
};

// Over a problem's entries, of which add(sum, entry) adds one, by a whole block of Threads. The
// order depends on their number alone: as many as fit a launch's arguments are added as a warp does
// it in problem_values, so that a problem's bits do not depend on the company it has.
template <int Threads, typename Add>
__device__ __forceinline__ RateSum sum_rates(Range range, Add add) {
  __shared__ RateSum sums[Threads / 32];
  const int lane = threadIdx.x % 32;
  const int adding = range.last - range.first <= kEntries ? 32 : Threads;
  RateSum sum;
  if (int(threadIdx.x) < adding)
    for (int i = range.first + int(threadIdx.x); i < range.last; i += adding) add(sum, i);
  sum.add_lanes();
  if (lane == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = lane < Threads / 32 ? sums[lane] : RateSum{};
  __syncthreads();
  sum.add_lanes();
  return sum;
}

// What all tensors of a problem inject into the parameters' GRU at a preactivation (r, u, c): its
// bias, those of the maps, and the global state's part. Then, as one more row, their mean log rate.
template <typename Args>
__device__ __forceinline__ float problem_value(const Args& args, int problem, int row,
                                               const RateSum& rates) {
  if (row >= 3 * kUnits) return row == 3 * kUnits ? rates.mean() : 0.0f;
  const float* meta = args.meta;
  const float* state = args.global_states + int64_t(problem) * kGlobalUnits;
  const float* weight = meta + kMeta.global_to_param + row * kGlobalUnits;
  float sum = row < 2 * kUnits ? meta[kMeta.param.gates_bias + row]
                               : meta[kMeta.param.candidate_bias + row - 2 * kUnits];
  sum += meta[kMeta.tensor_to_param_bias + row] + meta[kMeta.global_to_param_bias + row];
  for (int k = 0; k < kGlobalUnits; ++k) sum = fmaf(weight[k], state[k], sum);
  return sum;
}

// For each lane of a warp its row's bias; the last two lanes hold the mean log rate and nothing.
__device__ __forceinline__ float problem_values(const HierarchicalArgs& args, int problem) {
  const int lane = threadIdx.x % 32;
  if (args.problem_values != nullptr) return args.problem_values[int64_t(problem) * 32 + lane];
  RateSum sum;
  const Range range = problem_entries(args, problem);
  for (int i = range.first + lane; i < range.last; i += 32) sum.add(args, entries_of(args)[i]);
  sum.add_lanes();
  return problem_value(args, problem, lane, sum);
}

}  // namespace fastl2o::cuda
