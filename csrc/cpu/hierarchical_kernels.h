// The seam between the hierarchical rule's drivers and the code compiled per instruction set.
#pragma once

#include "hierarchical.h"

namespace fastl2o::cpu {

// Rows of the small matrices are padded to a multiple of the widest vector.
inline constexpr int kPad = 16;
inline constexpr int padded(int count) { return (count + kPad - 1) / kPad * kPad; }

// A matrix (rows, columns) stored by columns, each padded with zeros, and its bias.
struct PackedMatrix {
  const float* weight;
  const float* bias;
  int rows;
  int columns;
};

struct PackedGru {
  PackedMatrix gates, candidate;
  int inputs, size;
};

struct PackedHierarchical {
  HierarchicalConfig config;
  HierarchicalLayout layout;
  const float* meta;
  // The parameter GRU for the panels: columns (h, x) of its gates and (x, r h) of its candidate,
  // not padded.
  const float* param_gates = nullptr;
  const float* param_candidate = nullptr;
  const float* param_bias = nullptr;  // r, u, c
  // The same for the tiles of the sweep, whose rows are 2^y's exponents y and whose x has a column
  // less: of the centred logarithms' weights only what is orthogonal to their sum counts, so each
  // logarithm but the last enters less the last (`sweep_inputs` of them and the others).
  const float* sweep_gates = nullptr;
  const float* sweep_candidate = nullptr;
  PackedGru tensor = {}, global = {};
  PackedMatrix tensor_to_param = {}, global_to_param = {}, global_to_tensor = {};
  float rate_momentum = 0;  // the share of the old log rate in the new one
};

// Columns of x in a tile of the sweep.
constexpr int sweep_inputs(const HierarchicalConfig& c) { return c.num_features() - 1; }

// The coordinates [first, last) of one tensor in the first sweep: new planes and the step before it
// is normalised.
struct SweepBlock {
  const HierarchicalTensor* tensor;
  int64_t first, last;
  const float* bias;  // of the parameter GRU (3H), injected parts included
  float mean_log_rate;
  bool first_step;
  float* raw_step;  // of the whole tensor, written
  double* sums;     // (num_sums), written
};

// Rows of sums over coordinates and steps that make up the gradient of the parameters' level.
struct HierarchicalSums {
  int candidate, direction, shortcut, rate, square_decay, average_decay, rate_momentum;
  int log_rate_offset, total;

  explicit HierarchicalSums(const HierarchicalConfig& c) {
    const int inputs = c.param_size + c.num_features();
    candidate = 2 * c.param_size * inputs;          // after the gates (2H, h and x)
    direction = candidate + c.param_size * inputs;  // after the candidate (H, x and r h)
    shortcut = direction + c.param_size;
    rate = shortcut + c.num_scales;  // with its bias, as the two below
    square_decay = rate + c.param_size + 1;
    average_decay = square_decay + c.param_size + 1;
    rate_momentum = average_decay + c.param_size + 1;
    log_rate_offset = rate_momentum + 1;
    total = log_rate_offset + 1;
  }
};

// The derivative of one step on the coordinates [first, last) of a tensor; pointers are to the
// tensor's first coordinate.
struct BackwardBlock {
  int64_t numel, first, last;
  const float* grad;
  const float* planes;    // before the step
  const float* d_update;  // dL/du
  const float* raw_step;  // from the forward pass
  float* d_planes;        // of the new planes in, of the old planes out
  const float* bias;      // of the parameter GRU (3H), injected parts included
  const float* d_means;   // (H + F): what each coordinate gets through the tensor's means
  float inverse_rms;
  float mean_product;  // mean over the tensor of dL/dy y with y = d / rms
  float rate_shift;    // what each new log rate gets through the tensor's mean
  float mean_log_rate;
  bool first_step;
  float* sums;        // (HierarchicalSums, lanes), added to
  double* step_sums;  // (3H + 1), written: dL/d bias and dL/d of the last feature
};

struct HierarchicalKernels {
  int lanes;
  void (*sweep)(const PackedHierarchical&, const HierarchicalOptions&, const SweepBlock&);
  // theta <- (1 - lr wd) theta - lr raw_step / rms on [first, last).
  void (*apply)(const HierarchicalTensor&, int64_t first, int64_t last, const float* raw_step,
                float inverse_rms);
  // out (padded rows) <- bias + injected + weight x; `injected` is null or has (padded rows).
  void (*affine)(const PackedMatrix&, const float* x, const float* injected, float* out);
  // out <- the GRU's next state; `injected` (3 size) is null or added to the biases.
  void (*gru)(const PackedGru&, const float* x, const float* h, const float* injected, float* out);
  int64_t (*backward_scratch)(const HierarchicalConfig&);  // in floats
  void (*backward)(const PackedHierarchical&, const BackwardBlock&, float* scratch);
};

}  // namespace fastl2o::cpu
