// What the kernels of the hierarchical step get by value, and how tensors are cut up; host and
// device.
#pragma once

#include <cstdint>

#include "both.h"
#include "hierarchical_config.h"

namespace fastl2o::cuda {

// The sizes that the kernels are compiled for.
inline constexpr HierarchicalConfig kSizes{};
inline constexpr HierarchicalLayout kMeta{kSizes};
inline constexpr int kUnits = 10, kScales = 4, kInputs = 12;  // of the parameters' level
inline constexpr int kAverages = kSizes.averages_plane(), kSquares = kSizes.squares_plane();
inline constexpr int kLogRate = kSizes.log_rate_plane();
inline constexpr int kTensorUnits = 20, kGlobalUnits = 20, kSums = 24;
static_assert(kSizes.param_size == kUnits && kSizes.num_scales == kScales &&
              kSizes.num_features() == kInputs && kSizes.tensor_size == kTensorUnits &&
              kSizes.global_size == kGlobalUnits && kSizes.num_sums() == kSums);

// A warp sums over a chunk: at least 256 coordinates, so that few sums are written, and more where
// a tensor would have more than 8,192 of them. Depends on the tensor alone, as do the sums' bits.
// A power of two, so that nothing is divided by it, which on devices is a call.
FASTL2O_BOTH int chunk_bits(int64_t numel) {
  int bits = 8;
  while (numel > int64_t(8192) << bits) ++bits;
  return bits;
}
FASTL2O_BOTH int64_t chunk_size(int64_t numel) { return int64_t(1) << chunk_bits(numel); }
FASTL2O_BOTH int64_t chunk_count(int64_t numel) {
  const int bits = chunk_bits(numel);
  return (numel + (int64_t(1) << bits) - 1) >> bits;
}

// Raw steps lie in the workspace in units of this many, so that every tensor's are aligned.
inline constexpr int64_t kRawUnit = 64;

struct HierarchicalEntry {
  void* param;
  void* grad;
  void* planes;
  float* state;
  float* step;
  int64_t numel;  // at least 1
  double keep, lr;
  uint32_t first_raw;   // of its raw steps, in units
  int32_t first_chunk;  // chunks of the entries before it
  int32_t problem;
  uint32_t index : 30;  // in the caller's lists, of its flag
  uint32_t dtype : 2;   // a DType, of param and grad
};

// Entries are ordered by problem, so that a problem's are a range.
inline constexpr int kEntries = 48;

struct HierarchicalArgs {
  const float* meta;
  float* global_states;
  const float* grad_scale;
  const float* found_inf;
  int* flags;     // of the caller's tensors: the gradient holds NaN or Inf; or null
  int* any;       // whether one of them is set; then all are left alone. Or null
  uint64_t seed;  // of stochastic rounding
  // The workspace.
  float* raw;               // steps before they are normalised
  float* sums;              // (chunks, kSums)
  float* inverse_rms;       // of each entry
  float* states;            // of each entry, the new tensor state (kTensorUnits)
  float* problem_values;    // (problems, 32), see hierarchical_tables.cuh; or null
  HierarchicalEntry* list;  // all entries where they do not fit below, else null

  int32_t entries, chunks, problems;
  bool maximize;
  int32_t first, count;  // of the entries below in `list`, where they are on their way there
  HierarchicalEntry table[kEntries];
};
static_assert(sizeof(HierarchicalArgs) <= 4096, "kernel arguments of every architecture");

}  // namespace fastl2o::cuda
