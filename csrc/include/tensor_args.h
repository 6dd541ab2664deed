// What the ops of both libraries make of their tensors, against the LibTorch stable ABI: pointers,
// types, and windows whose shapes have been checked.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "kernel_args.h"
#include "rule_config.h"

namespace fastl2o {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline const float* floats(const Tensor& tensor) {
  return static_cast<const float*>(tensor.const_data_ptr());
}
inline float* mutable_floats(const Tensor& tensor) {
  return static_cast<float*>(tensor.mutable_data_ptr());
}

inline DType dtype_of(ScalarType type, const char* what) {
  switch (type) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: STD_TORCH_CHECK(false, what, " must be float32, float64, bfloat16 or float16");
  }
}

// Whether `tensor` has the shape of `like`, behind a first dimension of `planes` unless that is 0.
inline bool has_shape(const Tensor& tensor, const Tensor& like, int64_t planes) {
  const auto own = tensor.sizes(), other = like.sizes();
  const size_t ahead = planes == 0 ? 0 : 1;
  if (own.size() != other.size() + ahead || (ahead == 1 && own[0] != planes)) return false;
  return std::equal(other.begin(), other.end(), own.begin() + ahead);
}

// `state` or its gradient beside the gradient `grad` of its coordinates.
inline void check_planes(const RuleConfig& config, const Tensor& state, const Tensor& grad,
                         const char* name) {
  STD_TORCH_CHECK(has_shape(state, grad, config.state_planes()) || config.state_planes() == 0, name,
                  " must be ", config.state_planes(), " planes of the gradient's shape in front");
}

// The functional step's backward: a window of one step with dL/du given outright.
inline UnrollArgs step_window(const RuleConfig& config, const Tensor& d_update,
                              const Tensor& d_new_state, const Tensor& grad, const Tensor& state,
                              double step, const Tensor& d_grad, const Tensor& d_state,
                              const Tensor& d_meta) {
  STD_TORCH_CHECK(has_shape(d_update, grad, 0), "d_update must have the gradient's shape");
  check_planes(config, state, grad, "state");
  check_planes(config, d_new_state, grad, "d_new_state");
  UnrollArgs args;
  args.steps = args.rows = args.runs = 1;
  args.dim = grad.numel();
  args.first_step = step;
  args.grads = floats(grad);
  args.state = floats(state);
  args.d_update = floats(d_update);
  args.d_last_state = floats(d_new_state);
  args.d_meta = mutable_floats(d_meta);
  args.d_state = mutable_floats(d_state);
  args.d_grads = mutable_floats(d_grad);
  return args;
}

// A window of T steps records gradients (K, R, D) with loss weights (K, R), K = T or T + 1.
inline void check_recorded(const Tensor& grads, const Tensor& loss_weights, int64_t steps) {
  STD_TORCH_CHECK(grads.dim() == 3, "grads must be (K, runs, dim); it has ", grads.dim(),
                  " dimensions");
  const int64_t rows = grads.size(0), runs = grads.size(1);
  STD_TORCH_CHECK(steps >= 1 && (rows == steps || rows - 1 == steps), "steps is ", steps,
                  " but grads records ", rows, " gradients; accepted are steps or steps + 1");
  STD_TORCH_CHECK(
      loss_weights.dim() == 2 && loss_weights.size(0) == rows && loss_weights.size(1) == runs,
      "loss_weights must be (", rows, ", ", runs, ")");
}

// The gradients of a window's updates, (T, R, D), where they are given outright.
inline const float* given_updates(const std::optional<Tensor>& d_updates, const Tensor& grads,
                                  int64_t steps) {
  if (!d_updates.has_value()) return nullptr;
  const int64_t runs = grads.size(1), dim = grads.size(2);
  STD_TORCH_CHECK(d_updates->dim() == 3 && d_updates->size(0) == steps &&
                      d_updates->size(1) == runs && d_updates->size(2) == dim,
                  "d_updates must be (", steps, ", ", runs, ", ", dim, ")");
  return floats(*d_updates);
}

// A window of recorded gradients (K, R, D); with d_updates (T, R, D), which takes the place of the
// loss weights, dL/du_t is given outright. d_last_state is that of the state after the window, zero
// by default.
inline UnrollArgs recorded_window(const RuleConfig& config, const Tensor& grads,
                                  const Tensor& state, double step, const Tensor& loss_weights,
                                  int64_t steps, double lr, double weight_decay,
                                  const std::optional<Tensor>& d_updates,
                                  const std::optional<Tensor>& d_last_state, const Tensor& d_state,
                                  const Tensor& d_meta) {
  check_recorded(grads, loss_weights, steps);
  UnrollArgs args;
  args.rows = grads.size(0);
  args.runs = grads.size(1);
  args.dim = grads.size(2);
  args.steps = steps;
  STD_TORCH_CHECK(state.dim() == 3 && state.size(0) == config.state_planes() &&
                      state.size(1) == args.runs && state.size(2) == args.dim,
                  "state must be (", config.state_planes(), ", ", args.runs, ", ", args.dim,
                  "): the planes of grads' runs and coordinates");
  args.first_step = step;
  args.lr = lr;
  args.weight_decay = weight_decay;
  args.grads = floats(grads);
  args.state = floats(state);
  args.d_update = given_updates(d_updates, grads, steps);
  if (args.d_update == nullptr) args.loss_weights = floats(loss_weights);
  if (d_last_state.has_value()) {
    STD_TORCH_CHECK(has_shape(*d_last_state, state, 0), "d_last_state must have state's shape");
    args.d_last_state = floats(*d_last_state);
  }
  args.d_meta = mutable_floats(d_meta);
  args.d_state = mutable_floats(d_state);
  return args;
}

}  // namespace fastl2o
