// Host side of the hierarchical step, free of CUDA calls: orders the tensors, cuts them up and lays
// out the workspace.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "hierarchical.h"
#include "hierarchical_args.h"

namespace fastl2o::cuda {

class HierarchicalPlan {
 public:
  using Tensors = std::vector<HierarchicalTensor>;

  HierarchicalPlan(const Tensors& tensors, int64_t problems)
      : HierarchicalPlan(tensors.data(), int64_t(tensors.size()), problems) {}

  HierarchicalPlan(const HierarchicalTensor* tensors, int64_t count, int64_t problems)
      : count_(count), problems_(problems) {
    for (int64_t i = 0; i < count; ++i) {
      const HierarchicalTensor& t = tensors[i];
      if (t.numel == 0) continue;  // it rests
      entries_.push_back({t.param, t.grad, t.planes, t.state, t.step, t.numel,
                          1.0 - t.lr * t.weight_decay, t.lr, 0, 0, int32_t(t.problem), uint32_t(i),
                          uint32_t(t.param_dtype)});
    }
    std::stable_sort(entries_.begin(), entries_.end(),
                     [](const auto& a, const auto& b) { return a.problem < b.problem; });
    for (HierarchicalEntry& entry : entries_) {
      entry.first_chunk = int32_t(chunks_);
      entry.first_raw = uint32_t(raw_units_);
      chunks_ += chunk_count(entry.numel);
      raw_units_ += (entry.numel + kRawUnit - 1) / kRawUnit;
    }
    const int64_t count_here = int64_t(entries_.size());
    place(raw_, raw_units_ * kRawUnit * int64_t(sizeof(float)));
    place(sums_, chunks_ * kSums * int64_t(sizeof(float)));
    place(inverse_rms_, count_here * int64_t(sizeof(float)));
    place(states_, count_here * kTensorUnits * int64_t(sizeof(float)));
    if (!listed()) return;
    place(problem_values_, problems * 32 * int64_t(sizeof(float)));
    place(list_, count_here * int64_t(sizeof(HierarchicalEntry)));
  }

  // Whether the entries do not fit into the kernels' arguments, so that they go to the workspace.
  bool listed() const { return entries_.size() > kEntries; }
  // Whether every number of chunks or of units fits its type.
  bool fits() const {
    return chunks_ < (int64_t(1) << 31) && raw_units_ < (int64_t(1) << 32) &&
           count_ < (int64_t(1) << 30);
  }
  bool empty() const { return entries_.empty(); }
  int64_t workspace_bytes() const { return bytes_; }
  int64_t count() const { return count_; }  // of tensors, empty ones included
  int64_t problems() const { return problems_; }
  int64_t entries() const { return int64_t(entries_.size()); }
  int64_t chunks() const { return chunks_; }
  int64_t raw_floats() const { return raw_units_ * kRawUnit; }

  HierarchicalArgs args(const float* meta, float* global_states, const HierarchicalOptions& options,
                        void* workspace) const {
    HierarchicalArgs args = {};
    args.meta = meta;
    args.global_states = global_states;
    args.grad_scale = options.grad_scale;
    args.found_inf = options.found_inf;
    args.seed = options.seed;
    if (options.nonfinite == kSkip) args.flags = options.nonfinite_flags;
    if (options.nonfinite == kRaise) args.any = options.nonfinite_flags + count_;
    const auto at = [&](int64_t offset) {
      return reinterpret_cast<float*>(static_cast<char*>(workspace) + offset);
    };
    args.raw = at(raw_);
    args.sums = at(sums_);
    args.inverse_rms = at(inverse_rms_);
    args.states = at(states_);
    if (listed()) {
      args.problem_values = at(problem_values_);
      args.list = reinterpret_cast<HierarchicalEntry*>(at(list_));
    } else {
      std::copy(entries_.begin(), entries_.end(), args.table);
    }
    args.entries = int32_t(entries_.size());
    args.chunks = int32_t(chunks_);
    args.problems = int32_t(problems_);
    args.maximize = options.maximize;
    return args;
  }

  // Puts the entries from `first` on into the arguments of a launch that copies them to the list.
  void send(int64_t first, HierarchicalArgs& args) const {
    args.first = int32_t(first);
    args.count = int32_t(std::min<int64_t>(kEntries, entries() - first));
    std::copy_n(entries_.begin() + first, args.count, args.table);
  }

 private:
  static constexpr int kSkip = 1, kRaise = 2;  // HierarchicalOptions::nonfinite

  void place(int64_t& offset, int64_t bytes) {
    offset = bytes_;
    bytes_ += (bytes + 15) / 16 * 16;
  }

  int64_t count_, problems_, chunks_ = 0, raw_units_ = 0, bytes_ = 0;
  int64_t raw_ = 0, sums_ = 0, inverse_rms_ = 0, states_ = 0, problem_values_ = 0, list_ = 0;
  std::vector<HierarchicalEntry> entries_;
};

}  // namespace fastl2o::cuda
