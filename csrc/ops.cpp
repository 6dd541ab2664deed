// The CPU kernels of the fastl2o ops, against the LibTorch stable ABI. Schemas, fakes, autograd and
// the plain-torch default of each op live in Python (fastl2o/ops.py); this registers the CPU key.
#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu_tensor_args.h"
#include "cpu_tensor_list.h"
#include "nonfinite.h"

namespace {

using fastl2o::check_floats;
using fastl2o::DType;
using fastl2o::Family;
using fastl2o::floats;
using fastl2o::ListTensor;
using fastl2o::MetaLayout;
using fastl2o::mutable_floats;
using fastl2o::parallel_for;
using fastl2o::RuleConfig;
using fastl2o::scalar_of;
using fastl2o::small_number;
using fastl2o::TensorList;
using fastl2o::cpu::StepOptions;
using fastl2o::cpu::StepTensor;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

RuleConfig sized_config(Family family, int64_t hidden_size, int64_t num_layers) {
  RuleConfig config;
  config.family = family;
  config.hidden_size = small_number(hidden_size, 1, fastl2o::kMaxHidden, "hidden_size");
  config.num_layers = small_number(num_layers, 0, fastl2o::kMaxLayers, "num_layers");
  return config;
}

RuleConfig lstm_config(int64_t hidden_size, int64_t num_layers, bool log_sign, double p, double eps,
                       double output_scale) {
  STD_TORCH_CHECK(p > 0.0 && eps >= 0.0, "p is ", p, " and eps is ", eps,
                  "; accepted are p > 0 and eps >= 0");
  RuleConfig config = sized_config(Family::lstm, hidden_size, num_layers);
  config.log_sign = log_sign;
  config.p = p;
  config.eps = float(eps);
  config.output_scale = float(output_scale);
  return config;
}

RuleConfig rnnprop_config(int64_t hidden_size, int64_t num_layers, double beta1, double beta2,
                          double step_size) {
  STD_TORCH_CHECK(beta1 >= 0.0 && beta1 < 1.0 && beta2 >= 0.0 && beta2 < 1.0, "beta1 is ", beta1,
                  " and beta2 is ", beta2, "; accepted are 0 <= beta < 1");
  RuleConfig config = sized_config(Family::rnnprop, hidden_size, num_layers);
  config.beta1 = beta1;
  config.beta2 = beta2;
  config.step_size = float(step_size);
  return config;
}

// `sets`: rows of meta-parameters that are expected.
void check_config(const RuleConfig& config, const Tensor& meta, int64_t sets = 1) {
  STD_TORCH_CHECK(meta.scalar_type() == ScalarType::Float && meta.is_contiguous(),
                  "meta must be a contiguous float32 vector of the rule's meta-parameters");
  STD_TORCH_CHECK(meta.numel() == sets * MetaLayout(config).total, "meta holds ", meta.numel(),
                  " numbers; this rule has ", MetaLayout(config).total, " meta-parameters");
}

struct StepLists {
  const TensorList& params;
  const TensorList& grads;
  const TensorList& states;
  const TensorList* steps;
};

void check_tensor(const RuleConfig& config, size_t index, const ListTensor& param,
                  const ListTensor& grad, const ListTensor& state) {
  STD_TORCH_CHECK(param.type == grad.type && grad.has_shape(param, 0), "gradient ", index,
                  " of the list must have its parameter's type and shape");
  STD_TORCH_CHECK(config.state_planes() == 0 ? state.numel() == 0
                                             : state.has_shape(param, config.state_planes()),
                  "state ", index, " of the list must have ", config.state_planes(),
                  " planes of its parameter's shape");
  STD_TORCH_CHECK(param.contiguous && grad.contiguous && state.contiguous, "tensors ", index,
                  " of the lists must be contiguous");
}

// The tensors of a step, checked; `state_dtype` is that of all states.
std::vector<StepTensor> step_tensors(const RuleConfig& config, const StepLists& lists,
                                     DType& state_dtype) {
  const size_t count = lists.params.size();
  STD_TORCH_CHECK(lists.grads.size() == count && lists.states.size() == count &&
                      (lists.steps == nullptr || lists.steps->size() == count),
                  "params, grads, states and steps must be lists of the same length");
  std::vector<StepTensor> tensors;
  tensors.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const ListTensor param = lists.params[i], grad = lists.grads[i], state = lists.states[i];
    const DType dtype = fastl2o::dtype_of(state.type, "states");
    if (i == 0) state_dtype = dtype;
    STD_TORCH_CHECK(state_dtype == DType::f32 || state_dtype == DType::bf16,
                    "states must be float32 or bfloat16 for the CPU kernels");
    STD_TORCH_CHECK(dtype == state_dtype, "state ", i,
                    " of the list has another type than the first");
    check_tensor(config, i, param, grad, state);
    tensors.push_back({param.data(), grad.data(), state.data(),
                       lists.steps == nullptr ? nullptr : (*lists.steps)[i].floats(1, "steps", i),
                       param.numel(), fastl2o::dtype_of(param.type, "params")});
  }
  return tensors;
}

void run_step(const RuleConfig& config, const StepLists& lists, const Tensor& meta, double lr,
              double weight_decay, bool maximize, int64_t nonfinite,
              const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
              const std::optional<int64_t>& rounding_seed) {
  StepOptions options;
  options.meta_sets = fastl2o::meta_sets(meta, int64_t(lists.params.size()), "tensors");
  check_config(config, meta, options.meta_sets);
  options.nonfinite = fastl2o::nonfinite_of(nonfinite);
  std::vector<StepTensor> tensors = step_tensors(config, lists, options.state_dtype);
  options.stochastic_rounding = rounding_seed.has_value();
  options.seed = uint64_t(rounding_seed.value_or(0));
  STD_TORCH_CHECK(!options.stochastic_rounding || options.state_dtype == DType::bf16,
                  "rounding_seed is for bfloat16 states");
  const std::optional<float> scale = scalar_of(grad_scale, "grad_scale");
  if (scalar_of(found_inf, "found_inf").value_or(0.0f) != 0.0f) return;
  options.lr = lr;
  options.weight_decay = weight_decay;
  options.maximize = maximize;
  options.unscale = scale.has_value();
  options.grad_scale = scale.value_or(1.0f);
  if (options.meta_sets > 1)
    for (size_t i = 0; i < tensors.size(); ++i) tensors[i].meta_set = int64_t(i);
  const int64_t bad = fastl2o::cpu::step(fastl2o::cpu::best_kernels(), config, floats(meta),
                                         tensors, options, parallel_for);
  fastl2o::check_finite(bad);
}

// The lists of run_step as whole tensors: of runs of ten coordinates each, taking in the lists
// would take longer than the step.
void run_runs_step(const RuleConfig& config, const Tensor& params, const Tensor& grads,
                   const Tensor& states, double step, const Tensor& meta, double lr,
                   double weight_decay) {
  check_floats(params, "params");
  check_floats(grads, "grads");
  check_floats(states, "states");
  STD_TORCH_CHECK(params.dim() == 2 && fastl2o::has_shape(grads, params, 0),
                  "params and grads must be of one shape, (runs, coordinates)");
  const int64_t runs = params.size(0), dim = params.size(1);
  STD_TORCH_CHECK(states.dim() == 3 && states.size(0) == runs &&
                      states.size(1) == config.state_planes() && states.size(2) == dim,
                  "states must be (", runs, ", ", config.state_planes(), ", ", dim, ")");
  STD_TORCH_CHECK(meta.dim() == 2 && meta.size(0) == runs, "meta must have ", runs,
                  " rows, one for each run");
  check_config(config, meta, runs);
  fastl2o::cpu::step_runs(
      fastl2o::cpu::best_kernels(), config, floats(meta),
      {runs, dim, step, mutable_floats(params), floats(grads), mutable_floats(states)}, lr,
      weight_decay, parallel_for);
}

std::tuple<Tensor, Tensor> run_functional(const RuleConfig& config, const Tensor& grad,
                                          const Tensor& state, double step, const Tensor& meta) {
  check_config(config, meta);
  check_floats(grad, "grad");
  check_floats(state, "state");
  fastl2o::check_planes(config, state, grad, "state");
  Tensor update = torch::stable::empty_like(grad);
  Tensor new_state = torch::stable::empty_like(state);
  fastl2o::cpu::functional_step(fastl2o::cpu::best_kernels(), config, floats(meta), grad.numel(),
                                step, floats(grad), floats(state), mutable_floats(update),
                                mutable_floats(new_state), parallel_for);
  return {update, new_state};
}

std::tuple<Tensor, Tensor, Tensor> run_functional_backward(const RuleConfig& config,
                                                           const Tensor& d_update,
                                                           const Tensor& d_new_state,
                                                           const Tensor& grad, const Tensor& state,
                                                           double step, const Tensor& meta) {
  check_config(config, meta);
  check_floats(grad, "grad");
  check_floats(d_update, "d_update");
  check_floats(state, "state");
  check_floats(d_new_state, "d_new_state");
  Tensor d_grad = torch::stable::empty_like(grad);
  Tensor d_state = torch::stable::empty_like(state);
  Tensor d_meta = torch::stable::empty_like(meta);
  const auto args = fastl2o::step_window(config, d_update, d_new_state, grad, state, step, d_grad,
                                         d_state, d_meta);
  fastl2o::cpu::unroll_backward(fastl2o::cpu::best_kernels(), config, floats(meta), args,
                                parallel_for);
  return {d_grad, d_state, d_meta};
}

std::tuple<Tensor, Tensor> run_unroll_backward(const RuleConfig& config, const Tensor& grads,
                                               const Tensor& state, double step, const Tensor& meta,
                                               const Tensor& loss_weights, int64_t steps, double lr,
                                               double weight_decay,
                                               const std::optional<Tensor>& d_updates,
                                               const std::optional<Tensor>& d_last_state) {
  check_config(config, meta);
  check_floats(grads, "grads");
  check_floats(state, "state");
  check_floats(loss_weights, "loss_weights");
  if (d_updates.has_value()) check_floats(*d_updates, "d_updates");
  if (d_last_state.has_value()) check_floats(*d_last_state, "d_last_state");
  Tensor d_meta = torch::stable::empty_like(meta);
  Tensor d_state = torch::stable::empty_like(state);
  const auto args =
      fastl2o::recorded_window(config, grads, state, step, loss_weights, steps, lr, weight_decay,
                               d_updates, d_last_state, d_state, d_meta);
  fastl2o::cpu::unroll_backward(fastl2o::cpu::best_kernels(), config, floats(meta), args,
                                parallel_for);
  return {d_meta, d_state};
}

// `found`: the index of the first gradient that holds NaN or Inf, or -1.
void first_nonfinite_(const TensorList& grads, Tensor found) {
  STD_TORCH_CHECK(found.scalar_type() == ScalarType::Long && found.numel() == 1,
                  "found must be one int64 number");
  std::vector<fastl2o::cpu::Gradient> parts;
  parts.reserve(grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    const ListTensor grad = grads[i];
    STD_TORCH_CHECK(grad.contiguous, "grads must be contiguous");
    parts.push_back({grad.data(), grad.numel(), fastl2o::dtype_of(grad.type, "grads")});
  }
  const std::vector<bool> bad = fastl2o::cpu::find_nonfinite(parts, parallel_for);
  const auto first = std::find(bad.begin(), bad.end(), true);
  *static_cast<int64_t*>(found.mutable_data_ptr()) =
      first == bad.end() ? -1 : int64_t(first - bad.begin());
}

#include "ops_registration.inl"

std::string cpu_capability() { return fastl2o::cpu::kernel_name(fastl2o::cpu::best_kernels()); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastl2o, m) { m.def("cpu_capability() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(fastl2o, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
}

STABLE_TORCH_LIBRARY_IMPL(fastl2o, CPU, m) {
  m.impl("lstm_step_", TORCH_BOX(&lstm_step_));
  m.impl("lstm_runs_step_", TORCH_BOX(&lstm_runs_step_));
  m.impl("lstm_step", TORCH_BOX(&lstm_step));
  m.impl("lstm_step_backward", TORCH_BOX(&lstm_step_backward));
  m.impl("lstm_unroll_backward", TORCH_BOX(&lstm_unroll_backward));
  m.impl("rnnprop_step_", TORCH_BOX(&rnnprop_step_));
  m.impl("rnnprop_runs_step_", TORCH_BOX(&rnnprop_runs_step_));
  m.impl("rnnprop_step", TORCH_BOX(&rnnprop_step));
  m.impl("rnnprop_step_backward", TORCH_BOX(&rnnprop_step_backward));
  m.impl("rnnprop_unroll_backward", TORCH_BOX(&rnnprop_unroll_backward));
  m.impl("first_nonfinite_", TORCH_BOX(&first_nonfinite_));
}
