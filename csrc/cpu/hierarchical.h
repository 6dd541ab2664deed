// The torch-free CPU core of the hierarchical rule, beside that of the coordinate-wise ones.
#pragma once

#include "core.h"
#include "hierarchical_config.h"

namespace fastl2o::cpu {

// One tensor of the optimizer: contiguous, `numel` coordinates.
struct HierarchicalTensor {
  void* param;   // param_dtype, read and written
  void* grad;    // param_dtype, read; written back unscaled when a grad scale is given
  void* planes;  // planes_dtype, (state_planes, numel), read and written
  float* state;  // the tensor GRU's (tensor_size) and last the mean of its log rates
  float* step;   // steps already taken, incremented
  int64_t numel;
  int64_t count;  // coordinates of the whole tensor: more than numel where it is split over ranks
  DType param_dtype;
  int64_t problem;  // row of the global states
  double lr;
  double weight_decay;
  uint32_t rounding_key = 0;  // as that of StepTensor
};

struct HierarchicalOptions {
  DType planes_dtype = DType::f32;  // f32 or bf16
  bool maximize = false;
  bool unscale = false;  // the rule sees grad / grad_scale, which is also written back
  float grad_scale = 1.0f;
  NonFinite nonfinite = NonFinite::raise;
  int64_t meta_sets = 1;  // rows of the meta-parameters: one for all problems, or one for each
  bool stochastic_rounding = false;  // of bf16 planes, from `seed`, which each step must change
  uint64_t seed = 0;
};

// The two halves of a step, for tensors that are split: between them the caller adds up `sums`
// (tensors, num_sums) over the parts. No tensor has a count of 0, and gradients are not screened.
// The first half writes planes, sums and `raw`, the tensors' raw steps end to end.
void hierarchical_sweep(const TileKernels& kernels, const HierarchicalConfig& config,
                        const float* meta, std::vector<HierarchicalTensor>& tensors,
                        const float* global_states, int64_t problems,
                        const HierarchicalOptions& options, const ParallelFor& parallel_for,
                        double* sums, float* raw);
// The second half writes parameters, tensor states, steps and global states.
void hierarchical_finish(const TileKernels& kernels, const HierarchicalConfig& config,
                         const float* meta, const std::vector<HierarchicalTensor>& tensors,
                         float* global_states, int64_t problems, const ParallelFor& parallel_for,
                         const double* sums, float* raw);

// Index of the first tensor whose gradient holds NaN or Inf, or -1. Nothing is changed then.
// global_states: (problems, global_size), read and written.
int64_t hierarchical_step(const TileKernels& kernels, const HierarchicalConfig& config,
                          const float* meta, std::vector<HierarchicalTensor>& tensors,
                          float* global_states, int64_t problems,
                          const HierarchicalOptions& options, const ParallelFor& parallel_for);

// One truncation window of R runs, each a problem of its own with tensors of the given sizes.
struct HierarchicalUnrollArgs {
  int64_t steps = 0;        // T
  int64_t rows = 0;         // K: T, or T + 1 when the gradient at the last point is recorded
  int64_t runs = 0;         // R
  bool from_start = false;  // the window's first step is the tensors' first
  double lr = 1.0;
  double weight_decay = 0.0;
  std::vector<int64_t> sizes;           // of each run's tensors, D in all
  const float* grads = nullptr;         // (K, R, D)
  const float* state = nullptr;         // (R, W), before the window
  const float* loss_weights = nullptr;  // (K, R)
  const float* d_updates = nullptr;     // (T, R, D) in place of loss_weights, or null
  float* d_meta = nullptr;              // (M,), written
  float* d_state = nullptr;             // (R, W), written
};

// W: the planes of each tensor, then the state of each, then the global state.
int64_t hierarchical_row_size(const HierarchicalConfig& config, const std::vector<int64_t>& sizes);

void hierarchical_unroll_backward(const TileKernels& kernels, const HierarchicalConfig& config,
                                  const float* meta, const HierarchicalUnrollArgs& args,
                                  const ParallelFor& parallel_for);

}  // namespace fastl2o::cpu
