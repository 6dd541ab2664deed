#include "hierarchical_run.h"

#include <algorithm>
#include <cmath>

namespace fastl2o::cpu {
namespace {

constexpr int64_t kRecordBytes = 32 << 20;  // of states recorded in full; beyond, segments
constexpr size_t kMaxGroups = 64;
constexpr int64_t kSumCoordinates = 4096;  // added in float32 before they go to float64

int64_t choose_segment(int64_t steps, int64_t row) {
  if (steps * row * int64_t(sizeof(float)) <= kRecordBytes) return std::max<int64_t>(steps, 1);
  return std::max<int64_t>(1, int64_t(std::ceil(std::sqrt(double(steps)))));
}

}  // namespace

RowLayout::RowLayout(const HierarchicalConfig& config, const std::vector<int64_t>& all_sizes)
    : sizes(all_sizes) {
  for (const int64_t size : sizes) {
    planes.push_back(total);
    coordinates.push_back(coordinate_count);
    total += config.state_planes() * size;
    coordinate_count += size;
  }
  for (size_t i = 0; i < sizes.size(); ++i) {
    states.push_back(total);
    total += config.tensor_size + 1;
  }
  global = total;
  total += config.global_size;
}

RunBackward::RunBackward(const TileKernels& kernels, const PackedHierarchical& rule,
                         const HierarchicalUnrollArgs& args, const ParallelFor& parallel_for)
    : kernels_(kernels),
      rule_(rule),
      args_(args),
      parallel_for_(parallel_for),
      config_(rule.config),
      layout_(config_, args.sizes),
      offsets_(config_),
      segment_steps_(choose_segment(args.steps, layout_.total)),
      rows_((segment_steps_ + 1) * layout_.total),
      raw_(segment_steps_ * layout_.coordinate_count),
      checkpoints_((args.steps + segment_steps_ - 1) / segment_steps_ * layout_.total),
      tapes_(size_t(segment_steps_)) {
  std::vector<int64_t> sizes;
  for (size_t i = 0; i < args.sizes.size(); ++i) {
    if (args.sizes[i] == 0) continue;
    present_.push_back(i);
    sizes.push_back(args.sizes[i]);
  }
  blocks_.assign(sizes);
  const size_t count = blocks_.list.size(), groups = std::min(count, kMaxGroups);
  const int64_t lanes = offsets_.total * kernels.hierarchical.lanes;
  for (size_t g = 0; g < groups; ++g)
    groups_.push_back({g * count / groups, (g + 1) * count / groups, AlignedFloats(lanes),
                       std::vector<double>(size_t(offsets_.total)), 0});
  const size_t dim = size_t(layout_.coordinate_count), tensors = present_.size();
  adjoint_.resize(dim);
  d_update_.resize(dim);
  d_means_.resize(tensors * size_t(config_.param_size + config_.num_features()));
  mean_product_.resize(tensors);
  products_.resize(count);
  step_sums_.resize(count * size_t(3 * config_.param_size + 1));
  d_states_.resize(tensors * size_t(config_.tensor_size));
  d_mean_rate_.resize(tensors);
  d_global_.resize(size_t(config_.global_size));
  d_old_global_.resize(size_t(config_.global_size));
}

std::vector<HierarchicalTensor> RunBackward::tensors_at(float* row, float* step) {
  std::vector<HierarchicalTensor> tensors;
  for (const size_t i : present_)
    tensors.push_back({nullptr, nullptr, row + layout_.planes[i], row + layout_.states[i], step,
                       layout_.sizes[i], layout_.sizes[i], DType::f32, 0, 1.0, 0.0});
  return tensors;
}

// One step of the rule on `row`, in place.
void RunBackward::forward(int64_t t, float* row, float* raw, StepTape* tape) {
  float taken = args_.from_start && t == 0 ? 0.0f : 1.0f;
  std::vector<HierarchicalTensor> tensors = tensors_at(row, &taken);
  std::vector<float*> raw_steps;
  const float* grads = args_.grads + (t * args_.runs + run_) * layout_.coordinate_count;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const int64_t first = layout_.coordinates[present_[i]];
    tensors[i].grad = const_cast<float*>(grads + first);  // written only when it is unscaled
    raw_steps.push_back(raw + first);
  }
  const Pass pass{kernels_, rule_, options_, parallel_for_, memory_};
  pass.run(tensors, raw_steps.data(), row + layout_.global, 1);
  if (tape == nullptr) return;
  tape->bias = memory_.bias;
  tape->means = memory_.means;
  tape->inverse_rms = memory_.inverse_rms;
  tape->to_tensor = memory_.to_tensor;
  tape->mean_state = memory_.mean_state;
  tape->mean_log_rate = memory_.mean_log_rate[0];
}

void RunBackward::replay(int64_t segment) {
  const int64_t start = segment * segment_steps_;
  const int64_t steps = std::min(segment_steps_, args_.steps - start);
  std::copy_n(checkpoints_.data + segment * layout_.total, layout_.total, row(0));
  for (int64_t j = 0; j < steps; ++j) {
    std::copy_n(row(j), layout_.total, row(j + 1));
    forward(start + j, row(j + 1), raw_.data + j * layout_.coordinate_count, &tapes_[size_t(j)]);
  }
}

// d_update <- what is given, or lr a_{t+1} with a_t = w_t g_t + (1 - lr wd) a_{t+1}, and its
// products with the steps' directions: mean(y' y) = - sum of d_update raw_step / (n rms).
void RunBackward::advance_adjoint(int64_t t) {
  const float keep = float(1.0 - args_.lr * args_.weight_decay), lr = float(args_.lr);
  const bool recorded = t + 1 < args_.rows, last = t + 1 == args_.steps;
  const int64_t at = recorded ? (t + 1) * args_.runs + run_ : 0;
  const float weight = recorded ? args_.loss_weights[at] : 0.0f;
  const float* grads = args_.grads + at * layout_.coordinate_count;
  const float* given = args_.d_updates == nullptr
                           ? nullptr
                           : args_.d_updates + (t * args_.runs + run_) * layout_.coordinate_count;
  const float* raw = raw_.data + t % segment_steps_ * layout_.coordinate_count;
  blocks_.for_each(parallel_for_, [&](size_t index) {
    const Block& block = blocks_.list[index];
    const int64_t start = layout_.coordinates[present_[size_t(block.tensor)]];
    double product = 0.0;
    for (int64_t i = start + block.first; i < start + block.last; ++i) {
      float& d_update = d_update_[size_t(i)];
      if (given != nullptr) {
        d_update = given[i];
      } else {
        float& adjoint = adjoint_[size_t(i)];
        adjoint = (recorded ? weight * grads[i] : 0.0f) + (last ? 0.0f : keep * adjoint);
        d_update = lr * adjoint;
      }
      product -= double(d_update) * double(raw[i]);
    }
    products_[index] = product;
  });
}

// The global level, then each tensor's.
void RunBackward::levels_backward(const float* before, const StepTape& tape, double* d_meta) {
  const HierarchicalLayout& at = rule_.layout;
  const int size = config_.tensor_size, inputs = config_.param_size + config_.num_features();
  const float* z = before + layout_.global;
  GruGradient global, own;
  gru_backward(rule_.meta, at.global, size, config_.global_size, tape.mean_state.data(), z, nullptr,
               d_global_.data(), d_meta, global);
  std::copy_n(global.h, config_.global_size, d_old_global_.begin());
  for (size_t i = 0; i < present_.size(); ++i) {
    double d_next[kMaxUnits];
    double* d_state = d_states_.data() + i * size_t(size);
    for (int k = 0; k < size; ++k) d_next[k] = d_state[k] + global.x[k] / double(present_.size());
    // to_tensor holds the map's own bias as well, which is what the GRU is given.
    gru_backward(rule_.meta, at.tensor, inputs, size, tape.means.data() + i * size_t(inputs),
                 before + layout_.states[present_[i]], tape.to_tensor.data(), d_next, d_meta, own);
    affine_backward(rule_.meta, at.global_to_tensor, at.global_to_tensor_bias, 3 * size,
                    config_.global_size, z, own.bias, d_meta, d_old_global_.data());
    std::copy_n(own.h, size, d_state);
    const double numel = double(layout_.sizes[present_[i]]);
    for (int k = 0; k < inputs; ++k)
      d_means_[i * size_t(inputs) + size_t(k)] = float(own.x[k] / numel);
    double product = 0.0;
    for (size_t b = blocks_.first_of[i]; b < blocks_.first_of[i + 1]; ++b) product += products_[b];
    mean_product_[i] = float(product * double(tape.inverse_rms[i]) / numel);
  }
}

void RunBackward::panels_backward(int64_t t, const float* before, const float* raw,
                                  const StepTape& tape) {
  const float* grads = args_.grads + (t * args_.runs + run_) * layout_.coordinate_count;
  float* d_row = args_.d_state + run_ * layout_.total;
  const size_t inputs = size_t(config_.param_size + config_.num_features());
  const size_t bias_size = size_t(3 * config_.param_size);
  parallel_for_(int64_t(groups_.size()), [&](int64_t begin, int64_t end) {
    const AlignedFloats scratch(kernels_.hierarchical.backward_scratch(config_));
    for (int64_t g = begin; g < end; ++g) {
      Group& group = groups_[size_t(g)];
      for (size_t b = group.first_block; b < group.last_block; ++b) {
        const Block& own = blocks_.list[b];
        const size_t i = size_t(own.tensor), place = present_[i];
        const int64_t first = layout_.coordinates[place], numel = layout_.sizes[place];
        BackwardBlock block;
        block.numel = numel;
        block.first = own.first;
        block.last = own.last;
        block.grad = grads + first;
        block.planes = before + layout_.planes[place];
        block.d_update = d_update_.data() + first;
        block.raw_step = raw + first;
        block.d_planes = d_row + layout_.planes[place];
        block.bias = tape.bias.data() + i * bias_size;
        block.d_means = d_means_.data() + i * inputs;
        block.inverse_rms = tape.inverse_rms[i];
        block.mean_product = mean_product_[i];
        block.rate_shift = float(d_mean_rate_[i] / double(numel));
        block.mean_log_rate = tape.mean_log_rate;
        block.first_step = args_.from_start && t == 0;
        block.sums = group.sums.data;
        block.step_sums = step_sums_.data() + b * (bias_size + 1);
        kernels_.hierarchical.backward(rule_, block, scratch.data);
        group.pending += own.last - own.first;
        flush(group, false);
      }
    }
  });
}

void RunBackward::flush(Group& group, bool always) {
  if (group.pending < kSumCoordinates && !always) return;
  const int lanes = kernels_.hierarchical.lanes;
  for (int k = 0; k < offsets_.total; ++k)
    for (int lane = 0; lane < lanes; ++lane)
      group.total[size_t(k)] += double(group.sums.data[k * lanes + lane]);
  std::fill_n(group.sums.data, offsets_.total * lanes, 0.0f);
  group.pending = 0;
}

// From the biases of the parameter GRU to the states that inject them, and from the centred log
// rates to the means.
void RunBackward::injected_backward(const float* before, double* d_meta) {
  const HierarchicalLayout& at = rule_.layout;
  const int rows = 3 * config_.param_size, size = config_.tensor_size;
  const float* z = before + layout_.global;
  double d_problem_rate = 0.0;
  for (size_t i = 0; i < present_.size(); ++i) {
    double sums[3 * kMaxUnits + 1] = {};
    for (size_t b = blocks_.first_of[i]; b < blocks_.first_of[i + 1]; ++b)
      for (int k = 0; k <= rows; ++k) sums[k] += step_sums_[b * size_t(rows + 1) + size_t(k)];
    for (int k = 0; k < 2 * config_.param_size; ++k) d_meta[at.param.gates_bias + k] += sums[k];
    for (int k = 0; k < config_.param_size; ++k)
      d_meta[at.param.candidate_bias + k] += sums[2 * config_.param_size + k];
    affine_backward(rule_.meta, at.tensor_to_param, at.tensor_to_param_bias, rows, size,
                    before + layout_.states[present_[i]], sums, d_meta,
                    d_states_.data() + i * size_t(size));
    affine_backward(rule_.meta, at.global_to_param, at.global_to_param_bias, rows,
                    config_.global_size, z, sums, d_meta, d_old_global_.data());
    d_problem_rate -= sums[rows];
  }
  for (size_t i = 0; i < present_.size(); ++i)
    d_mean_rate_[i] =
        d_problem_rate * double(layout_.sizes[present_[i]]) / double(layout_.coordinate_count);
  d_global_.swap(d_old_global_);
}

void RunBackward::backward_step(int64_t t, int64_t place, double* d_meta) {
  const float* before = row(place);
  const StepTape& tape = tapes_[size_t(place)];
  advance_adjoint(t);
  levels_backward(before, tape, d_meta);
  panels_backward(t, before, raw_.data + place * layout_.coordinate_count, tape);
  injected_backward(before, d_meta);
}

void RunBackward::start() {
  std::fill_n(args_.d_state + run_ * layout_.total, layout_.total, 0.0f);
  for (auto* gradient : {&d_states_, &d_mean_rate_, &d_global_})
    std::fill(gradient->begin(), gradient->end(), 0.0);
  for (Group& group : groups_) {
    std::fill_n(group.sums.data, offsets_.total * kernels_.hierarchical.lanes, 0.0f);
    std::fill(group.total.begin(), group.total.end(), 0.0);
    group.pending = 0;
  }
}

// The planes' part of the row has been written in place.
void RunBackward::finish() {
  float* d_row = args_.d_state + run_ * layout_.total;
  const size_t size = size_t(config_.tensor_size);
  for (size_t i = 0; i < present_.size(); ++i) {
    float* own = d_row + layout_.states[present_[i]];
    for (size_t k = 0; k < size; ++k) own[k] = float(d_states_[i * size + k]);
    own[size] = float(d_mean_rate_[i]);
  }
  for (size_t k = 0; k < d_global_.size(); ++k)
    d_row[layout_.global + int64_t(k)] = float(d_global_[k]);
}

void RunBackward::add_groups(double* d_meta) const {
  const HierarchicalLayout& at = rule_.layout;
  const int H = config_.param_size, F = config_.num_features();
  for (const Group& group : groups_) {
    const double* sums = group.total.data();
    auto add = [&](int row, int64_t to, int count) {
      for (int k = 0; k < count; ++k) d_meta[to + k] += sums[row + k];
    };
    // The sums' columns are h, x; the meta-parameters' x, h.
    for (int r = 0; r < 2 * H; ++r) {
      const int64_t to = at.param.gates + int64_t(r) * (F + H);
      add(r * (F + H), to + F, H);
      add(r * (F + H) + H, to, F);
    }
    add(offsets_.candidate, at.param.candidate, H * (F + H));
    add(offsets_.direction, at.direction, H);
    add(offsets_.shortcut, at.shortcut, config_.num_scales);
    add(offsets_.rate, at.rate, H + 1);
    add(offsets_.square_decay, at.square_decay, H + 1);
    add(offsets_.average_decay, at.average_decay, H + 1);
    add(offsets_.rate_momentum, at.rate_momentum, 1);
    add(offsets_.log_rate_offset, at.log_rate_offset, 1);
  }
}

void RunBackward::run(int64_t index, double* d_meta) {
  run_ = index;
  start();
  if (present_.empty()) return;
  const int64_t segments = (args_.steps + segment_steps_ - 1) / segment_steps_;
  std::copy_n(args_.state + run_ * layout_.total, layout_.total, checkpoints_.data);
  for (int64_t s = 0; s + 1 < segments; ++s) {
    float* next = checkpoints_.data + (s + 1) * layout_.total;
    std::copy_n(next - layout_.total, layout_.total, next);
    for (int64_t t = s * segment_steps_; t < (s + 1) * segment_steps_; ++t)
      forward(t, next, raw_.data, nullptr);
  }
  for (int64_t s = segments - 1; s >= 0; --s) {
    replay(s);
    const int64_t start = s * segment_steps_;
    for (int64_t t = std::min(start + segment_steps_, args_.steps) - 1; t >= start; --t)
      backward_step(t, t - start, d_meta);
  }
  for (Group& group : groups_) flush(group, true);
  add_groups(d_meta);
  finish();
}

}  // namespace fastl2o::cpu
