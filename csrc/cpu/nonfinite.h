// The scan for NaN and Inf that precedes a step.
#pragma once

#include "core.h"

namespace fastl2o::cpu {

// Coordinates of all tensors laid end to end: tensor i owns [start[i], start[i + 1]).
template <typename T>
std::vector<int64_t> starts_of(const std::vector<T>& tensors) {
  std::vector<int64_t> starts(tensors.size() + 1, 0);
  for (size_t i = 0; i < tensors.size(); ++i) starts[i + 1] = starts[i] + tensors[i].numel;
  return starts;
}

// The tensor that holds coordinate `at`, skipping empty ones.
size_t owner_of(const std::vector<int64_t>& starts, int64_t at);

struct Gradient {
  const void* values;
  int64_t numel;
  DType dtype;
};

// For each gradient, whether it holds NaN or Inf.
std::vector<bool> find_nonfinite(const std::vector<Gradient>& grads,
                                 const ParallelFor& parallel_for);

// Applies the policy before a step: the index of the first bad tensor if it is to be raised, or -1
// after the bad ones have been dropped from the list if they are to be skipped.
template <typename T>
int64_t screen(NonFinite policy, std::vector<T>& tensors, const ParallelFor& parallel_for) {
  if (policy == NonFinite::pass || tensors.empty()) return -1;
  std::vector<Gradient> grads;
  grads.reserve(tensors.size());
  for (const T& tensor : tensors) grads.push_back({tensor.grad, tensor.numel, tensor.param_dtype});
  const std::vector<bool> bad = find_nonfinite(grads, parallel_for);
  size_t kept = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (bad[i] && policy == NonFinite::raise) return int64_t(i);
    if (!bad[i]) tensors[kept++] = tensors[i];
  }
  tensors.resize(kept);
  return -1;
}

}  // namespace fastl2o::cpu
