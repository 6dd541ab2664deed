// The hierarchical rule as plain data: sizes, the order of its state planes and of its
// meta-parameters. Free of torch and of any SIMD, shared by every backend.
#pragma once

#include <cstdint>

namespace fastl2o {

inline constexpr int kMaxUnits = 64;  // of each level
inline constexpr int kMaxScales = 8;
inline constexpr int kMaxFeatures = 3 * kMaxScales;
// Added to a mean square under a root, and to every square that is averaged.
inline constexpr float kRmsEps = 1e-16f;
inline constexpr float kSquareEps = 1e-12f;
inline constexpr float kLogRateLimit = 33.0f;
// What larger gradients count as: no square overflows.
inline constexpr float kGradientLimit = 1e11f;

struct HierarchicalConfig {
  int param_size = 10;
  int tensor_size = 20;
  int global_size = 20;
  int num_scales = 4;

  constexpr bool operator==(const HierarchicalConfig& other) const {
    return param_size == other.param_size && tensor_size == other.tensor_size &&
           global_size == other.global_size && num_scales == other.num_scales;
  }
  constexpr int num_features() const { return 3 * num_scales; }
  // h, averages, squares, log rate.
  constexpr int state_planes() const { return param_size + 2 * num_scales + 1; }
  constexpr int averages_plane() const { return param_size; }
  constexpr int squares_plane() const { return param_size + num_scales; }
  constexpr int log_rate_plane() const { return param_size + 2 * num_scales; }
  // Of a tensor: the new h and the features, the squared direction, the new log rate.
  constexpr int num_sums() const { return param_size + num_features() + 2; }
};

// Offsets of one GRU: gates r, u (2H, in + H) and bias, candidate (H, in + H) and bias.
struct GruLayout {
  int64_t gates = 0, gates_bias = 0, candidate = 0, candidate_bias = 0;
};

// Offsets into the flat meta-parameters, in the order of the rule's parameters: its own before
// those of its modules.
struct HierarchicalLayout {
  GruLayout param, tensor, global;
  int64_t tensor_to_param = 0, tensor_to_param_bias = 0;
  int64_t global_to_param = 0, global_to_param_bias = 0;
  int64_t global_to_tensor = 0, global_to_tensor_bias = 0;
  int64_t param_start = 0, tensor_start = 0, global_start = 0;
  int64_t direction = 0, shortcut = 0, rate = 0, rate_bias = 0;
  int64_t square_decay = 0, square_decay_bias = 0, average_decay = 0, average_decay_bias = 0;
  int64_t rate_momentum = 0, log_rate_offset = 0;
  int64_t total = 0;

  constexpr explicit HierarchicalLayout(const HierarchicalConfig& c) {
    int64_t at = 0;
    auto take = [&at](int64_t count) {
      const int64_t start = at;
      at += count;
      return start;
    };
    auto gru = [&take](int64_t in, int64_t hidden) {
      GruLayout g;
      g.gates = take(2 * hidden * (in + hidden));
      g.gates_bias = take(2 * hidden);
      g.candidate = take(hidden * (in + hidden));
      g.candidate_bias = take(hidden);
      return g;
    };
    param_start = take(c.param_size);
    tensor_start = take(c.tensor_size);
    global_start = take(c.global_size);
    direction = take(c.param_size);
    shortcut = take(c.num_scales);
    rate = take(c.param_size);
    rate_bias = take(1);
    square_decay = take(c.param_size);
    square_decay_bias = take(1);
    average_decay = take(c.param_size);
    average_decay_bias = take(1);
    rate_momentum = take(1);
    log_rate_offset = take(1);
    param = gru(c.num_features(), c.param_size);
    tensor = gru(c.param_size + c.num_features(), c.tensor_size);
    global = gru(c.tensor_size, c.global_size);
    tensor_to_param = take(3 * c.param_size * c.tensor_size);
    tensor_to_param_bias = take(3 * c.param_size);
    global_to_param = take(3 * c.param_size * c.global_size);
    global_to_param_bias = take(3 * c.param_size);
    global_to_tensor = take(3 * c.tensor_size * c.global_size);
    global_to_tensor_bias = take(3 * c.tensor_size);
    total = at;
  }
};

}  // namespace fastl2o
