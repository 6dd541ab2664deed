// The torch-free host API of the hierarchical rule's CUDA kernels, as kernels.h is of the other
// rules': functions launch on `stream` and return a cudaError_t as int.
#pragma once

#include <cstdint>

#include "hierarchical_config.h"
#include "kernel_args.h"

namespace fastl2o::cuda {

// One tensor of the optimizer: contiguous, `numel` coordinates.
struct HierarchicalTensor {
  void* param;   // param_dtype, read and written
  void* grad;    // param_dtype, read; written back unscaled when there is a grad scale
  void* planes;  // planes_dtype, (state_planes, numel), read and written
  float* state;  // the tensor GRU's (tensor_size) and last the mean of its log rates
  float* step;   // steps already taken, incremented
  int64_t numel;
  DType param_dtype;
  int64_t problem;  // row of the global states
  double lr;
  double weight_decay;
};

struct HierarchicalOptions {
  bool maximize = false;
  int nonfinite = 0;                // 0 pass, 1 skip, 2 raise
  DType planes_dtype = DType::f32;  // f32 or bf16
  const float* grad_scale = nullptr;
  const float* found_inf = nullptr;
  // As StepOptions::nonfinite_flags.
  int* nonfinite_flags = nullptr;
  bool stochastic_rounding = false;  // of bf16 planes, from `seed`, which each step must change
  uint64_t seed = 0;
};

// Whether the CUDA kernels take these sizes; Triton takes the others.
bool supported(const HierarchicalConfig& config);

class HierarchicalPlan;  // hierarchical_plan.h: of the tensors of a step, and its workspace

// global_states: (problems, global_size), read and written. `workspace`: plan.workspace_bytes(),
// 16-byte aligned; need not be kept between steps.
int hierarchical_step(const HierarchicalPlan& plan, const float* meta, float* global_states,
                      const HierarchicalOptions& options, void* workspace, void* stream);

// The backward of a window, whose steps are done again; hierarchical_window.h has what it is made
// of.
class HierarchicalWindow;
int hierarchical_unroll_backward(const HierarchicalWindow& window, void* stream);

// Parts of that: puts all entries where args.list is; a step in place without parameters.
struct HierarchicalArgs;
int hierarchical_send(const HierarchicalPlan& plan, const HierarchicalArgs& args, void* stream);
int hierarchical_replay(const HierarchicalArgs& args, void* stream);

}  // namespace fastl2o::cuda
