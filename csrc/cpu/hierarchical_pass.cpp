#include "hierarchical_pass.h"

#include <algorithm>
#include <cmath>

namespace fastl2o::cpu {
namespace {

constexpr int64_t kBlock = 2048;           // coordinates of a block, of which a tensor has
constexpr int64_t kMaxBlocks = 1 << 16;    // at most this many
constexpr int64_t kBlockCost = 64;         // of a block besides its coordinates, in coordinates
constexpr int64_t kTensorsPerThread = 16;  // of the loop over the tensors' own level

int64_t block_size(int64_t numel) {
  const int64_t least = (numel + kMaxBlocks - 1) / kMaxBlocks;
  return std::max(kBlock, (least + kBlock - 1) / kBlock * kBlock);
}

// Runs body(index) for index in [0, count), `grain` of them together.
template <typename Body>
void for_range(const ParallelFor& parallel_for, int64_t count, int64_t grain, Body body) {
  const auto part = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * grain; i < std::min(end * grain, count); ++i) body(i);
  };
  parallel_for((count + grain - 1) / grain, std::ref(part));
}

}  // namespace

void Blocks::assign(const std::vector<int64_t>& sizes) {
  list.clear();
  first_of.clear();
  cost = 0;
  for (size_t i = 0; i < sizes.size(); ++i) {
    first_of.push_back(list.size());
    const int64_t size = block_size(sizes[i]);
    for (int64_t first = 0; first < sizes[i]; first += size) {
      const int64_t last = std::min(first + size, sizes[i]);
      list.push_back({int64_t(i), first, last, cost});
      cost += last - first + kBlockCost;
    }
  }
  first_of.push_back(list.size());
}

void Pass::prepare(const std::vector<HierarchicalTensor>& tensors, const float* global_states,
                   int64_t problems) const {
  const HierarchicalConfig& c = rule.config;
  memory.sizes.clear();
  for (const HierarchicalTensor& tensor : tensors) memory.sizes.push_back(tensor.numel);
  memory.blocks.assign(memory.sizes);
  const size_t count = size_t(problems), to_param = size_t(padded(3 * c.param_size)),
               to_tensor = size_t(padded(3 * c.tensor_size));
  memory.to_param.resize(count * to_param);
  memory.to_tensor.resize(count * to_tensor);
  memory.mean_log_rate.resize(count);
  memory.sums.resize(memory.blocks.list.size() * size_t(c.num_sums()));
  memory.bias.resize(tensors.size() * size_t(3 * c.param_size));
  memory.means.resize(tensors.size() * size_t(c.param_size + c.num_features()));
  memory.inverse_rms.resize(tensors.size());
  memory.state_sums.resize(count * size_t(c.tensor_size));
  memory.mean_state.resize(count * size_t(c.tensor_size));
  for (auto* sums : {&memory.counts, &memory.tensor_counts, &memory.log_rates})
    sums->assign(count, 0.0);
  for (const HierarchicalTensor& tensor : tensors) {
    const size_t p = size_t(tensor.problem);
    memory.counts[p] += double(tensor.count);
    memory.tensor_counts[p] += 1.0;
    memory.log_rates[p] += double(tensor.count) * double(tensor.state[c.tensor_size]);
  }
  for_range(parallel_for, problems, kTensorsPerThread, [&](int64_t problem) {
    const size_t p = size_t(problem);
    if (memory.counts[p] == 0.0) return;
    const float* z = global_states + problem * c.global_size;
    float* own = memory.to_param.data() + p * to_param;
    kernels.hierarchical.affine(rule.global_to_param, z, nullptr, own);
    for (int k = 0; k < 3 * c.param_size; ++k) own[k] += rule.param_bias[k];
    kernels.hierarchical.affine(rule.global_to_tensor, z, nullptr,
                                memory.to_tensor.data() + p * to_tensor);
    memory.mean_log_rate[p] = float(memory.log_rates[p] / memory.counts[p]);
  });
}

// The tensor's level: RMS, state and mean log rate.
void Pass::finish_tensor(const HierarchicalTensor& tensor, const double* sums, size_t index) const {
  const HierarchicalConfig& c = rule.config;
  const int inputs = c.param_size + c.num_features();
  const double count = double(tensor.count);
  float* x = memory.means.data() + index * size_t(inputs);
  for (int k = 0; k < inputs; ++k) x[k] = float(sums[k] / count);
  float next[kMaxUnits];
  kernels.hierarchical.gru(
      rule.tensor, x, tensor.state,
      memory.to_tensor.data() + tensor.problem * int64_t(padded(3 * c.tensor_size)), next);
  std::copy_n(next, c.tensor_size, tensor.state);
  memory.inverse_rms[index] = float(1.0 / std::sqrt(sums[inputs] / count + double(kRmsEps)));
  tensor.state[c.tensor_size] = float(sums[inputs + 1] / count);
}

void Pass::finish_problems(const std::vector<HierarchicalTensor>& tensors, float* global_states,
                           int64_t problems) const {
  const int size = rule.config.tensor_size;
  std::fill(memory.state_sums.begin(), memory.state_sums.end(), 0.0);
  for (const HierarchicalTensor& tensor : tensors)
    for (int k = 0; k < size; ++k)
      memory.state_sums[size_t(tensor.problem * size + k)] += double(tensor.state[k]);
  for_range(parallel_for, problems, kTensorsPerThread, [&](int64_t problem) {
    const double present = memory.tensor_counts[size_t(problem)];
    if (present == 0.0) return;
    float* mean = memory.mean_state.data() + problem * size;
    for (int k = 0; k < size; ++k)
      mean[k] = float(memory.state_sums[size_t(problem * size + k)] / present);
    float next[kMaxUnits];
    float* z = global_states + problem * rule.config.global_size;
    kernels.hierarchical.gru(rule.global, mean, z, nullptr, next);
    std::copy_n(next, rule.config.global_size, z);
  });
}

void Pass::sweep(const std::vector<HierarchicalTensor>& tensors, float* const* raw_steps,
                 double* sums) const {
  const HierarchicalConfig& c = rule.config;
  const size_t num_sums = size_t(c.num_sums()), bias_size = size_t(3 * c.param_size);
  memory.blocks.for_each(parallel_for, [&](size_t index) {
    const Block& block = memory.blocks.list[index];
    const HierarchicalTensor& tensor = tensors[size_t(block.tensor)];
    alignas(64) float bias[3 * kMaxUnits + kPad];
    kernels.hierarchical.affine(
        rule.tensor_to_param, tensor.state,
        memory.to_param.data() + tensor.problem * int64_t(padded(3 * c.param_size)), bias);
    if (block.first == 0)
      std::copy_n(bias, bias_size, memory.bias.data() + size_t(block.tensor) * bias_size);
    const SweepBlock work{&tensor,
                          block.first,
                          block.last,
                          bias,
                          memory.mean_log_rate[size_t(tensor.problem)],
                          *tensor.step == 0.0f,
                          raw_steps[block.tensor],
                          memory.sums.data() + index * num_sums};
    kernels.hierarchical.sweep(rule, options, work);
  });
  // In the order of the blocks.
  for_range(parallel_for, int64_t(tensors.size()), kTensorsPerThread, [&](int64_t index) {
    double* own = sums + size_t(index) * num_sums;
    std::fill_n(own, num_sums, 0.0);
    for (size_t b = memory.blocks.first_of[size_t(index)];
         b < memory.blocks.first_of[size_t(index) + 1]; ++b)
      for (size_t k = 0; k < num_sums; ++k) own[k] += memory.sums[b * num_sums + k];
  });
}

void Pass::finish(const std::vector<HierarchicalTensor>& tensors, const double* sums,
                  float* global_states, int64_t problems) const {
  const HierarchicalConfig& c = rule.config;
  for_range(parallel_for, int64_t(tensors.size()), kTensorsPerThread, [&](int64_t index) {
    finish_tensor(tensors[size_t(index)], sums + index * c.num_sums(), size_t(index));
  });
  finish_problems(tensors, global_states, problems);
}

void Pass::run(const std::vector<HierarchicalTensor>& tensors, float* const* raw_steps,
               float* global_states, int64_t problems) const {
  memory.tensor_sums.resize(tensors.size() * size_t(rule.config.num_sums()));
  prepare(tensors, global_states, problems);
  sweep(tensors, raw_steps, memory.tensor_sums.data());
  finish(tensors, memory.tensor_sums.data(), global_states, problems);
}

}  // namespace fastl2o::cpu
