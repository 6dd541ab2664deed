// The weights of the parameters' level as a block's shared memory holds them.
#pragma once

#include "hierarchical_args.h"

namespace fastl2o::cuda {

inline constexpr int kColumns = kInputs + kUnits;

// Of preactivation r, u or c: weights of x, of h or r h; then for r of unit j decays' readouts of
// h_j (squares, averages), for c those of the direction and the rate.
using ParamRows = float[3 * kUnits][kColumns + 2];

__device__ inline void load_rows(const float* meta, ParamRows& rows) {
  for (int i = threadIdx.x; i < 3 * kUnits * (kColumns + 2); i += blockDim.x) {
    const int row = i / (kColumns + 2), column = i % (kColumns + 2), unit = row % kUnits;
    const bool candidate = row >= 2 * kUnits;
    int64_t from = kMeta.param.gates + row * kColumns + column;
    if (candidate) from = kMeta.param.candidate + unit * kColumns + column;
    if (column == kColumns) from = unit + (candidate ? kMeta.direction : kMeta.square_decay);
    if (column > kColumns) from = unit + (candidate ? kMeta.rate : kMeta.average_decay);
    rows[row][column] = meta[from];
  }
}

}  // namespace fastl2o::cuda
