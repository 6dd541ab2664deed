// Host side of the hierarchical window backward, free of CUDA calls: lays out the workspace and
// says what is to be launched in which order.
#pragma once

#include <cmath>

#include "hierarchical_plan.h"
#include "hierarchical_window_args.h"

namespace fastl2o::cuda {

// As ops.unroll_backward: K rows of gradients and of loss weights, `rows` = steps or steps + 1, or,
// unless it is null, `steps` rows of d_updates in place of the weights.
struct HierarchicalWindowCall {
  const float *meta, *grads, *state, *loss_weights, *d_updates;
  float *d_meta, *d_state;
  const int64_t* sizes;  // of a run's tensors
  int64_t tensors, steps, rows, runs, coordinates, width;
  double step, lr, weight_decay;
};

enum class WindowKernel { enter, ahead, tensors, sweep, injected, reduce_sweep, reduce_levels };

struct HierarchicalWindowLimits {
  // Whole windows are recorded up to this size; others in segments of sqrt(steps).
  int64_t record_bytes = int64_t(2) << 30;
  int64_t sweep_rows = kMostSweepRows, level_rows = kMostLevelRows;
};

class HierarchicalWindow {
 public:
  // A null workspace serves to ask for its size.
  HierarchicalWindow(const HierarchicalWindowCall& call, void* workspace,
                     const HierarchicalWindowLimits& limits = {})
      : call_(call),
        base_(reinterpret_cast<uintptr_t>(workspace)),
        entries_(call.runs * nonempty(call)),
        slot_(place_size(call.runs * (call.width + kGlobalUnits) + entries_)),
        current_(take(slot_)),
        grads_(take(call.runs * call.coordinates)),
        plan_(tensors(call), call.runs) {
    const int64_t chunks = plan_.chunks();
    step_workspace_ = take(plan_.workspace_bytes() / int64_t(sizeof(float)));
    list_ = take(entries_ * int64_t(sizeof(HierarchicalEntry) / sizeof(float)));
    raw_ = slot_;
    sums_ = raw_ + plan_.raw_floats();
    inverse_rms_ = sums_ + place_size(chunks * kSums);
    states_ = inverse_rms_ + place_size(entries_);
    record_ = states_ + place_size(entries_ * kTensorUnits);
    segment_ = call.steps;
    if (call.steps * record_ * int64_t(sizeof(float)) > limits.record_bytes)
      segment_ = int64_t(std::ceil(std::sqrt(double(call.steps))));
    records_ = take(segment_ * record_);
    kept_ = take(segments() > 1 ? segments() * slot_ : 0);

    HierarchicalWindowArgs& args = args_;
    args = {};
    args.meta = call.meta;
    args.list = reinterpret_cast<const HierarchicalEntry*>(at(list_));
    args.current = at(current_);
    args.current_grads = at(grads_);
    args.d_rows = call.d_state;
    args.d_meta = call.d_meta;
    args.adjoint = floats(call.runs * call.coordinates);
    args.told = floats(entries_ * kTold);
    args.d_injecting = floats(entries_ * kGlobalUnits);
    args.d_global = floats(call.runs * kGlobalUnits);
    args.d_means = floats(call.runs * 32);
    args.problem_values = floats(call.runs * 32);
    const int64_t blocks = std::min<int64_t>((chunks + kWindowWarps - 1) / kWindowWarps,
                                             limits.sweep_rows / kWindowWarps);
    args.sweep_row_count = int32_t(blocks * kWindowWarps);
    args.level_row_count = int32_t(std::min(entries_, limits.level_rows));
    // These, which are added to, start as zeros.
    zeros_ = floats_;
    args.chunk_sums = floats(chunks * kChunkSums);
    args.sweep_rows = floats(args.sweep_row_count * int64_t(kSweepRow));
    args.level_rows = floats(args.level_row_count * kLevelRow);
    args.width = call.width;
    args.coordinates = call.coordinates;
    args.entries = int32_t(entries_);
    args.chunks = int32_t(chunks);
    args.problems = int32_t(call.runs);
    args.step = float(call.step);
    args.lr = call.d_updates == nullptr ? float(call.lr) : 1.0f;
    args.keep = float(1.0 - call.lr * call.weight_decay);
  }

  bool fits() const { return plan_.fits(); }
  int64_t workspace_bytes() const { return floats_ * int64_t(sizeof(float)); }
  int64_t segments() const { return (call_.steps + segment_ - 1) / segment_; }
  const HierarchicalPlan& plan() const { return plan_; }

  // queue.copy(to, from, bytes), queue.zero(to, bytes), queue.list(args) and queue.replay(args) of
  // a step, queue.launch(kernel, blocks, args).
  template <typename Queue>
  void run(Queue& queue) const {
    queue.zero(call_.d_state, bytes(call_.runs * call_.width));
    queue.zero(call_.d_meta, bytes(kMeta.total));
    queue.zero(at(zeros_), bytes(floats_ - zeros_));
    HierarchicalArgs sent = step_args();
    sent.list = reinterpret_cast<HierarchicalEntry*>(at(list_));
    queue.list(sent);
    queue.copy(at(current_), call_.state, bytes(call_.runs * call_.width));
    HierarchicalWindowArgs enter = args_;
    enter.before = call_.state;
    queue.launch(WindowKernel::enter, 1, enter);
    const int64_t last = segments() - 1;
    for (int64_t s = 0; s < last; ++s) {
      queue.copy(at(kept_ + s * slot_), at(current_), bytes(slot_));
      for (int64_t t = s * segment_; t < (s + 1) * segment_; ++t) forward(queue, t, step_args());
    }
    for (int64_t s = last; s >= 0; --s) {
      if (s < last) queue.copy(at(current_), at(kept_ + s * slot_), bytes(slot_));
      const int64_t first = s * segment_, end = std::min(first + segment_, call_.steps);
      for (int64_t t = first; t < end; ++t) record(queue, t, records_ + (t - first) * record_);
      for (int64_t t = end - 1; t >= first; --t)
        backward(queue, t, records_ + (t - first) * record_);
    }
    HierarchicalWindowArgs closing = args_;
    closing.follows = closing.closing = true;
    queue.launch(WindowKernel::ahead, problem_blocks(), closing);
    queue.launch(WindowKernel::reduce_sweep, (kSweepRow + 255) / 256, args_);
    queue.launch(WindowKernel::reduce_levels, (kLevelRow + 255) / 256, args_);
  }

 private:
  static int64_t place_size(int64_t count) { return (count + 3) / 4 * 4; }  // 16-byte aligned
  static size_t bytes(int64_t count) { return size_t(count) * sizeof(float); }
  static int64_t nonempty(const HierarchicalWindowCall& call) {
    return std::count_if(call.sizes, call.sizes + call.tensors, [](int64_t n) { return n > 0; });
  }
  int64_t take(int64_t count) {
    const int64_t offset = floats_;
    floats_ += place_size(count);
    return offset;
  }
  float* at(int64_t offset) const {
    return reinterpret_cast<float*>(base_ + uintptr_t(offset) * sizeof(float));
  }
  float* floats(int64_t count) { return at(take(count)); }

  HierarchicalPlan::Tensors tensors(const HierarchicalWindowCall& call) const {
    HierarchicalPlan::Tensors tensors;
    int64_t counted = current_ + call.runs * (call.width + kGlobalUnits);
    for (int64_t run = 0; run < call.runs; ++run) {
      int64_t grad = grads_ + run * call.coordinates, planes = current_ + run * call.width;
      int64_t state = planes + call.coordinates * kSizes.state_planes();
      for (const int64_t* size = call.sizes; size != call.sizes + call.tensors; ++size) {
        if (*size > 0)
          tensors.push_back({nullptr, at(grad), at(planes), at(state), at(counted++), *size,
                             DType::f32, run, 1.0, 0.0});
        grad += *size;
        planes += *size * kSizes.state_planes();
        state += kTensorUnits + 1;
      }
    }
    return tensors;
  }

  HierarchicalArgs step_args() const {
    float* const global_states = at(current_ + call_.runs * call_.width);
    HierarchicalArgs args = plan_.args(call_.meta, global_states, {}, at(step_workspace_));
    if (plan_.listed()) args.list = reinterpret_cast<HierarchicalEntry*>(at(list_));
    return args;
  }

  // As the kernel has it.
  int64_t problem_blocks() const { return std::min(args_.problems, args_.level_row_count); }

  const float* grads_of(int64_t t) const {
    return call_.grads + t * call_.runs * call_.coordinates;
  }

  // The state in place by step t; what the passes leave goes where `args` says.
  template <typename Queue>
  void forward(Queue& queue, int64_t t, const HierarchicalArgs& args) const {
    queue.copy(at(grads_), grads_of(t), bytes(call_.runs * call_.coordinates));
    queue.replay(args);
  }

  template <typename Queue>
  void record(Queue& queue, int64_t t, int64_t to) const {
    queue.copy(at(to), at(current_), bytes(slot_));
    HierarchicalArgs args = step_args();
    args.raw = at(to + raw_);
    args.sums = at(to + sums_);
    args.inverse_rms = at(to + inverse_rms_);
    args.states = at(to + states_);
    forward(queue, t, args);
  }

  template <typename Queue>
  void backward(Queue& queue, int64_t t, int64_t from) const {
    HierarchicalWindowArgs args = args_;
    args.before = at(from);
    args.global_states = at(from + call_.runs * call_.width);
    args.grads = grads_of(t);
    args.raw = at(from + raw_);
    args.sums = at(from + sums_);
    args.inverse_rms = at(from + inverse_rms_);
    args.states = at(from + states_);
    if (call_.d_updates != nullptr) {
      args.next_grads = call_.d_updates + t * call_.runs * call_.coordinates;
    } else if (t + 1 < call_.rows) {
      args.next_grads = grads_of(t + 1);
      args.next_weights = call_.loss_weights + (t + 1) * call_.runs;
    }
    args.follows = t + 1 < call_.steps;
    const int64_t units = std::min<int64_t>((args.chunks + 7) / 8, 1024);
    queue.launch(WindowKernel::ahead, problem_blocks() + units, args);
    queue.launch(WindowKernel::tensors, args.level_row_count, args);
    queue.launch(WindowKernel::sweep, args.sweep_row_count / kWindowWarps, args);
    queue.launch(WindowKernel::injected, args.level_row_count, args);
  }

  const HierarchicalWindowCall call_;
  uintptr_t base_;
  int64_t floats_ = 0, entries_, slot_, current_, grads_;
  HierarchicalPlan plan_;
  int64_t step_workspace_ = 0, list_ = 0, segment_ = 0, records_ = 0, kept_ = 0, zeros_ = 0;
  // Of a step's record, which starts with the state before it.
  int64_t raw_ = 0, sums_ = 0, inverse_rms_ = 0, states_ = 0, record_ = 0;
  HierarchicalWindowArgs args_;
};

}  // namespace fastl2o::cuda
