// The CPU kernels of the hierarchical rule's ops, against the LibTorch stable ABI. Schemas, fakes
// and the plain-torch default live in fastl2o/_ops_hierarchical.py; this registers the CPU key.
#include <optional>
#include <tuple>
#include <vector>

#include "cpu_tensor_args.h"
#include "cpu_tensor_list.h"
#include "hierarchical.h"

namespace {

using fastl2o::check_floats;
using fastl2o::DType;
using fastl2o::floats;
using fastl2o::HierarchicalConfig;
using fastl2o::HierarchicalLayout;
using fastl2o::ListTensor;
using fastl2o::mutable_floats;
using fastl2o::parallel_for;
using fastl2o::scalar_of;
using fastl2o::small_number;
using fastl2o::TensorList;
using fastl2o::cpu::HierarchicalOptions;
using fastl2o::cpu::HierarchicalTensor;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

HierarchicalConfig checked_config(const Tensor& meta, int64_t param_size, int64_t tensor_size,
                                  int64_t global_size, int64_t num_scales, int64_t sets = 1) {
  HierarchicalConfig config;
  config.param_size = small_number(param_size, 1, fastl2o::kMaxUnits, "param_size");
  config.tensor_size = small_number(tensor_size, 1, fastl2o::kMaxUnits, "tensor_size");
  config.global_size = small_number(global_size, 1, fastl2o::kMaxUnits, "global_size");
  config.num_scales = small_number(num_scales, 1, fastl2o::kMaxScales, "num_scales");
  check_floats(meta, "meta");
  STD_TORCH_CHECK(meta.numel() == sets * HierarchicalLayout(config).total, "meta holds ",
                  meta.numel(), " numbers; this rule has ", HierarchicalLayout(config).total,
                  " meta-parameters");
  return config;
}

struct StepLists {
  const TensorList &params, &grads, &planes, &tensor_states, &steps;
  const std::vector<int64_t>& problems;
  const std::vector<double>&lr, &weight_decay;
};

void check_lengths(const StepLists& lists) {
  const size_t count = lists.params.size();
  STD_TORCH_CHECK(
      lists.grads.size() == count && lists.planes.size() == count &&
          lists.tensor_states.size() == count && lists.steps.size() == count,
      "params, grads, planes, tensor_states and steps must be lists of the same length");
  STD_TORCH_CHECK(lists.lr.size() == count && lists.weight_decay.size() == count, "lr holds ",
                  lists.lr.size(), " numbers and weight_decay ", lists.weight_decay.size(),
                  "; expected one for each of ", count, " parameters");
  STD_TORCH_CHECK(lists.problems.empty() || lists.problems.size() == count, "problems holds ",
                  lists.problems.size(), " numbers; expected none or one for each of ", count,
                  " parameters");
}

// A tensor with what the levels above the parameters' have, checked.
HierarchicalTensor checked_levels(const HierarchicalConfig& config, const StepLists& lists,
                                  const Tensor& global_states, size_t index) {
  const int64_t problem = lists.problems.empty() ? 0 : lists.problems[index];
  STD_TORCH_CHECK(problem >= 0 && problem < global_states.size(0), "problems[", index, "] is ",
                  problem, "; global_states has ", global_states.size(0), " rows");
  HierarchicalTensor tensor{};
  tensor.state = lists.tensor_states[index].floats(config.tensor_size + 1, "tensor_states", index);
  tensor.step = lists.steps[index].floats(1, "steps", index);
  tensor.problem = problem;
  tensor.lr = lists.lr[index];
  tensor.weight_decay = lists.weight_decay[index];
  return tensor;
}

void check_global(const HierarchicalConfig& config, const Tensor& global_states) {
  check_floats(global_states, "global_states");
  STD_TORCH_CHECK(global_states.dim() == 2 && global_states.size(1) == config.global_size,
                  "global_states must be (problems, ", config.global_size, ")");
}

// The tensors of a step, checked; `planes_dtype` is that of all planes.
std::vector<HierarchicalTensor> step_tensors(const HierarchicalConfig& config,
                                             const StepLists& lists, const Tensor& global_states,
                                             DType& planes_dtype) {
  check_lengths(lists);
  check_global(config, global_states);
  std::vector<HierarchicalTensor> tensors;
  tensors.reserve(lists.params.size());
  for (size_t i = 0; i < lists.params.size(); ++i) {
    const ListTensor param = lists.params[i], grad = lists.grads[i], planes = lists.planes[i];
    const DType dtype = fastl2o::dtype_of(planes.type, "planes");
    if (i == 0) planes_dtype = dtype;
    STD_TORCH_CHECK(planes_dtype == DType::f32 || planes_dtype == DType::bf16,
                    "planes must be float32 or bfloat16 for the CPU kernels");
    STD_TORCH_CHECK(dtype == planes_dtype, "planes ", i,
                    " of the list have another type than the first");
    STD_TORCH_CHECK(param.type == grad.type && grad.has_shape(param, 0), "gradient ", i,
                    " of the list must have its parameter's type and shape");
    STD_TORCH_CHECK(planes.has_shape(param, config.state_planes()), "planes ", i,
                    " of the list must be ", config.state_planes(),
                    " planes of the parameter's shape");
    STD_TORCH_CHECK(param.contiguous && grad.contiguous && planes.contiguous, "tensors ", i,
                    " of the lists must be contiguous");
    HierarchicalTensor tensor = checked_levels(config, lists, global_states, i);
    tensor.param = param.data();
    tensor.grad = grad.data();
    tensor.planes = planes.data();
    tensor.numel = tensor.count = param.numel();
    tensor.param_dtype = fastl2o::dtype_of(param.type, "params");
    tensors.push_back(tensor);
  }
  return tensors;
}

// Of tensors that are split over ranks: the coordinates of the whole, and what is shared.
void set_counts(const HierarchicalConfig& config, std::vector<HierarchicalTensor>& tensors,
                const std::vector<int64_t>& counts, const Tensor& sums, const Tensor& raw) {
  STD_TORCH_CHECK(counts.size() == tensors.size(), "counts holds ", counts.size(),
                  " numbers; expected one for each of ", tensors.size(), " tensors");
  int64_t total = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    STD_TORCH_CHECK(counts[i] >= std::max<int64_t>(1, tensors[i].numel), "count ", i,
                    " of the list is ", counts[i], "; this part of the tensor alone holds ",
                    tensors[i].numel, " coordinates, and whole tensors that are empty rest");
    tensors[i].count = counts[i];
    total += tensors[i].numel;
  }
  STD_TORCH_CHECK(sums.scalar_type() == ScalarType::Double && sums.is_contiguous() &&
                      sums.numel() == int64_t(tensors.size()) * config.num_sums(),
                  "sums must be contiguous float64 (", tensors.size(), ", ", config.num_sums(),
                  ")");
  check_floats(raw, "raw");
  STD_TORCH_CHECK(raw.numel() == total, "raw holds ", raw.numel(), " numbers; the parts hold ",
                  total, " coordinates");
}

HierarchicalOptions options_of(DType planes_dtype, bool maximize,
                               const std::optional<Tensor>& grad_scale,
                               const std::optional<int64_t>& rounding_seed) {
  STD_TORCH_CHECK(!rounding_seed.has_value() || planes_dtype == DType::bf16,
                  "stochastic rounding is of bfloat16 planes");
  const std::optional<float> scale = scalar_of(grad_scale, "grad_scale");
  HierarchicalOptions options;
  options.planes_dtype = planes_dtype;
  options.maximize = maximize;
  options.unscale = scale.has_value();
  options.grad_scale = scale.value_or(1.0f);
  options.stochastic_rounding = rounding_seed.has_value();
  options.seed = uint64_t(rounding_seed.value_or(0));
  return options;
}

void hierarchical_step_(const TensorList& params, const TensorList& grads, const TensorList& planes,
                        const TensorList& tensor_states, const TensorList& steps,
                        Tensor global_states, const std::vector<int64_t>& problems, Tensor meta,
                        int64_t param_size, int64_t tensor_size, int64_t global_size,
                        int64_t num_scales, const std::vector<double>& lr,
                        const std::vector<double>& weight_decay, bool maximize, int64_t nonfinite,
                        std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf,
                        std::optional<int64_t> rounding_seed) {
  const int64_t sets = fastl2o::meta_sets(meta, global_states.size(0), "problems");
  const HierarchicalConfig config =
      checked_config(meta, param_size, tensor_size, global_size, num_scales, sets);
  const StepLists lists{params, grads, planes, tensor_states, steps, problems, lr, weight_decay};
  DType planes_dtype = DType::f32;
  auto tensors = step_tensors(config, lists, global_states, planes_dtype);
  HierarchicalOptions options = options_of(planes_dtype, maximize, grad_scale, rounding_seed);
  options.meta_sets = sets;
  options.nonfinite = fastl2o::nonfinite_of(nonfinite);
  if (scalar_of(found_inf, "found_inf").value_or(0.0f) != 0.0f) return;
  const int64_t bad = fastl2o::cpu::hierarchical_step(
      fastl2o::cpu::best_kernels(), config, floats(meta), tensors, mutable_floats(global_states),
      global_states.size(0), options, parallel_for);
  fastl2o::check_finite(bad);
}

void hierarchical_sweep_(const TensorList& grads, const TensorList& planes,
                         const TensorList& tensor_states, const TensorList& steps,
                         Tensor global_states, const std::vector<int64_t>& problems,
                         const std::vector<int64_t>& counts, Tensor meta, int64_t param_size,
                         int64_t tensor_size, int64_t global_size, int64_t num_scales,
                         bool maximize, std::optional<Tensor> grad_scale, Tensor sums, Tensor raw,
                         std::optional<int64_t> rounding_seed) {
  const HierarchicalConfig config =
      checked_config(meta, param_size, tensor_size, global_size, num_scales);
  const std::vector<double> unused(grads.size(), 0.0);
  const StepLists lists{grads, grads, planes, tensor_states, steps, problems, unused, unused};
  DType planes_dtype = DType::f32;
  auto tensors = step_tensors(config, lists, global_states, planes_dtype);
  const HierarchicalOptions options = options_of(planes_dtype, maximize, grad_scale, rounding_seed);
  set_counts(config, tensors, counts, sums, raw);
  fastl2o::cpu::hierarchical_sweep(fastl2o::cpu::best_kernels(), config, floats(meta), tensors,
                                   floats(global_states), global_states.size(0), options,
                                   parallel_for, static_cast<double*>(sums.mutable_data_ptr()),
                                   mutable_floats(raw));
}

void hierarchical_finish_(const TensorList& params, const TensorList& tensor_states,
                          const TensorList& steps, Tensor global_states,
                          const std::vector<int64_t>& problems, const std::vector<int64_t>& counts,
                          Tensor meta, int64_t param_size, int64_t tensor_size, int64_t global_size,
                          int64_t num_scales, const std::vector<double>& lr,
                          const std::vector<double>& weight_decay, Tensor sums, Tensor raw) {
  const HierarchicalConfig config =
      checked_config(meta, param_size, tensor_size, global_size, num_scales);
  const StepLists lists{params, params, params, tensor_states, steps, problems, lr, weight_decay};
  check_lengths(lists);
  check_global(config, global_states);
  std::vector<HierarchicalTensor> tensors;
  tensors.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    const ListTensor param = params[i];
    STD_TORCH_CHECK(param.contiguous, "parameter ", i, " of the list must be contiguous");
    HierarchicalTensor tensor = checked_levels(config, lists, global_states, i);
    tensor.param = param.data();
    tensor.numel = param.numel();
    tensor.param_dtype = fastl2o::dtype_of(param.type, "params");
    tensors.push_back(tensor);
  }
  set_counts(config, tensors, counts, sums, raw);
  fastl2o::cpu::hierarchical_finish(fastl2o::cpu::best_kernels(), config, floats(meta), tensors,
                                    mutable_floats(global_states), global_states.size(0),
                                    parallel_for, static_cast<const double*>(sums.const_data_ptr()),
                                    mutable_floats(raw));
}

std::tuple<Tensor, Tensor> hierarchical_unroll_backward(
    Tensor grads, Tensor state, int64_t step, Tensor meta, Tensor loss_weights, int64_t steps,
    std::vector<int64_t> sizes, int64_t param_size, int64_t tensor_size, int64_t global_size,
    int64_t num_scales, double lr, double weight_decay, std::optional<Tensor> d_updates) {
  const HierarchicalConfig config =
      checked_config(meta, param_size, tensor_size, global_size, num_scales);
  check_floats(grads, "grads");
  check_floats(state, "state");
  check_floats(loss_weights, "loss_weights");
  if (d_updates.has_value()) check_floats(*d_updates, "d_updates");
  fastl2o::check_recorded(grads, loss_weights, steps);
  const int64_t rows = grads.size(0), runs = grads.size(1);
  int64_t dim = 0;
  for (const int64_t size : sizes) {
    STD_TORCH_CHECK(size >= 0, "sizes holds ", size, "; accepted are sizes >= 0");
    dim += size;
  }
  STD_TORCH_CHECK(dim == grads.size(2), "sizes add up to ", dim, " but grads has ", grads.size(2),
                  " coordinates a run");
  STD_TORCH_CHECK(step >= 0, "step is ", step, "; expected the number of steps before the window");
  const int64_t width = fastl2o::cpu::hierarchical_row_size(config, sizes);
  STD_TORCH_CHECK(
      state.dim() == 2 && state.size(0) == runs && state.size(1) == width, "state must be (", runs,
      ", ", width,
      "): a row for each run with its tensors' planes, their states and the global one");
  Tensor d_meta = torch::stable::empty_like(meta);
  Tensor d_state = torch::stable::empty_like(state);
  fastl2o::cpu::HierarchicalUnrollArgs args;
  args.steps = steps;
  args.rows = rows;
  args.runs = runs;
  args.from_start = step == 0;
  args.lr = lr;
  args.weight_decay = weight_decay;
  args.sizes = sizes;
  args.grads = floats(grads);
  args.state = floats(state);
  args.loss_weights = floats(loss_weights);
  args.d_updates = fastl2o::given_updates(d_updates, grads, steps);
  args.d_meta = mutable_floats(d_meta);
  args.d_state = mutable_floats(d_state);
  fastl2o::cpu::hierarchical_unroll_backward(fastl2o::cpu::best_kernels(), config, floats(meta),
                                             args, parallel_for);
  return {d_meta, d_state};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastl2o, CPU, m) {
  m.impl("hierarchical_step_", TORCH_BOX(&hierarchical_step_));
  m.impl("hierarchical_sweep_", TORCH_BOX(&hierarchical_sweep_));
  m.impl("hierarchical_finish_", TORCH_BOX(&hierarchical_finish_));
  m.impl("hierarchical_unroll_backward", TORCH_BOX(&hierarchical_unroll_backward));
}
