// Lets tests/test_cuda_step.py call the host side of the CUDA step, compiled without CUDA.
#include <cstring>

#include "cuda_plan.h"
#include "step_layout.h"
#include "step_plan.h"

using namespace fastl2o;

namespace {
struct Launch {
  int64_t tiles;
  int32_t first_tensor, tensors, counters, unused;
};
}  // namespace

extern "C" {

int args_bytes() { return sizeof(cuda::StepArgs); }

int shared_bytes(int rnnprop, int exact, int major) {
  const bool split = cuda::step_products(exact, major) == cuda::Products::tf32_split;
  // Multiply-adds take the room of rounded operands.
  using cuda::Products;
  if (rnnprop)
    return 4 * (split ? cuda::SharedLayout<true, Products::tf32_split>::kTotal
                      : cuda::SharedLayout<true, Products::tf32>::kTotal);
  return 4 * (split ? cuda::SharedLayout<false, Products::tf32_split>::kTotal
                    : cuda::SharedLayout<false, Products::tf32>::kTotal);
}

int threads(int exact, int state_bytes, int major) {
  return cuda::step_threads(cuda::step_products(exact, major), state_bytes, major);
}

// The arguments of every launch into `out`; returns their number.
int plan(int rnnprop, int log_sign, const double* constants, uint64_t meta,
         const cuda::StepTensor* tensors, int64_t count, double lr, double weight_decay,
         int maximize, int nonfinite, int param_dtype, int stochastic_rounding, uint64_t seed,
         uint64_t grad_scale, uint64_t found_inf, uint64_t flags, int capacity, char* out,
         Launch* launches) {
  cuda::StepOptions options = {};
  options.lr = lr;
  options.weight_decay = weight_decay;
  options.maximize = maximize;
  options.nonfinite = nonfinite;
  options.param_dtype = DType(param_dtype);
  options.stochastic_rounding = stochastic_rounding;
  options.seed = seed;
  options.grad_scale = reinterpret_cast<const float*>(grad_scale);
  options.found_inf = reinterpret_cast<const float*>(found_inf);
  options.nonfinite_flags = reinterpret_cast<int*>(flags);
  cuda::StepPlan plan(make_config(rnnprop, log_sign, constants),
                      reinterpret_cast<const float*>(meta), tensors, count, options);
  int made = 0;
  for (; made < capacity && plan.next(); ++made) {
    const cuda::StepArgs& args = plan.args();
    std::memcpy(out + made * sizeof args, &args, sizeof args);
    launches[made] = {args.tiles, args.first_tensor, args.tensors, args.counters, 0};
  }
  return made;
}

void plan_functional(int rnnprop, int log_sign, const double* constants, uint64_t meta,
                     int64_t numel, double first_step, uint64_t grad, uint64_t state,
                     uint64_t update, uint64_t new_state, char* out) {
  const cuda::StepArgs args = cuda::functional_args(
      make_config(rnnprop, log_sign, constants), reinterpret_cast<const float*>(meta), numel,
      first_step, reinterpret_cast<const float*>(grad), reinterpret_cast<const float*>(state),
      reinterpret_cast<float*>(update), reinterpret_cast<float*>(new_state));
  std::memcpy(out, &args, sizeof args);
}
}
