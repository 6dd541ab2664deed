// Driver of the hierarchical rule's in-place step: the forward pass, then the parameters.
#include <algorithm>

#include "aligned_floats.h"
#include "hierarchical_pass.h"
#include "nonfinite.h"
#include "rounding_keys.h"

namespace fastl2o::cpu {
namespace {

// Kept between steps by the thread that calls them, so that a step of a size seen before allocates
// no large memory.
struct StepMemory {
  PassMemory pass;
  PackedCache packed;
  AlignedFloats raw{0};
  int64_t raw_size = 0;
  std::vector<float*> raw_steps;

  void reserve(const std::vector<HierarchicalTensor>& tensors) {
    int64_t total = 0;
    for (const HierarchicalTensor& tensor : tensors) total += tensor.numel;
    if (total > raw_size) {
      raw = AlignedFloats(total);
      raw_size = total;
    }
    lay_out(tensors, raw.data);
  }

  void lay_out(const std::vector<HierarchicalTensor>& tensors, float* at) {
    raw_steps.clear();
    for (const HierarchicalTensor& tensor : tensors) {
      raw_steps.push_back(at);
      at += tensor.numel;
    }
  }
};

StepMemory& step_memory() {
  static thread_local StepMemory memory;
  return memory;
}

void update_params(const TileKernels& kernels, const std::vector<HierarchicalTensor>& tensors,
                   const StepMemory& memory, const ParallelFor& parallel_for) {
  const Blocks& blocks = memory.pass.blocks;
  blocks.for_each(parallel_for, [&](size_t index) {
    const Block& block = blocks.list[index];
    kernels.hierarchical.apply(tensors[size_t(block.tensor)], block.first, block.last,
                               memory.raw_steps[size_t(block.tensor)],
                               memory.pass.inverse_rms[size_t(block.tensor)]);
  });
  for (const HierarchicalTensor& tensor : tensors) *tensor.step += 1.0f;
}

void step_problems(const TileKernels& kernels, const HierarchicalConfig& config, const float* meta,
                   const std::vector<HierarchicalTensor>& tensors, float* global_states,
                   int64_t problems, const HierarchicalOptions& options,
                   const ParallelFor& parallel_for) {
  StepMemory& memory = step_memory();
  memory.reserve(tensors);
  const Pass pass{kernels, memory.packed.get(config, meta), options, parallel_for, memory.pass};
  pass.run(tensors, memory.raw_steps.data(), global_states, problems);
  update_params(kernels, tensors, memory, parallel_for);
}

// Every problem by its own row of meta-parameters.
void step_each_problem(const TileKernels& kernels, const HierarchicalConfig& config,
                       const float* meta, const std::vector<HierarchicalTensor>& tensors,
                       float* global_states, int64_t problems, const HierarchicalOptions& options,
                       const ParallelFor& parallel_for) {
  std::vector<std::vector<HierarchicalTensor>> of_problem(static_cast<size_t>(problems));
  for (HierarchicalTensor tensor : tensors) {
    std::vector<HierarchicalTensor>& own = of_problem[size_t(tensor.problem)];
    tensor.problem = 0;
    own.push_back(tensor);
  }
  const int64_t size = HierarchicalLayout(config).total;
  parallel_for(problems, [&](int64_t begin, int64_t end) {
    for (int64_t problem = begin; problem < end; ++problem)
      if (!of_problem[size_t(problem)].empty())
        step_problems(kernels, config, meta + problem * size, of_problem[size_t(problem)],
                      global_states + problem * config.global_size, 1, options, parallel_for);
  });
}

}  // namespace

void hierarchical_sweep(const TileKernels& kernels, const HierarchicalConfig& config,
                        const float* meta, std::vector<HierarchicalTensor>& tensors,
                        const float* global_states, int64_t problems,
                        const HierarchicalOptions& options, const ParallelFor& parallel_for,
                        double* sums, float* raw) {
  set_rounding_keys(options, tensors);
  StepMemory& memory = step_memory();
  memory.lay_out(tensors, raw);
  const Pass pass{kernels, memory.packed.get(config, meta), options, parallel_for, memory.pass};
  pass.prepare(tensors, global_states, problems);
  pass.sweep(tensors, memory.raw_steps.data(), sums);
}

void hierarchical_finish(const TileKernels& kernels, const HierarchicalConfig& config,
                         const float* meta, const std::vector<HierarchicalTensor>& tensors,
                         float* global_states, int64_t problems, const ParallelFor& parallel_for,
                         const double* sums, float* raw) {
  StepMemory& memory = step_memory();
  memory.lay_out(tensors, raw);
  const HierarchicalOptions options;
  const Pass pass{kernels, memory.packed.get(config, meta), options, parallel_for, memory.pass};
  pass.prepare(tensors, global_states, problems);
  pass.finish(tensors, sums, global_states, problems);
  update_params(kernels, tensors, memory, parallel_for);
}

int64_t hierarchical_step(const TileKernels& kernels, const HierarchicalConfig& config,
                          const float* meta, std::vector<HierarchicalTensor>& tensors,
                          float* global_states, int64_t problems,
                          const HierarchicalOptions& options, const ParallelFor& parallel_for) {
  set_rounding_keys(options, tensors);
  const int64_t bad = screen(options.nonfinite, tensors, parallel_for);
  if (bad >= 0) return bad;
  tensors.erase(std::remove_if(tensors.begin(), tensors.end(),
                               [](const HierarchicalTensor& tensor) { return tensor.numel == 0; }),
                tensors.end());
  if (tensors.empty()) return -1;
  const auto& stepped = options.meta_sets > 1 ? step_each_problem : step_problems;
  stepped(kernels, config, meta, tensors, global_states, problems, options, parallel_for);
  return -1;
}

}  // namespace fastl2o::cpu
