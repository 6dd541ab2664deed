// Lets tests/test_cuda_unroll.py call the host side of the CUDA window backward, compiled without
// CUDA.
#include <algorithm>
#include <cstring>

#include "cuda_plan.h"
#include "unroll_args.h"

using namespace fastl2o;

extern "C" {

int window_args_bytes() { return sizeof(cuda::WindowArgs); }
// The plain kernel's.
int window_threads() { return cuda::kWindowThreads; }
int window_shared_bytes(int rnnprop, int major) {
  return 4 * (rnnprop ? cuda::WindowLayout<true>::shared_floats(major)
                      : cuda::WindowLayout<false>::shared_floats(major));
}

// The tensor-core kernel's where a block may have `available` bytes of shared memory: its Aside,
// the groups of a block, its threads and bytes.
void tensor_launch(int rnnprop, int exact, int available, int* out) {
  const cuda::TensorLaunch plan = rnnprop ? (exact ? cuda::tensor_launch<true, true>(available)
                                                   : cuda::tensor_launch<true, false>(available))
                                          : (exact ? cuda::tensor_launch<false, true>(available)
                                                   : cuda::tensor_launch<false, false>(available));
  out[0] = int(plan.aside);
  out[1] = plan.groups;
  out[2] = plan.groups * cuda::kGroupThreads;
  out[3] = plan.bytes;
}

int64_t window_partials(int64_t runs, int64_t dim, int major) {
  cuda::UnrollArgs args;
  args.runs = runs;
  args.dim = dim;
  return cuda::window_partials(args, major);
}

int64_t replay_floats(int rnnprop, int64_t steps, int major) {
  RuleConfig config;
  config.family = rnnprop ? Family::rnnprop : Family::lstm;
  return cuda::replay_floats(config, steps, major);
}

// sizes as for plan_window. Every rule of a family with two features.
int64_t scratch_floats(int rnnprop, int log_sign, const double* constants, const int64_t* sizes,
                       int major, int available) {
  cuda::UnrollArgs args;
  args.steps = sizes[0];
  args.runs = sizes[2];
  args.dim = sizes[3];
  return cuda::window_scratch_floats(make_config(rnnprop, log_sign, constants), args, major,
                                     available);
}

// At most `partials` of them, for tests of blocks that take several tiles.
// sizes: steps, rows, runs, dim. addresses: meta, then UnrollArgs' pointers in order.
void plan_window(int rnnprop, int log_sign, const double* constants, const int64_t* sizes,
                 double first_step, double lr, double weight_decay, int major, int64_t partials,
                 const uint64_t* addresses, char* out) {
  auto pointer = [&](int i) { return reinterpret_cast<float*>(addresses[i]); };
  cuda::UnrollArgs args;
  args.steps = sizes[0];
  args.rows = sizes[1];
  args.runs = sizes[2];
  args.dim = sizes[3];
  args.first_step = first_step;
  args.lr = lr;
  args.weight_decay = weight_decay;
  args.grads = pointer(1);
  args.state = pointer(2);
  args.loss_weights = pointer(3);
  args.d_update = pointer(4);
  args.d_last_state = pointer(5);
  args.d_meta = pointer(6);
  args.d_state = pointer(7);
  args.d_grads = pointer(8);
  args.scratch = pointer(9);
  cuda::WindowArgs window =
      cuda::window_args(make_config(rnnprop, log_sign, constants), pointer(0), args, major);
  window.partials = std::min(window.partials, partials);
  std::memcpy(out, &window, sizeof window);
}
}
