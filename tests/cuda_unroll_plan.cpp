// Lets tests/test_cuda_unroll.py call the host side of the CUDA window backward, compiled without
// CUDA.
#include <cstring>

#include "cuda_plan.h"
#include "unroll_args.h"

using namespace fastl2o;

extern "C" {

int window_args_bytes() { return sizeof(cuda::WindowArgs); }
int window_threads() { return cuda::kWindowThreads; }
int window_shared_bytes(int rnnprop) {
  return 4 * (rnnprop ? cuda::WindowLayout<true>::kTotal : cuda::WindowLayout<false>::kTotal);
}

int64_t window_partials(int64_t runs, int64_t dim) {
  cuda::UnrollArgs args;
  args.runs = runs;
  args.dim = dim;
  return cuda::window_partials(args);
}

int64_t replay_floats(int rnnprop, int64_t steps) {
  RuleConfig config;
  config.family = rnnprop ? Family::rnnprop : Family::lstm;
  return cuda::replay_floats(config, steps);
}

// sizes: steps, rows, runs, dim. addresses: meta, then UnrollArgs' pointers in order.
void plan_window(int rnnprop, int log_sign, const double* constants, const int64_t* sizes,
                 double first_step, double lr, double weight_decay, const uint64_t* addresses,
                 char* out) {
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
  const cuda::WindowArgs window =
      cuda::window_args(make_config(rnnprop, log_sign, constants), pointer(0), args);
  std::memcpy(out, &window, sizeof window);
}
}
