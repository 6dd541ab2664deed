// What the window backward's kernels get by value, and how the host makes it; free of CUDA calls.
// There are two: with tensor cores from compute capability 8.0 on, plain multiply-adds before.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kernels.h"
#include "rule_config.h"
#include "step_layout.h"
#include "step_plan.h"

namespace fastl2o::cuda {

inline constexpr int kWindowTile = 32;  // plain: coordinates of a block at a time, one per lane
// A thread of a warp owns four units, and the inputs of the same numbers, of each layer.
inline constexpr int kOwned = 4;
inline constexpr int kWindowWarps = kHidden / kOwned;
inline constexpr int kWindowThreads = 32 * kWindowWarps;

// Tensor cores: a group of four warps takes 16 coordinates a warp. A block's groups share the
// weights, each has a partial sum of its own, so that the number of groups does not change bits.
inline constexpr int kWarpTile = 16;
inline constexpr int kGroupWarps = 4;
inline constexpr int kGroupThreads = 32 * kGroupWarps;
inline constexpr int kGroupTile = kWarpTile * kGroupWarps;
inline constexpr int kMaxGroups = 2;                 // 255 registers a thread: eight warps
inline constexpr int kBufferRows = 6 * kHidden;      // dL/da of a layer's gates and its inputs
inline constexpr int kLeastSharedBytes = 99 * 1024;  // of a block, from compute capability 8.0 on

constexpr bool uses_tensor_cores(int major) { return major >= 8; }

// Partial sums at most: a constant, because the bits must not depend on the device. Two for each
// multiprocessor of an H100; at T = 20 their replayed states take 103 MB.
inline constexpr int64_t kMaxPartials = 264;

struct WindowArgs : RuleNumbers {
  UnrollArgs window;
  const float* meta;
  MetaLayout layout;
  float keep = 0, lr = 0;  // theta <- keep theta + lr u
  int64_t total = 0;       // N
  int64_t tiles = 0;
  int64_t partials = 0;  // blocks of the grid, or groups
};

constexpr int window_tile(int major) { return uses_tensor_cores(major) ? kGroupTile : kWindowTile; }

// Floats that a block or group keeps of its tile: the states before all steps but the first.
inline int64_t replay_floats(const RuleConfig& config, int64_t steps, int major) {
  return std::max<int64_t>(steps - 1, 0) * config.state_planes() * window_tile(major);
}

inline int64_t window_tiles(const UnrollArgs& args, int major) {
  return (args.runs * args.dim + window_tile(major) - 1) / window_tile(major);
}

inline int64_t window_partials(const UnrollArgs& args, int major) {
  return std::min(window_tiles(args, major), kMaxPartials);
}

inline WindowArgs window_args(const RuleConfig& config, const float* meta, const UnrollArgs& args,
                              int major) {
  WindowArgs out = {rule_numbers(config), args, meta, MetaLayout(config)};
  out.keep = float(1.0 - args.lr * args.weight_decay);
  out.lr = float(args.lr);
  out.total = args.runs * args.dim;
  out.tiles = window_tiles(args, major);
  out.partials = window_partials(args, major);
  return out;
}

// Whether threads of the plain kernel put numbers aside in the scratch: compute capability 7.5 has
// 64 KB of shared memory. A block's share of it, 28 to 34 KB, then stays in the caches.
constexpr bool window_sets_aside_in_scratch(int major) { return major < 8; }
inline constexpr bool kDeviceSetsAsideInScratch = window_sets_aside_in_scratch(kDeviceMajor);

// Shared memory of the plain kernel, in floats. Rows of the tile's coordinates are padded to 36, so
// that eight rows an odd number of rows apart are read 16 bytes each without a bank conflict.
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
  // What a thread keeps, in rows of the block's threads: the features, and the projection's
  // gradient, summed over steps.
  static constexpr int kFeatures = kSums + 2 * kWindowWarps * kWindowTile;
  static constexpr int kProjectionSums = kFeatures + (kRnnprop ? 7 : 0) * kWindowThreads;
  static constexpr int kAside = kProjectionSums + (kRnnprop ? 3 : 0) * kOwned * kWindowThreads;
  // What it puts aside, here or in the scratch, from kAside on: the first layer's gates, c and
  // adjoint while the second layer is walked back; its block of the first layer's weight gradient
  // and the bias's.
  static constexpr int kFirstGates = 0;
  static constexpr int kFirstSums = kFirstGates + 8 * kOwned * kWindowThreads;
  static constexpr int kAsideFloats = kFirstSums + (kFirstRows / 8 * 4 + 1) * kWindowThreads;

  static constexpr int shared_floats(int major) {
    return kAside + (window_sets_aside_in_scratch(major) ? 0 : kAsideFloats);
  }
};

// What the threads of the tensor-core kernel put aside, for want of registers, of their sums over
// steps: the gradients of the first layer's weights and of the projection; `more`: also some tiles
// of the second layer's; `scratch`: all of it, in the scratch instead of shared memory.
enum class Aside { some, more, scratch };

// Shared memory of the tensor-core kernel, in floats: what the groups share, then their own.
template <bool kRnnprop, bool kExact, Aside kAsideKind>
struct TensorLayout {
  static constexpr int kFirstSteps = kRnnprop ? 5 : 3;  // pairs of groups of four inputs
  static constexpr int kSecondSteps = 5;
  static constexpr int kPerStep = 2 * kPairs * 64 * (kExact ? 2 : 1);
  static constexpr int kFirst = 0;
  static constexpr int kSecond = kFirst + kFirstSteps * kPerStep;
  static constexpr int kFirstBias = kSecond + kSecondSteps * kPerStep;  // (unit, gate)
  static constexpr int kSecondBias = kFirstBias + 4 * kHidden;
  static constexpr int kProjection = kSecondBias + 4 * kHidden;  // (unit, {w0, w1, bias, -})
  static constexpr int kReadout = kProjection + (kRnnprop ? 4 * kHidden : 0);  // weight, bias
  static constexpr int kShared = kReadout + kHidden + 4;
  // A group's: (warp, row, 16) of gates and inputs, numbers of each coordinate, what is put aside.
  static constexpr int kOfCoordinates = kGroupWarps * kBufferRows * kWarpTile;
  static constexpr int kAside = kOfCoordinates + (kRnnprop ? 5 : 2) * kGroupTile;
  // Aside: tiles of the first layer's weights, then of the second's, four numbers of each thread.
  static constexpr int kFirstTiles = kRnnprop ? 8 : 4;
  static constexpr int kSecondTiles = kAsideKind == Aside::some      ? 0
                                      : kAsideKind == Aside::scratch ? 8
                                      : kRnnprop                     ? 4
                                                                     : 2;
  static constexpr int kProjectionSums = 4 * (kFirstTiles + kSecondTiles) * kGroupThreads;
  static constexpr int kAsideFloats = kProjectionSums + (kRnnprop ? 3 * kPairs : 0) * kGroupThreads;
  static constexpr int kGroup = kAside + (kAsideKind == Aside::scratch ? 0 : kAsideFloats);

  static constexpr int shared_bytes(int groups) { return 4 * (kShared + groups * kGroup); }
};

// How the tensor-core kernel is launched where a block may have `available` bytes of shared memory.
struct TensorLaunch {
  Aside aside;
  int groups;  // of a block
  int bytes;
};

template <bool kRnnprop, bool kExact>
constexpr TensorLaunch tensor_launch(int available) {
  constexpr auto some = &TensorLayout<kRnnprop, kExact, Aside::some>::shared_bytes;
  constexpr auto more = &TensorLayout<kRnnprop, kExact, Aside::more>::shared_bytes;
  constexpr auto scratch = &TensorLayout<kRnnprop, kExact, Aside::scratch>::shared_bytes;
  constexpr auto least = kExact ? more : some;
  if (available >= least(kMaxGroups))
    return {kExact ? Aside::more : Aside::some, kMaxGroups, least(kMaxGroups)};
  if (kRnnprop && available >= some(kMaxGroups)) return {Aside::some, kMaxGroups, some(kMaxGroups)};
  if (available >= least(1)) return {kExact ? Aside::more : Aside::some, 1, least(1)};
  return {Aside::scratch, 1, scratch(1)};
}
static_assert(tensor_launch<true, true>(kLeastSharedBytes).bytes <= kLeastSharedBytes);
// So only the exact RNNprop kernel needs the other two kinds.
static_assert(tensor_launch<false, true>(kLeastSharedBytes).aside == Aside::more);
static_assert(tensor_launch<true, false>(kLeastSharedBytes).aside == Aside::some);

// Floats of the scratch that all blocks together need on a device that gives a block `available`
// bytes of shared memory: replayed states, partial sums, and what is put aside there.
inline int64_t window_scratch_floats(const RuleConfig& config, const UnrollArgs& args, int major,
                                     int available) {
  int64_t each = replay_floats(config, args.steps, major) + MetaLayout(config).total;
  if (window_sets_aside_in_scratch(major))
    each +=
        config.is_rnnprop() ? WindowLayout<true>::kAsideFloats : WindowLayout<false>::kAsideFloats;
  else if (config.is_rnnprop() && tensor_launch<true, true>(available).aside == Aside::scratch)
    each += TensorLayout<true, true, Aside::scratch>::kAsideFloats;
  return window_partials(args, major) * each + 3;  // what is put aside starts at 16 bytes
}

}  // namespace fastl2o::cuda
