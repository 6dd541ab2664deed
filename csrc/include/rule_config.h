// The two coordinate-wise recurrent rules as plain data: sizes, constants and the order of their
// meta-parameters and state planes. Free of torch and of any SIMD, shared by every backend.
#pragma once

#include <cstdint>

namespace fastl2o {

enum class Family { lstm, rnnprop };

inline constexpr int kMaxHidden = 64;
inline constexpr int kMaxLayers = 3;
// RNNprop keeps its two moment averages in front of the recurrent planes.
inline constexpr int kMoments = 2;

struct RuleConfig {
  Family family = Family::lstm;
  int hidden_size = 20;
  int num_layers = 2;
  // LSTM rule: x1 = max(log(|g| + eps) / p, -1), x2 = clip(e^p g, -1, 1), or the raw gradient.
  bool log_sign = true;
  double p = 10.0;
  float eps = 0.0f;
  float output_scale = 0.1f;
  // RNNprop: theta += -step_size * tanh(readout).
  double beta1 = 0.95;
  double beta2 = 0.95;
  float step_size = 0.1f;

  bool is_rnnprop() const { return family == Family::rnnprop; }
  int num_features() const { return is_rnnprop() || log_sign ? 2 : 1; }
  // Inputs of the first layer: the features, or their projection.
  int num_inputs() const { return is_rnnprop() ? hidden_size : num_features(); }
  int layer_inputs(int layer) const { return layer == 0 ? num_inputs() : hidden_size; }
  int readout_inputs() const { return num_layers == 0 ? num_inputs() : hidden_size; }
  int num_moments() const { return is_rnnprop() ? kMoments : 0; }
  int state_planes() const { return num_moments() + 2 * num_layers * hidden_size; }
  // Planes of h and c of one layer inside the state.
  int h_plane(int layer) const { return num_moments() + 2 * layer * hidden_size; }
  int c_plane(int layer) const { return h_plane(layer) + hidden_size; }
};

// Offsets into the flat meta-parameter vector: [projection weight, bias], then per layer
// weight_ih (4H, in), weight_hh (4H, H), bias (4H) with gates i, f, g, o, then the readout's
// weight and bias. All row-major.
struct MetaLayout {
  int64_t projection_weight = 0;
  int64_t projection_bias = 0;
  int64_t weight_ih[kMaxLayers] = {};
  int64_t weight_hh[kMaxLayers] = {};
  int64_t bias[kMaxLayers] = {};
  int64_t readout_weight = 0;
  int64_t readout_bias = 0;
  int64_t total = 0;

  explicit MetaLayout(const RuleConfig& config) {
    const int64_t hidden = config.hidden_size;
    int64_t at = 0;
    auto take = [&at](int64_t count) {
      const int64_t start = at;
      at += count;
      return start;
    };
    if (config.is_rnnprop()) {
      projection_weight = take(hidden * config.num_features());
      projection_bias = take(hidden);
    }
    for (int layer = 0; layer < config.num_layers; ++layer) {
      weight_ih[layer] = take(4 * hidden * config.layer_inputs(layer));
      weight_hh[layer] = take(4 * hidden * hidden);
      bias[layer] = take(4 * hidden);
    }
    readout_weight = take(config.readout_inputs());
    readout_bias = take(1);
    total = at;
  }
};

}  // namespace fastl2o
