// The forward pass that the hierarchical rule's step and unroll share.
#pragma once

#include <algorithm>
#include <functional>
#include <optional>

#include "hierarchical_kernels.h"
#include "tile_kernels.h"

namespace fastl2o::cpu {

// The meta-parameters in the order the kernels read them. `rule.meta` stays the caller's memory.
struct PackedStorage {
  std::vector<float> memory;
  PackedHierarchical rule;

  PackedStorage(const HierarchicalConfig& config, const float* meta);
};

// Packed meta-parameters that are kept between steps: comparing all of them with those of the step
// before takes a tenth of the time of packing them again.
class PackedCache {
 public:
  const PackedHierarchical& get(const HierarchicalConfig& config, const float* meta);

 private:
  std::optional<PackedStorage> packed_;
  std::vector<float> packed_from_;
};

// Coordinates [first, last) of one tensor, the unit of work and of partial sums. `start` is the
// cost of all blocks before it.
struct Block {
  int64_t tensor, first, last, start;
};

struct Blocks {
  std::vector<Block> list;
  std::vector<size_t> first_of;  // tensor -> its first block; one more at the end
  int64_t cost = 0;

  void assign(const std::vector<int64_t>& sizes);
  // Runs body(index) for every block, dealt by cost. Allocates nothing: what a step does after it
  // has begun to write must not fail.
  template <typename Body>
  void for_each(const ParallelFor& parallel_for, const Body& body) const {
    const auto part = [&](int64_t begin, int64_t end) {
      auto block = std::lower_bound(list.begin(), list.end(), begin * kCostUnit,
                                    [](const Block& b, int64_t at) { return b.start < at; });
      for (; block != list.end() && block->start < end * kCostUnit; ++block)
        body(size_t(block - list.begin()));
    };
    parallel_for((cost + kCostUnit - 1) / kCostUnit, std::ref(part));
  }

 private:
  static constexpr int64_t kCostUnit = 1024;  // what one index of a parallel loop stands for
};

// What a pass leaves for the step's end and for its derivative. Grows, never shrinks.
struct PassMemory {
  Blocks blocks;
  std::vector<int64_t> sizes;
  std::vector<double> sums;         // (blocks, num_sums)
  std::vector<double> tensor_sums;  // (tensors, num_sums)
  std::vector<float> bias;          // (tensors, 3H): of the parameter GRU, injected parts included
  std::vector<float> means;         // (tensors, H + F)
  std::vector<float> inverse_rms;   // (tensors)
  // Of each problem: what its global state injects, the mean of its log rates and of its tensors'
  // new states.
  std::vector<float> to_param, to_tensor, mean_log_rate, mean_state;
  std::vector<double> counts, tensor_counts, log_rates, state_sums;
};

struct Pass {
  const TileKernels& kernels;
  const PackedHierarchical& rule;
  const HierarchicalOptions& options;
  const ParallelFor& parallel_for;
  PassMemory& memory;

  // Every whole tensor has coordinates. Splits them into blocks, readies what the levels above
  // inject and makes room for what follows: to be called before the others, which cannot fail.
  void prepare(const std::vector<HierarchicalTensor>& tensors, const float* global_states,
               int64_t problems) const;
  // New planes, each tensor's step before it is normalised, at raw_steps[i], and its sums
  // (tensors, num_sums).
  void sweep(const std::vector<HierarchicalTensor>& tensors, float* const* raw_steps,
             double* sums) const;
  // From the sums of whole tensors: new tensor states, log rate means and global states.
  void finish(const std::vector<HierarchicalTensor>& tensors, const double* sums,
              float* global_states, int64_t problems) const;
  // All three.
  void run(const std::vector<HierarchicalTensor>& tensors, float* const* raw_steps,
           float* global_states, int64_t problems) const;

 private:
  void finish_tensor(const HierarchicalTensor& tensor, const double* sums, size_t index) const;
  void finish_problems(const std::vector<HierarchicalTensor>& tensors, float* global_states,
                       int64_t problems) const;
};

}  // namespace fastl2o::cpu
