// Sizes of the step and where its weights lie in shared memory; host and device.
#pragma once

namespace fastl2o::cuda {

inline constexpr int kHidden = 20;
inline constexpr int kPairs = kHidden / 4;  // pairs of column tiles, and groups of units

// Groups of four inner indices of a layer: its inputs that are units, then its h.
template <bool kRnnprop>
inline constexpr int kFirstGroups = kRnnprop ? 2 * kPairs : kPairs;
inline constexpr int kSecondGroups = 2 * kPairs;

// How units are multiplied by weights: TF32 tensor cores with operands split in two, the same with
// rounded operands, or plain multiply-adds, which compute capability 7.5 is left with.
enum class Products { tf32_split, tf32, fma };

// The first digits of the compute capability being compiled for; the host does not use it.
#if defined(__CUDA_ARCH__)
inline constexpr int kDeviceMajor = __CUDA_ARCH__ / 100;
#else
inline constexpr int kDeviceMajor = 8;
#endif

// What the exact or the fast kernel multiplies with.
constexpr Products step_products(bool exact, int major) {
  if (major < 8) return Products::fma;
  return exact ? Products::tf32_split : Products::tf32;
}

// Threads of a block, one block a multiprocessor: as many as its registers allow without spills.
// Each quarter holds 16,384 of them: four warps of 128, three of 168 or two of 255 a thread.
// 168 spill 48 and 92 bytes on compute capability 10.0 and 12.0.
constexpr int step_threads(Products products, int state_bytes, int major) {
  if (products == Products::tf32) return 512;
  return products == Products::tf32_split && state_bytes == 4 && major < 10 ? 384 : 256;
}

// Shared memory, in floats: the right operands of both layers, then for each unit the biases of its
// gates (for the LSTM rule's first layer also the features' weights), the projection of each unit
// and the readout.
template <bool kRnnprop, Products kProducts>
struct SharedLayout {
  static constexpr int kPerGroup = 2 * kPairs * 32 * (kProducts == Products::tf32_split ? 2 : 1);
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
