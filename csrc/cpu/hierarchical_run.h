// One run of a window of the hierarchical rule: replay from checkpoints, then back through time.
#pragma once

#include "aligned_floats.h"
#include "hierarchical_levels_backward.h"
#include "hierarchical_pass.h"

namespace fastl2o::cpu {

// What a replayed step leaves for its derivative.
struct StepTape {
  std::vector<float> bias, means, inverse_rms;
  std::vector<float> to_tensor;   // what the global state injects into the tensors' GRU
  std::vector<float> mean_state;  // input of the global GRU
  float mean_log_rate = 0;
};

// Where each tensor's state lies in a row (W,): planes, tensor states, global state.
struct RowLayout {
  std::vector<int64_t> sizes, planes, states;
  std::vector<int64_t> coordinates;  // the first of each tensor among those of the run
  int64_t global = 0, total = 0, coordinate_count = 0;

  RowLayout(const HierarchicalConfig& config, const std::vector<int64_t>& all_sizes);
};

// Every tensor of a run shares its memory; a worker takes one run after the other.
class RunBackward {
 public:
  RunBackward(const TileKernels& kernels, const PackedHierarchical& rule,
              const HierarchicalUnrollArgs& args, const ParallelFor& parallel_for);

  // Adds the run's dL/d meta and writes its row of d_state.
  void run(int64_t index, double* d_meta);

 private:
  // Accumulators of a range of blocks, always the same for the same sizes.
  struct Group {
    size_t first_block, last_block;
    AlignedFloats sums;
    std::vector<double> total;
    int64_t pending;  // coordinates added since the sums last went to float64
  };

  float* row(int64_t index) { return rows_.data + index * layout_.total; }
  std::vector<HierarchicalTensor> tensors_at(float* row, float* step);
  void forward(int64_t t, float* row, float* raw, StepTape* tape);
  void replay(int64_t segment);
  void advance_adjoint(int64_t t);
  void backward_step(int64_t t, int64_t place, double* d_meta);
  void levels_backward(const float* before, const StepTape& tape, double* d_meta);
  void panels_backward(int64_t t, const float* before, const float* raw, const StepTape& tape);
  void injected_backward(const float* before, double* d_meta);
  void flush(Group& group, bool always);
  void add_groups(double* d_meta) const;
  void start();
  void finish();

  const TileKernels& kernels_;
  const PackedHierarchical& rule_;
  const HierarchicalUnrollArgs& args_;
  const ParallelFor& parallel_for_;
  const HierarchicalConfig& config_;
  const RowLayout layout_;
  const HierarchicalSums offsets_;
  HierarchicalOptions options_;
  std::vector<size_t> present_;  // tensors with coordinates
  int64_t segment_steps_, run_ = 0;
  AlignedFloats rows_, raw_, checkpoints_;
  std::vector<StepTape> tapes_;
  PassMemory memory_;
  Blocks blocks_;
  std::vector<Group> groups_;
  std::vector<float> adjoint_, d_update_, d_means_, mean_product_;
  std::vector<double> products_, step_sums_;
  std::vector<double> d_states_, d_mean_rate_, d_global_, d_old_global_;
};

}  // namespace fastl2o::cpu
