// Sizes of the tensor-core step and where its weights lie in shared memory; host and device.
#pragma once

namespace fastl2o::cuda {

inline constexpr int kHidden = 20;
inline constexpr int kPairs = kHidden / 4;  // pairs of column tiles, and groups of units

// Groups of four inner indices of a layer: its inputs that are units, then its h.
template <bool kRnnprop>
inline constexpr int kFirstGroups = kRnnprop ? 2 * kPairs : kPairs;
inline constexpr int kSecondGroups = 2 * kPairs;

// Threads of a block, one block a multiprocessor: as many as its registers allow without spills.
// Each quarter holds 16,384 of them: four warps of 128, three of 168 or two of 255 a thread.
template <bool kExact, int kStateBytes>
inline constexpr int kStepThreads = !kExact            ? 512
                                    : kStateBytes == 4 ? 384
                                                       : 256;

// Shared memory, in floats: the right operands' fragments of both layers, then for each unit the
// biases of its gates (for the LSTM rule's first layer also the features' weights), the projection
// of each unit and the readout.
template <bool kRnnprop, bool kExact>
struct SharedLayout {
  static constexpr int kPerGroup = 2 * kPairs * 32 * (kExact ? 2 : 1);
  static constexpr int kFirst = 0;
  static constexpr int kSecond = kPerGroup * kFirstGroups<kRnnprop>;
  static constexpr int kAffine = kSecond + kPerGroup * kSecondGroups;
  static constexpr int kAffineRows = kRnnprop ? 1 : 3;
  static constexpr int kAffineSecond = kAffine + kAffineRows * 4 * kHidden;
  static constexpr int kProjection = kAffineSecond + 4 * kHidden;
  static constexpr int kReadout = kProjection + (kRnnprop ? 4 * kHidden : 0);
  static constexpr int kTotal = kReadout + kHidden + 1;
};

}  // namespace fastl2o::cuda
