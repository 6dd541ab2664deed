// The torch-free host API of the CUDA kernels. All addresses are the current device's; every
// function only launches on `stream` (a cudaStream_t) and returns a cudaError_t as int, 0 for
// success.
#pragma once

#include <cstdint>

#include "kernel_args.h"
#include "rule_config.h"

namespace fastl2o::cuda {

// exact: at most twice the error of float32 torch. fast: TF32 products where the device has them,
// up to 3e-3 off in h and c.
enum class Precision { exact, fast };

// One tensor of the optimizer: contiguous, `numel` coordinates.
struct StepTensor {
  void* param;  // param_dtype, read and written
  void* grad;   // param_dtype, read; written back unscaled when there is a grad scale
  void* state;  // state_dtype, (state_planes, numel), read and written
  float* step;  // steps already taken, incremented; null for rules that count none
  int64_t numel;
};

struct StepOptions {
  double lr = 1.0;
  double weight_decay = 0.0;
  bool maximize = false;
  int nonfinite = 0;  // 0 pass, 1 skip, 2 raise
  DType param_dtype = DType::f32;
  DType state_dtype = DType::f32;  // f32 or bf16
  Precision precision = Precision::exact;
  bool stochastic_rounding = false;  // of a bf16 state, from `seed`, which each step must change
  uint64_t seed = 0;
  const float* grad_scale = nullptr;
  const float* found_inf = nullptr;
  // count + 1 ints unless nonfinite is 0: 1 for each tensor whose gradient holds NaN or Inf, then 1
  // if any does. With 2 nothing changes in that case; the caller reads the flags and raises.
  int* nonfinite_flags = nullptr;
};

struct UnrollArgs : fastl2o::UnrollArgs {
  float* scratch = nullptr;  // unroll_scratch_floats() floats
};

// Whether the CUDA kernels take this rule; others fall to Triton.
bool supported(const RuleConfig& config);

int step(const RuleConfig& config, const float* meta, const StepTensor* tensors, int64_t count,
         const StepOptions& options, void* stream);

// update (N,) and new_state (S, N) from grad (N,) and state (S, N), all float32.
int functional_step(const RuleConfig& config, const float* meta, int64_t numel, double first_step,
                    const float* grad, const float* state, float* update, float* new_state,
                    Precision precision, void* stream);

// Whether steps, runs and tiles of a window fit the kernels' 32-bit counters.
bool countable(const UnrollArgs& args);

int64_t unroll_scratch_floats(const RuleConfig& config, const UnrollArgs& args);
int unroll_backward(const RuleConfig& config, const float* meta, const UnrollArgs& args,
                    Precision precision, void* stream);

}  // namespace fastl2o::cuda
