// The hierarchical rule's matrices, transposed and padded for the kernels.
#include <cmath>
#include <cstring>

#include "hierarchical_pass.h"

namespace fastl2o::cpu {
namespace {

// Columns [first, first + count) of a matrix (rows, columns), one after the other, each `stride`
// floats.
float* pack_columns(const float* matrix, int rows, int columns, int first, int count, int stride,
                    float* to) {
  for (int k = first; k < first + count; ++k, to += stride)
    for (int r = 0; r < stride; ++r) to[r] = r < rows ? matrix[int64_t(r) * columns + k] : 0.0f;
  return to;
}

PackedMatrix pack_matrix(const float* matrix, const float* bias, int rows, int columns,
                         float*& to) {
  const PackedMatrix packed{to, to + int64_t(columns) * padded(rows), rows, columns};
  to = pack_columns(matrix, rows, columns, 0, columns, padded(rows), to);
  to = pack_columns(bias, rows, 1, 0, 1, padded(rows), to);
  return packed;
}

PackedGru pack_gru(const float* meta, const GruLayout& at, int inputs, int size, float*& to) {
  const PackedMatrix gates =
      pack_matrix(meta + at.gates, meta + at.gates_bias, 2 * size, inputs + size, to);
  const PackedMatrix candidate =
      pack_matrix(meta + at.candidate, meta + at.candidate_bias, size, inputs + size, to);
  return {gates, candidate, inputs, size};
}

// The weights (rows, F) of the features as the tiles of the sweep have them, times `scale`: without
// the share that the centred logarithms' weights have in common, which counts for nothing.
float* pack_sweep_inputs(const float* matrix, int rows, int columns, int scales, double scale,
                         float* to) {
  const int logs = 2 * scales - 1, features = 3 * scales;
  for (int k = 0; k < features; ++k) {
    if (k == logs + scales - 1) continue;
    for (int r = 0; r < rows; ++r) {
      const float* row = matrix + int64_t(r) * columns;
      double weight = row[k];
      if (k >= logs && k < logs + scales)
        for (int s = 0; s < scales; ++s) weight -= double(row[logs + s]) / scales;
      *to++ = float(scale * weight);
    }
  }
  return to;
}

// Columns of the state, likewise scaled.
float* pack_sweep_states(const float* matrix, int rows, int columns, int first, int count,
                         double scale, float* to) {
  for (int k = first; k < first + count; ++k)
    for (int r = 0; r < rows; ++r) *to++ = float(scale * matrix[int64_t(r) * columns + k]);
  return to;
}

int64_t packed_size(int rows, int columns) { return int64_t(padded(rows)) * (columns + 1); }

int64_t packed_size(const HierarchicalConfig& c) {
  const int H = c.param_size, K = c.tensor_size, Z = c.global_size, F = c.num_features();
  const int64_t tiles = 3 * H * (F + H) + 3 * H + 3 * H * (sweep_inputs(c) + H);
  const int64_t grus = packed_size(2 * K, H + F + K) + packed_size(K, H + F + K) +
                       packed_size(2 * Z, K + Z) + packed_size(Z, K + Z);
  return tiles + grus + packed_size(3 * H, K) + packed_size(3 * H, Z) + packed_size(3 * K, Z);
}

}  // namespace

PackedStorage::PackedStorage(const HierarchicalConfig& config, const float* meta)
    : memory(size_t(packed_size(config))), rule{config, HierarchicalLayout(config), meta} {
  const int H = config.param_size, K = config.tensor_size, Z = config.global_size;
  const int F = config.num_features();
  const HierarchicalLayout& at = rule.layout;
  float* to = memory.data();
  rule.param_gates = to;
  to = pack_columns(meta + at.param.gates, 2 * H, F + H, F, H, 2 * H, to);
  to = pack_columns(meta + at.param.gates, 2 * H, F + H, 0, F, 2 * H, to);
  rule.param_candidate = to;
  to = pack_columns(meta + at.param.candidate, H, F + H, 0, F + H, H, to);
  rule.param_bias = to;
  to = pack_columns(meta + at.param.gates_bias, 2 * H, 1, 0, 1, 2 * H, to);
  to = pack_columns(meta + at.param.candidate_bias, H, 1, 0, 1, H, to);
  // Gates come as exponents of 2: sigmoid(x) = 1 / (1 + 2^y), tanh(x) = (2^y - 1) / (2^y + 1).
  const double gate_scale = -1.4426950408889634, candidate_scale = 2.8853900817779268;
  rule.sweep_gates = to;
  to = pack_sweep_states(meta + at.param.gates, 2 * H, F + H, F, H, gate_scale, to);
  to = pack_sweep_inputs(meta + at.param.gates, 2 * H, F + H, config.num_scales, gate_scale, to);
  rule.sweep_candidate = to;
  to = pack_sweep_inputs(meta + at.param.candidate, H, F + H, config.num_scales, candidate_scale,
                         to);
  to = pack_sweep_states(meta + at.param.candidate, H, F + H, F, H, candidate_scale, to);
  rule.tensor = pack_gru(meta, at.tensor, H + F, K, to);
  rule.global = pack_gru(meta, at.global, K, Z, to);
  rule.tensor_to_param =
      pack_matrix(meta + at.tensor_to_param, meta + at.tensor_to_param_bias, 3 * H, K, to);
  rule.global_to_param =
      pack_matrix(meta + at.global_to_param, meta + at.global_to_param_bias, 3 * H, Z, to);
  rule.global_to_tensor =
      pack_matrix(meta + at.global_to_tensor, meta + at.global_to_tensor_bias, 3 * K, Z, to);
  rule.rate_momentum = float(1.0 / (1.0 + std::exp(-double(meta[at.rate_momentum]))));
}

const PackedHierarchical& PackedCache::get(const HierarchicalConfig& config, const float* meta) {
  const size_t count = size_t(HierarchicalLayout(config).total);
  // Bit for bit, so that NaN is equal to itself.
  const bool same = packed_.has_value() && packed_->rule.config == config &&
                    std::memcmp(packed_from_.data(), meta, count * sizeof(float)) == 0;
  if (!same) {
    packed_.reset();
    packed_from_.assign(meta, meta + count);
    packed_.emplace(config, meta);
  }
  packed_->rule.meta = meta;
  return packed_->rule;
}

}  // namespace fastl2o::cpu
