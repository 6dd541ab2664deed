// What the window backward's kernels get by value, and how the host makes it; free of CUDA calls.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kernels.h"
#include "rule_config.h"
#include "step_layout.h"
#include "step_plan.h"

namespace fastl2o::cuda {

inline constexpr int kWindowTile = 32;  // coordinates of a block at a time: one per lane
// A thread of a warp owns four units, and the inputs of the same numbers, of each layer.
inline constexpr int kOwned = 4;
inline constexpr int kWindowWarps = kHidden / kOwned;
inline constexpr int kWindowThreads = 32 * kWindowWarps;
// Blocks, and so partial sums, at most: a constant, because the bits must not depend on the device.
// Two for each multiprocessor of an H100; at T = 20 their replayed states take 51 MB, about its L2.
inline constexpr int64_t kMaxPartials = 264;

struct WindowArgs {
  UnrollArgs window;
  const float* meta;
  MetaLayout layout;
  int32_t features = 0;  // 1: the gradient itself, 2: log and sign
  float p = 0, inverse_p = 0, exp_p = 0, eps = 0;
  float output_scale = 0;  // of the readout, or of its tanh
  float beta1 = 0, beta2 = 0, one_minus_beta1 = 0, one_minus_beta2 = 0;
  float log_beta1[2] = {}, log_beta2[2] = {};
  float keep = 0, lr = 0;  // theta <- keep theta + lr u
  int64_t tiles = 0;
  int64_t partials = 0;  // blocks of the grid
};

// Floats that a block keeps of each step: the state before it.
inline int64_t replay_floats(const RuleConfig& config, int64_t steps) {
  return std::max<int64_t>(steps - 1, 0) * config.state_planes() * kWindowTile;
}

inline int64_t window_tiles(const UnrollArgs& args) {
  return (args.runs * args.dim + kWindowTile - 1) / kWindowTile;
}

inline int64_t window_partials(const UnrollArgs& args) {
  return std::min(window_tiles(args), kMaxPartials);
}

inline WindowArgs window_args(const RuleConfig& config, const float* meta, const UnrollArgs& args) {
  WindowArgs out = {args, meta, MetaLayout(config)};
  out.features = config.num_features();
  out.p = float(config.p);
  out.inverse_p = float(1.0 / config.p);
  out.exp_p = float(std::exp(config.p));
  out.eps = config.eps;
  out.output_scale = config.is_rnnprop() ? -config.step_size : config.output_scale;
  out.beta1 = float(config.beta1);
  out.beta2 = float(config.beta2);
  out.one_minus_beta1 = float(1.0 - config.beta1);
  out.one_minus_beta2 = float(1.0 - config.beta2);
  split_log(config.beta1, out.log_beta1);
  split_log(config.beta2, out.log_beta2);
  out.keep = float(1.0 - args.lr * args.weight_decay);
  out.lr = float(args.lr);
  out.tiles = window_tiles(args);
  out.partials = window_partials(args);
  return out;
}

// Shared memory, in floats. Rows of the tile's coordinates are padded to 36, so that eight rows an
// odd number of rows apart are read 16 bytes each without a bank conflict.
template <bool kRnnprop>
struct WindowLayout {
  static constexpr int kRow = kWindowTile + 4;
  // A layer's operands: its h, then its inputs; the features are padded to four rows.
  static constexpr int kFirstRows = kRnnprop ? 2 * kHidden : kHidden + 4;
  static constexpr int kSecondRows = 2 * kHidden;
  static constexpr int kFirstWeights = 0;  // (rows, unit, gate)
  static constexpr int kSecondWeights = kFirstWeights + kFirstRows * 4 * kHidden;
  static constexpr int kFirstBias = kSecondWeights + kSecondRows * 4 * kHidden;  // (unit, gate)
  static constexpr int kSecondBias = kFirstBias + 4 * kHidden;
  static constexpr int kReadout = kSecondBias + 4 * kHidden;  // weight, bias, padding
  static constexpr int kProjection = kReadout + kHidden + 4;  // (unit, {w0, w1, bias, -})
  static constexpr int kFirst = kProjection + (kRnnprop ? 4 * kHidden : 0);
  static constexpr int kSecond = kFirst + kFirstRows * kRow;
  static constexpr int kGates = kSecond + kSecondRows * kRow;  // (gate, unit) rows: dL/da
  static constexpr int kSums = kGates + 4 * kHidden * kRow;    // (warp, 2) rows of 32
  // What a thread puts aside, in rows of the block's threads: the first layer's gates, c and
  // adjoint while the second layer is walked back, the features, and the projection's gradient,
  // summed over steps.
  static constexpr int kFirstGates = kSums + 2 * kWindowWarps * kWindowTile;
  static constexpr int kFeatures = kFirstGates + 8 * kOwned * kWindowThreads;
  static constexpr int kProjectionSums = kFeatures + (kRnnprop ? 7 : 0) * kWindowThreads;
  static constexpr int kFirstSums = kProjectionSums + (kRnnprop ? 3 : 0) * kOwned * kWindowThreads;
  // Its block of the first layer's weight gradient and the bias's.
  static constexpr int kTotal = kFirstSums + (kFirstRows / 8 * 4 + 1) * kWindowThreads;
};

}  // namespace fastl2o::cuda
