// What the kernels of the hierarchical window backward get by value; host and device.
#pragma once

#include "hierarchical_args.h"

namespace fastl2o::cuda {

// Gradients of meta-parameters are added up in rows, each by one writer: of the parameters' level
// one for each warp of the sweep, its lanes' sums as they lie in registers; of the upper levels one
// for each block.
inline constexpr int kWindowWarps = 2;       // of a block of the sweep
inline constexpr int kMostSweepRows = 1056;  // 8 warps on each of 132 multiprocessors
inline constexpr int kMostLevelRows = 256;
inline constexpr int kLaneSums = kInputs + kUnits + 2;  // of each lane, in a row of the sweep's
inline constexpr int kSweepRow = 32 * kLaneSums;
inline constexpr int64_t kFirstLevel = kMeta.tensor.gates;  // meta-parameter of the upper levels
inline constexpr int64_t kLevelRow = kMeta.total - kFirstLevel;

// What the upper levels tell a tensor's coordinates: gradients of the new h and of the features by
// the tensor's means, the GRU's biases with what is injected, and `Told`.
inline constexpr int kToldBiases = kUnits + kInputs;
enum Told {
  kMeanProduct = kToldBiases + 3 * kUnits,  // mean(y' y)
  kRateGradient,                            // what is added to the new log rate's
  kMeanRate,                                // of the problem
  kInverseRms,
};
inline constexpr int kTold = 64;
static_assert(kInverseRms < kTold);

// Of a chunk: gradients of preactivations r, u and c, those of the centred log rates, and, before
// the sweep, the sum of the adjoint times the raw steps.
inline constexpr int kChunkSums = 32, kCentredSum = 3 * kUnits, kProductSum = kCentredSum + 1;
static_assert(kProductSum < kChunkSums);

struct HierarchicalWindowArgs {
  const float* meta;
  const HierarchicalEntry* list;  // whose pointers lie in the two buffers below
  float* current;                 // a state as the replay steps it: a call's rows, then global
                                  // states (runs, 20), then the entries' counts of steps
  const float* current_grads;     // (runs, coordinates)

  // The recorded step.
  const float* before;         // the state before it, as `current`
  const float* global_states;  // part of `before`
  const float* grads;          // (runs, coordinates)
  const float* raw;            // as HierarchicalArgs::raw, ..
  const float* sums;
  const float* inverse_rms;
  const float* states;
  const float* next_grads;    // of the step after it, or null; dL/du of this step, if given
  const float* next_weights;  // (runs,), of its losses; null if dL/du is given

  // Handed from launch to launch.
  float* d_rows;          // (runs, width), of the state
  float* adjoint;         // dL/d parameter, (runs, coordinates)
  float* chunk_sums;      // (chunks, kChunkSums)
  float* told;            // (entries, kTold)
  float* d_injecting;     // (entries, kGlobalUnits): parts of the gradient of a global state
  float* d_global;        // (runs, kGlobalUnits): its remaining part
  float* d_means;         // (runs, 32): of the mean of new tensor states; last of each log rate
  float* problem_values;  // as HierarchicalArgs::problem_values
  float* sweep_rows;      // (.., kSweepRow)
  float* level_rows;      // (.., kLevelRow)
  float* d_meta;

  int64_t width, coordinates;  // of a run
  int32_t entries, chunks, problems;
  int32_t sweep_row_count, level_row_count;
  float step, lr, keep;  // steps before the window; keep is 1 - lr weight_decay
  bool follows;          // a later step has handed something on
  bool closing;          // no step is left
};
static_assert(sizeof(HierarchicalWindowArgs) <= 4096, "kernel arguments of every architecture");

FASTL2O_BOTH const HierarchicalEntry* entries_of(const HierarchicalWindowArgs& args) {
  return args.list;
}

}  // namespace fastl2o::cuda
