// Host side of the step, free of CUDA calls: cuts the list of tensors into launches.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels.h"
#include "rule_config.h"
#include "step_args.h"

namespace fastl2o::cuda {

inline void split_log(double beta, float (&out)[2]) {
  const double log_beta = std::log(beta);  // -inf for beta = 0
  out[0] = float(log_beta);
  out[1] = beta == 0.0 ? 0.0f : float(log_beta - double(out[0]));
}

inline RuleNumbers rule_numbers(const RuleConfig& config) {
  RuleNumbers out = {};
  out.features = config.num_features();
  out.p = float(config.p);
  out.inverse_p = float(1.0 / config.p);
  out.exp_p = float(std::exp(config.p));
  out.eps = config.eps;
  out.output_scale = config.is_rnnprop() ? -config.step_size : config.output_scale;
  out.beta1 = float(config.beta1);
  out.beta2 = float(config.beta2);
  out.one_minus_beta1 = float(1.0 - config.beta1);
  out.one_minus_beta2 = float(1.0 - config.beta2);
  split_log(config.beta1, out.log_beta1);
  split_log(config.beta2, out.log_beta2);
  return out;
}

// What all launches of a step share.
inline StepArgs shared_args(const RuleConfig& config, const float* meta,
                            const StepOptions& options) {
  StepArgs args = {};
  static_cast<RuleNumbers&>(args) = rule_numbers(config);
  const MetaLayout layout(config);
  args.meta = meta;
  args.projection_weight = int32_t(layout.projection_weight);
  args.projection_bias = int32_t(layout.projection_bias);
  for (int layer = 0; layer < 2; ++layer) {
    args.weight_ih[layer] = int32_t(layout.weight_ih[layer]);
    args.weight_hh[layer] = int32_t(layout.weight_hh[layer]);
    args.bias[layer] = int32_t(layout.bias[layer]);
  }
  args.readout_weight = int32_t(layout.readout_weight);
  args.readout_bias = int32_t(layout.readout_bias);
  args.keep = 1.0 - options.lr * options.weight_decay;
  args.lr = options.lr;
  args.param_dtype = uint8_t(options.param_dtype);
  args.maximize = options.maximize;
  args.stochastic_rounding = options.stochastic_rounding;
  args.seed = options.seed;
  args.grad_scale = options.grad_scale;
  args.found_inf = options.found_inf;
  return args;
}

// One StepArgs after the other: kTableSize tensors each. A tensor's step counter is read by its
// launch and so may only be increased by the next one; a last launch may carry counters alone.
class StepPlan {
 public:
  StepPlan(const RuleConfig& config, const float* meta, const StepTensor* tensors, int64_t count,
           const StepOptions& options)
      : tensors_(tensors),
        count_(count),
        counts_steps_(config.is_rnnprop()),
        flags_(options.nonfinite == kPass ? nullptr : options.nonfinite_flags),
        raises_(options.nonfinite == kRaise),
        args_(shared_args(config, meta, options)) {
    args_.skip_all = flags_ != nullptr && raises_ ? flags_ + count : nullptr;
  }

  // False when nothing is left to launch. Where `args().tensors` is 0 only counters are.
  bool next() {
    args_.counters = 0;
    if (counts_steps_ && args_.tensors > 0) {
      args_.counters = args_.tensors;
      args_.skip_counters = args_.skip;
      for (int i = 0; i < args_.tensors; ++i)
        args_.counter[i] = tensors_[args_.first_tensor + i].step;
    }
    args_.first_tensor = int32_t(at_);
    args_.skip = flags_ != nullptr && !raises_ ? flags_ + at_ : nullptr;
    args_.tensors = 0;
    args_.tiles = 0;
    for (; at_ < count_ && args_.tensors < kTableSize; ++at_) {
      const StepTensor& tensor = tensors_[at_];
      args_.table[args_.tensors++] = {tensor.param, tensor.grad,
                                      tensor.state, counts_steps_ ? tensor.step : nullptr,
                                      tensor.numel, args_.tiles};
      args_.tiles += (tensor.numel + kTile - 1) / kTile;
    }
    return args_.tensors > 0 || args_.counters > 0;
  }

  StepArgs& args() { return args_; }

 private:
  static constexpr int kPass = 0, kRaise = 2;  // StepOptions::nonfinite

  const StepTensor* tensors_;
  int64_t count_, at_ = 0;
  bool counts_steps_;
  int* flags_;
  bool raises_;
  StepArgs args_;
};

// The functional step as a launch of one tensor: the update goes where a parameter would be.
inline StepArgs functional_args(const RuleConfig& config, const float* meta, int64_t numel,
                                double first_step, const float* grad, const float* state,
                                float* update, float* new_state) {
  StepArgs args = shared_args(config, meta, StepOptions{});
  args.update_only = true;
  args.first_step = float(first_step);
  args.state_shift = reinterpret_cast<intptr_t>(new_state) - reinterpret_cast<intptr_t>(state);
  args.tensors = 1;
  args.tiles = (numel + kTile - 1) / kTile;
  args.table[0] = {update, const_cast<float*>(grad), const_cast<float*>(state), nullptr, numel, 0};
  return args;
}

}  // namespace fastl2o::cuda
