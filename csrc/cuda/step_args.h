// What one launch of the step kernels gets by value: constants of the rule and a table of tensors.
#pragma once

#include <cstdint>

namespace fastl2o::cuda {

// All addresses are the device's. 64 tensors keep the arguments below the 4 KB that every
// architecture takes.
inline constexpr int kTableSize = 64;
inline constexpr int kTile = 32;  // coordinates a warp handles at once

struct TensorEntry {
  void* param;
  void* grad;
  void* state;
  const float* step;  // steps taken before, or null: StepArgs::first_step
  int64_t numel;
  int64_t first_tile;  // tiles of the tensors before it in the table
};

// The rule's constants as the kernels multiply by them.
struct RuleNumbers {
  int32_t features;  // 1: the gradient itself, 2: log and sign
  float p, inverse_p, exp_p, eps;
  float output_scale;  // of the readout, or of its tanh; its sign included
  float beta1, beta2, one_minus_beta1, one_minus_beta2;
  float log_beta1[2], log_beta2[2];  // each in two parts
};

struct StepArgs : RuleNumbers {
  const float* meta;
  int32_t projection_weight, projection_bias;  // offsets into meta, as in MetaLayout
  int32_t weight_ih[2], weight_hh[2], bias[2];
  int32_t readout_weight, readout_bias;

  double keep, lr;  // theta <- keep theta + lr u
  float first_step;
  uint8_t param_dtype;  // a DType
  bool maximize, stochastic_rounding;
  bool update_only;  // the functional step: param <- u, gradients stay as they are
  uint64_t seed;
  int64_t state_shift;  // bytes from the old state to the new one, 0 in place
  const float* grad_scale;
  const float* found_inf;
  const int* skip;      // a flag per tensor of the table: leave it alone; or null
  const int* skip_all;  // a flag: leave all alone; or null

  int64_t tiles;
  int32_t tensors, first_tensor;  // in the table; its first one's number in the whole list
  // The launch before read these counters, so this one adds 1 to each (where its flag is 0).
  int32_t counters;
  const int* skip_counters;
  float* counter[kTableSize];
  TensorEntry table[kTableSize];
};
static_assert(sizeof(StepArgs) <= 4096, "kernel arguments of every architecture");

}  // namespace fastl2o::cuda
