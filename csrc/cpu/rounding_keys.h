// What the random bits of stochastic rounding depend on besides the place within a tensor.
#pragma once

#include <vector>

#include "rounding.h"

namespace fastl2o::cpu {

// Before any tensor is dropped from the list: its place there is what counts.
template <typename Options, typename T>
void set_rounding_keys(const Options& options, std::vector<T>& tensors) {
  if (!options.stochastic_rounding) return;
  for (size_t i = 0; i < tensors.size(); ++i)
    tensors[i].rounding_key = rounding_key(options.seed, uint32_t(i));
}

}  // namespace fastl2o::cpu
