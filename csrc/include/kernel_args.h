// What the kernels of every backend are told besides the rule. Free of torch and of any SIMD.
#pragma once

#include <cstdint>

namespace fastl2o {

enum class DType { f32, f64, bf16, f16 };

// One truncation window; see kernels/lstm/README.md for the identity it evaluates.
// R runs of D coordinates, N = R * D. Exactly one of loss_weights and d_update is given.
struct UnrollArgs {
  int64_t steps = 0;      // T
  int64_t rows = 0;       // K: T, or T + 1 when the gradient at the last point is recorded
  int64_t runs = 0;       // R
  int64_t dim = 0;        // D
  double first_step = 0;  // steps taken before the window (RNNprop's bias correction)
  double lr = 1.0;
  double weight_decay = 0.0;
  const float* grads = nullptr;         // (K, N)
  const float* state = nullptr;         // (S, N), before the window
  const float* loss_weights = nullptr;  // (K, R): w_t
  const float* d_update = nullptr;      // (T, N): dL/du_t given outright
  const float* d_last_state = nullptr;  // (S, N) or null for zero
  float* d_meta = nullptr;              // (M,), written
  float* d_state = nullptr;             // (S, N), written
  float* d_grads = nullptr;             // (T, N) or null: through the rule's inputs
};

}  // namespace fastl2o
