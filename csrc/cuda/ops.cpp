// The CUDA kernels as ops of the namespace fastl2o_cuda, against the LibTorch stable ABI: the
// library holds implementations only. fastl2o/_ops_gpu.py decides which calls of the fastl2o ops
// come here.
//
// Every op takes the rule as (rnnprop, hidden_size, num_layers, log_sign, p, eps, scale, beta1,
// beta2); a family leaves unused what it does not have. `fast` allows TF32 products.
#include <tuple>

#include "call.h"
#include "kernels.h"

namespace {

using fastl2o::Family;
using fastl2o::floats;
using fastl2o::MetaLayout;
using fastl2o::mutable_floats;
using fastl2o::RuleConfig;
using fastl2o::cuda::Call;
using fastl2o::cuda::check_finite;
using fastl2o::cuda::device_scalar;
using fastl2o::cuda::kRaise;
using fastl2o::cuda::place;
using fastl2o::cuda::Precision;
using fastl2o::cuda::StepOptions;
using fastl2o::cuda::StepTensor;
using fastl2o::cuda::UnrollArgs;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

RuleConfig make_config(bool rnnprop, int64_t hidden_size, int64_t num_layers, bool log_sign,
                       double p, double eps, double scale, double beta1, double beta2) {
  STD_TORCH_CHECK(hidden_size >= 1 && hidden_size <= fastl2o::kMaxHidden, "hidden_size is ",
                  hidden_size, "; accepted are 1 to ", fastl2o::kMaxHidden);
  STD_TORCH_CHECK(num_layers >= 0 && num_layers <= fastl2o::kMaxLayers, "num_layers is ",
                  num_layers, "; accepted are 0 to ", fastl2o::kMaxLayers);
  RuleConfig config;
  config.family = rnnprop ? Family::rnnprop : Family::lstm;
  config.hidden_size = int(hidden_size);
  config.num_layers = int(num_layers);
  config.log_sign = log_sign;
  config.p = p;
  config.eps = float(eps);
  config.output_scale = config.step_size = float(scale);
  config.beta1 = beta1;
  config.beta2 = beta2;
  return config;
}

Call make_call(const RuleConfig& config, const Tensor& meta) {
  std::string unsupported;
  if (!fastl2o::cuda::supported(config))
    unsupported = "hidden_size " + std::to_string(config.hidden_size) + " and num_layers " +
                  std::to_string(config.num_layers);
  return Call(meta, unsupported, MetaLayout(config).total);
}

Precision precision(bool fast) { return fast ? Precision::fast : Precision::exact; }

void step_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> states,
           std::vector<Tensor> steps, Tensor meta, bool rnnprop, int64_t hidden_size,
           int64_t num_layers, bool log_sign, double p, double eps, double scale, double beta1,
           double beta2, double lr, double weight_decay, bool maximize, int64_t nonfinite,
           std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf, bool fast,
           bool stochastic_rounding, int64_t seed) {
  const RuleConfig config =
      make_config(rnnprop, hidden_size, num_layers, log_sign, p, eps, scale, beta1, beta2);
  const size_t count = params.size();
  STD_TORCH_CHECK(
      grads.size() == count && states.size() == count && steps.size() == (rnnprop ? count : 0),
      "params, grads, states and, for RNNprop, steps must be lists of one length");
  STD_TORCH_CHECK(nonfinite >= 0 && nonfinite <= kRaise, "nonfinite is ", nonfinite,
                  "; accepted are 0 (pass), 1 (skip) and 2 (raise)");
  if (count == 0) return;
  const Call call = make_call(config, meta);
  const ScalarType param_type = params[0].scalar_type(), state_type = states[0].scalar_type();
  STD_TORCH_CHECK(state_type == ScalarType::Float || state_type == ScalarType::BFloat16,
                  "states must be float32 or bfloat16 for the CUDA kernels");
  std::vector<StepTensor> tensors;
  tensors.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const int64_t index = int64_t(i), numel = params[i].numel();
    call.check(params[i], param_type, "params", index);
    call.check(grads[i], param_type, "grads", index);
    call.check(states[i], state_type, "states", index);
    STD_TORCH_CHECK(grads[i].numel() == numel, place("grads", index),
                    " must have its parameter's shape");
    STD_TORCH_CHECK(states[i].numel() == numel * config.state_planes(), place("states", index),
                    " must have ", config.state_planes(), " planes of its parameter's shape");
    if (rnnprop) {
      call.check(steps[i], ScalarType::Float, "steps", index);
      STD_TORCH_CHECK(steps[i].numel() == 1, place("steps", index), " must be one number");
    }
    tensors.push_back({params[i].mutable_data_ptr(), grads[i].mutable_data_ptr(),
                       states[i].mutable_data_ptr(), rnnprop ? mutable_floats(steps[i]) : nullptr,
                       numel});
  }
  StepOptions options;
  options.lr = lr;
  options.weight_decay = weight_decay;
  options.maximize = maximize;
  options.nonfinite = int(nonfinite);
  options.param_dtype = fastl2o::dtype_of(param_type, "params");
  options.state_dtype = fastl2o::dtype_of(state_type, "states");
  options.precision = precision(fast);
  options.stochastic_rounding = stochastic_rounding;
  options.seed = uint64_t(seed);
  options.grad_scale = device_scalar(call, grad_scale, "grad_scale");
  options.found_inf = device_scalar(call, found_inf, "found_inf");
  std::optional<Tensor> flags;
  if (nonfinite != 0) {
    flags = call.scratch(int64_t(count) + 1, ScalarType::Int);
    options.nonfinite_flags = static_cast<int*>(flags->mutable_data_ptr());
  }
  call.done(fastl2o::cuda::step(config, floats(meta), tensors.data(), int64_t(count), options,
                                call.stream()));
  if (nonfinite == kRaise) check_finite(call, options.nonfinite_flags, int64_t(count));
}

std::tuple<Tensor, Tensor> step(Tensor grad, Tensor state, int64_t first_step, Tensor meta,
                                bool rnnprop, int64_t hidden_size, int64_t num_layers,
                                bool log_sign, double p, double eps, double scale, double beta1,
                                double beta2, bool fast) {
  const RuleConfig config =
      make_config(rnnprop, hidden_size, num_layers, log_sign, p, eps, scale, beta1, beta2);
  const Call call = make_call(config, meta);
  const int64_t numel = grad.numel();
  call.check(grad, ScalarType::Float, "grad");
  call.check(state, ScalarType::Float, "state");
  fastl2o::check_planes(config, state, grad, "state");
  Tensor update = torch::stable::empty_like(grad);
  Tensor new_state = torch::stable::empty_like(state);
  if (numel > 0)
    call.done(fastl2o::cuda::functional_step(
        config, floats(meta), numel, double(first_step), floats(grad), floats(state),
        mutable_floats(update), mutable_floats(new_state), precision(fast), call.stream()));
  return {update, new_state};
}

// The gradient of the meta-parameters is 0 where there is no coordinate.
void run_window(const Call& call, const RuleConfig& config, const Tensor& meta,
                const fastl2o::UnrollArgs& window, Tensor& d_meta, bool fast) {
  if (window.runs * window.dim == 0) {
    torch::stable::zero_(d_meta);
    return;
  }
  UnrollArgs args{window};
  STD_TORCH_CHECK(fastl2o::cuda::countable(args), "a window of ", window.steps, " steps and ",
                  window.runs, " runs of ", window.dim,
                  " coordinates is beyond the CUDA kernels' 32-bit counters of steps, runs and "
                  "tiles of coordinates; pass fewer in a call");
  const Tensor scratch =
      call.scratch(fastl2o::cuda::unroll_scratch_floats(config, args), ScalarType::Float);
  args.scratch = mutable_floats(scratch);
  call.done(
      fastl2o::cuda::unroll_backward(config, floats(meta), args, precision(fast), call.stream()));
}

std::tuple<Tensor, Tensor, Tensor> step_backward(Tensor d_update, Tensor d_new_state, Tensor grad,
                                                 Tensor state, int64_t first_step, Tensor meta,
                                                 bool rnnprop, int64_t hidden_size,
                                                 int64_t num_layers, bool log_sign, double p,
                                                 double eps, double scale, double beta1,
                                                 double beta2, bool fast) {
  const RuleConfig config =
      make_config(rnnprop, hidden_size, num_layers, log_sign, p, eps, scale, beta1, beta2);
  const Call call = make_call(config, meta);
  call.check(grad, ScalarType::Float, "grad");
  call.check(d_update, ScalarType::Float, "d_update");
  call.check(state, ScalarType::Float, "state");
  call.check(d_new_state, ScalarType::Float, "d_new_state");
  Tensor d_grad = torch::stable::empty_like(grad);
  Tensor d_state = torch::stable::empty_like(state);
  Tensor d_meta = torch::stable::empty_like(meta);
  const auto window = fastl2o::step_window(config, d_update, d_new_state, grad, state,
                                           double(first_step), d_grad, d_state, d_meta);
  run_window(call, config, meta, window, d_meta, fast);
  return {d_grad, d_state, d_meta};
}

std::tuple<Tensor, Tensor> unroll_backward(Tensor grads, Tensor state, int64_t first_step,
                                           Tensor meta, Tensor loss_weights, int64_t steps,
                                           bool rnnprop, int64_t hidden_size, int64_t num_layers,
                                           bool log_sign, double p, double eps, double scale,
                                           double beta1, double beta2, double lr,
                                           double weight_decay, std::optional<Tensor> d_updates,
                                           std::optional<Tensor> d_last_state, bool fast) {
  const RuleConfig config =
      make_config(rnnprop, hidden_size, num_layers, log_sign, p, eps, scale, beta1, beta2);
  const Call call = make_call(config, meta);
  call.check(grads, ScalarType::Float, "grads");
  call.check(state, ScalarType::Float, "state");
  call.check(loss_weights, ScalarType::Float, "loss_weights");
  if (d_updates.has_value()) call.check(*d_updates, ScalarType::Float, "d_updates");
  if (d_last_state.has_value()) call.check(*d_last_state, ScalarType::Float, "d_last_state");
  Tensor d_meta = torch::stable::empty_like(meta);
  Tensor d_state = torch::stable::empty_like(state);
  const auto window =
      fastl2o::recorded_window(config, grads, state, double(first_step), loss_weights, steps, lr,
                               weight_decay, d_updates, d_last_state, d_state, d_meta);
  run_window(call, config, meta, window, d_meta, fast);
  return {d_meta, d_state};
}

bool supported(bool rnnprop, int64_t hidden_size, int64_t num_layers) {
  RuleConfig config;
  config.family = rnnprop ? Family::rnnprop : Family::lstm;
  config.hidden_size = int(hidden_size);
  config.num_layers = int(num_layers);
  return fastl2o::cuda::supported(config);
}

#define FASTL2O_RULE                                                              \
  "bool rnnprop, int hidden_size, int num_layers, bool log_sign, float p, float " \
  "eps, float scale, float beta1, float beta2, "

}  // namespace

STABLE_TORCH_LIBRARY(fastl2o_cuda, m) {
  m.def(
      "step_(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] states, Tensor(d!)[] steps, "
      "Tensor meta, " FASTL2O_RULE
      "float lr, float weight_decay, bool maximize, int nonfinite, Tensor? grad_scale, Tensor? "
      "found_inf, bool fast, bool stochastic_rounding=False, int seed=0) -> ()");
  m.def("step(Tensor grad, Tensor state, int first_step, Tensor meta, " FASTL2O_RULE
        "bool fast) -> (Tensor, Tensor)");
  m.def(
      "step_backward(Tensor d_update, Tensor d_new_state, Tensor grad, Tensor state, int "
      "first_step, Tensor meta, " FASTL2O_RULE "bool fast) -> (Tensor, Tensor, Tensor)");
  m.def(
      "unroll_backward(Tensor grads, Tensor state, int first_step, Tensor meta, Tensor "
      "loss_weights, int steps, " FASTL2O_RULE
      "float lr, float weight_decay, Tensor? d_updates, Tensor? d_last_state, bool fast) -> "
      "(Tensor, Tensor)");
  m.def("supported(bool rnnprop, int hidden_size, int num_layers) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(fastl2o_cuda, CompositeExplicitAutograd, m) {
  m.impl("supported", TORCH_BOX(&supported));
}

STABLE_TORCH_LIBRARY_IMPL(fastl2o_cuda, CUDA, m) {
  m.impl("step_", TORCH_BOX(&step_));
  m.impl("step", TORCH_BOX(&step));
  m.impl("step_backward", TORCH_BOX(&step_backward));
  m.impl("unroll_backward", TORCH_BOX(&unroll_backward));
}
