// What the CPU ops of every family make of their arguments, against the LibTorch stable ABI.
#pragma once

#include <optional>

#include "core.h"
#include "tensor_args.h"

namespace fastl2o {

// Checked before it is narrowed.
inline int small_number(int64_t value, int64_t least, int64_t most, const char* name) {
  STD_TORCH_CHECK(value >= least && value <= most, name, " is ", value, "; the CPU kernels accept ",
                  least, " to ", most);
  return int(value);
}

inline void check_floats(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous(), name,
                  " must be contiguous float32 for the CPU kernels; other types go through the "
                  "reference backend");
}

// The one number of an optional argument.
inline std::optional<float> scalar_of(const std::optional<Tensor>& tensor, const char* name) {
  if (!tensor.has_value()) return std::nullopt;
  check_floats(*tensor, name);
  STD_TORCH_CHECK(tensor->numel() == 1, name, " holds ", tensor->numel(), " numbers; expected 1");
  return *floats(*tensor);
}

inline cpu::NonFinite nonfinite_of(int64_t value) {
  STD_TORCH_CHECK(value >= 0 && value <= 2, "nonfinite is ", value,
                  "; accepted are 0 (pass), 1 (skip) and 2 (raise)");
  return cpu::NonFinite(value);
}

// `bad`: what a step returned, the index of the gradient that stopped it or -1.
inline void check_finite(int64_t bad) {
  STD_TORCH_CHECK(bad < 0, "gradient ", bad,
                  " of the list holds NaN or Inf; nothing was changed. Mend the loss, or choose "
                  "nonfinite='skip' (leave such tensors alone) or 'pass' (feed them to the rule)");
}

// Sets of meta-parameters: 1 of a vector, or the rows of a matrix, one for each of `count` things.
inline int64_t meta_sets(const Tensor& meta, int64_t count, const char* things) {
  if (meta.dim() == 1) return 1;
  STD_TORCH_CHECK(meta.dim() == 2 && meta.size(0) == count,
                  "meta must be a vector of meta-parameters, or a matrix with a row for each of ",
                  count, " ", things);
  return count;
}

inline void parallel_for(int64_t count, const cpu::RangeBody& body) {
  torch::stable::parallel_for(0, count, 1, body);
}

}  // namespace fastl2o
