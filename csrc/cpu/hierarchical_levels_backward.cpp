#include "hierarchical_levels_backward.h"

#include <algorithm>
#include <cmath>

namespace fastl2o::cpu {
namespace {

constexpr int kMaxInputs = 2 * kMaxUnits + kMaxFeatures;

// bias + weight [x, h] of one row.
double row_of(const float* row, double bias, const double* input, int width) {
  double sum = bias;
  for (int j = 0; j < width; ++j) sum += double(row[j]) * input[j];
  return sum;
}

void row_backward(const float* row, const double* input, double d, int width, double* d_row,
                  double* d_input) {
  for (int j = 0; j < width; ++j) {
    d_input[j] += double(row[j]) * d;
    d_row[j] += d * input[j];
  }
}

}  // namespace

void affine_backward(const float* meta, int64_t weight, int64_t bias, int rows, int columns,
                     const float* x, const double* d, double* d_meta, double* d_x) {
  double input[kMaxUnits];
  std::copy_n(x, columns, input);
  for (int k = 0; k < rows; ++k) {
    const int64_t row = weight + int64_t(k) * columns;
    row_backward(meta + row, input, d[k], columns, d_meta + row, d_x);
    d_meta[bias + k] += d[k];
  }
}

void gru_backward(const float* meta, const GruLayout& at, int inputs, int size, const float* x,
                  const float* h, const float* injected, const double* d_next, double* d_meta,
                  GruGradient& out) {
  const int width = inputs + size;
  double xh[kMaxInputs], xrh[kMaxInputs], gate[2 * kMaxUnits], c[kMaxUnits];
  double d_xh[kMaxInputs] = {}, d_xrh[kMaxInputs] = {};
  std::copy_n(x, inputs, xh);
  std::copy_n(h, size, xh + inputs);
  std::copy_n(x, inputs, xrh);
  auto bias = [&](int64_t own, int k) {
    return double(meta[own]) + (injected == nullptr ? 0.0 : double(injected[k]));
  };
  for (int k = 0; k < 2 * size; ++k)
    gate[k] = 1.0 / (1.0 + std::exp(-row_of(meta + at.gates + int64_t(k) * width,
                                            bias(at.gates_bias + k, k), xh, width)));
  for (int k = 0; k < size; ++k) xrh[inputs + k] = gate[k] * double(h[k]);
  for (int k = 0; k < size; ++k)
    c[k] = std::tanh(row_of(meta + at.candidate + int64_t(k) * width,
                            bias(at.candidate_bias + k, 2 * size + k), xrh, width));
  double *d_gate = out.bias, *d_c = out.bias + 2 * size;
  for (int k = 0; k < size; ++k) {
    const double u = gate[size + k];
    d_c[k] = d_next[k] * (1.0 - u) * (1.0 - c[k] * c[k]);
    d_gate[size + k] = d_next[k] * (double(h[k]) - c[k]) * u * (1.0 - u);
    const int64_t row = at.candidate + int64_t(k) * width;
    row_backward(meta + row, xrh, d_c[k], width, d_meta + row, d_xrh);
    d_meta[at.candidate_bias + k] += d_c[k];
  }
  for (int k = 0; k < size; ++k)
    d_gate[k] = d_xrh[inputs + k] * double(h[k]) * gate[k] * (1.0 - gate[k]);
  for (int k = 0; k < 2 * size; ++k) {
    const int64_t row = at.gates + int64_t(k) * width;
    row_backward(meta + row, xh, d_gate[k], width, d_meta + row, d_xh);
    d_meta[at.gates_bias + k] += d_gate[k];
  }
  for (int k = 0; k < inputs; ++k) out.x[k] = d_xh[k] + d_xrh[k];
  for (int k = 0; k < size; ++k)
    out.h[k] = d_next[k] * gate[size + k] + d_xrh[inputs + k] * gate[k] + d_xh[inputs + k];
}

}  // namespace fastl2o::cpu
