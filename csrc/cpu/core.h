// The torch-free CPU core: what the ops, the microbenchmarks and the tests of each instruction set
// call. Raw pointers and sizes only; threads come from the caller.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "kernel_args.h"
#include "rule_config.h"

#ifdef __FAST_MATH__
#error "-ffast-math breaks the handling of NaN and infinity; remove it from CXXFLAGS"
#endif

namespace fastl2o::cpu {

enum class NonFinite { pass = 0, skip = 1, raise = 2 };

// Runs body(begin, end) over disjoint ranges that cover [0, count), perhaps on several threads.
using RangeBody = std::function<void(int64_t, int64_t)>;
using ParallelFor = std::function<void(int64_t count, const RangeBody& body)>;

// One tensor of the optimizer: contiguous, `numel` coordinates.
struct StepTensor {
  void* param;  // param_dtype, read and written
  void* grad;   // param_dtype, read; written back unscaled when a grad scale is given
  void* state;  // state_dtype, (state_planes, numel), read and written
  float* step;  // steps already taken, incremented; null for rules that count none
  int64_t numel;
  DType param_dtype;
  // 1 / (1 - beta^t) for this step's t; filled in by step().
  float correction1 = 0;
  float correction2 = 0;
  uint32_t rounding_key = 0;  // of its place in the list; filled in by step() where it is needed
  int64_t meta_set = 0;       // which of several sets of meta-parameters steps it
};

struct StepOptions {
  DType state_dtype = DType::f32;  // f32 or bf16
  double lr = 1.0;
  double weight_decay = 0.0;
  bool maximize = false;
  bool unscale = false;  // the rule sees grad / grad_scale, which is also written back
  float grad_scale = 1.0f;
  NonFinite nonfinite = NonFinite::raise;
  bool stochastic_rounding = false;  // of a bf16 state, from `seed`, which each step must change
  uint64_t seed = 0;
  int64_t meta_sets = 1;  // rows of the meta-parameters; with several, no tile spans two tensors
};

struct TileKernels;

// The kernels of the best instruction set this processor has: "avx512", "avx2" or "baseline".
const TileKernels& best_kernels();
// The same by name; null when the processor or the build lacks it.
const TileKernels* find_kernels(const char* name);
const char* kernel_name(const TileKernels& kernels);

// Index of the first tensor whose gradient holds NaN or Inf, or -1. Nothing is changed then.
int64_t step(const TileKernels& kernels, const RuleConfig& config, const float* meta,
             std::vector<StepTensor>& tensors, const StepOptions& options,
             const ParallelFor& parallel_for);

// R runs of D coordinates: contiguous params and grads (R, D), states (R, S, D).
struct Runs {
  int64_t runs;
  int64_t dim;
  double step;  // steps that they have taken
  float* params;
  const float* grads;
  float* states;
};

// Steps each run by its own row of `meta` (R, M).
void step_runs(const TileKernels& kernels, const RuleConfig& config, const float* meta,
               const Runs& all, double lr, double weight_decay, const ParallelFor& parallel_for);

// The functional step of N coordinates: update (N,) and the next state (S, N).
void functional_step(const TileKernels& kernels, const RuleConfig& config, const float* meta,
                     int64_t numel, double first_step, const float* grad, const float* state,
                     float* update, float* new_state, const ParallelFor& parallel_for);

void unroll_backward(const TileKernels& kernels, const RuleConfig& config, const float* meta,
                     const UnrollArgs& args, const ParallelFor& parallel_for);

}  // namespace fastl2o::cpu
