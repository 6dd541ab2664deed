// The derivatives of the levels above the parameters, in float64: a few thousand multiply-adds a
// tensor and step.
#pragma once

#include "hierarchical_config.h"

namespace fastl2o::cpu {

// d_x += weight^T d, and the gradient of the map itself; weight (rows, columns) by rows.
void affine_backward(const float* meta, int64_t weight, int64_t bias, int rows, int columns,
                     const float* x, const double* d, double* d_meta, double* d_x);

struct GruGradient {
  double x[kMaxUnits + kMaxFeatures];
  double h[kMaxUnits];
  double bias[3 * kMaxUnits];  // of what is injected, too
};

// From dL/d(next state); adds the gradient of the GRU's weights to d_meta.
void gru_backward(const float* meta, const GruLayout& at, int inputs, int size, const float* x,
                  const float* h, const float* injected, const double* d_next, double* d_meta,
                  GruGradient& out);

}  // namespace fastl2o::cpu
