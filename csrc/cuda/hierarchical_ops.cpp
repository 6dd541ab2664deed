// The hierarchical rule's CUDA kernels as ops of the namespace fastl2o_cuda, beside those of
// ops.cpp; fastl2o/_ops_hierarchical_gpu.py decides which calls come here.
#include <string>
#include <vector>

#include "call.h"
#include "hierarchical_window.h"

namespace {

using fastl2o::HierarchicalConfig;
using fastl2o::HierarchicalLayout;
using fastl2o::cuda::Call;
using fastl2o::cuda::HierarchicalOptions;
using fastl2o::cuda::HierarchicalTensor;
using fastl2o::cuda::place;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

HierarchicalConfig make_config(int64_t param_size, int64_t tensor_size, int64_t global_size,
                               int64_t num_scales) {
  const auto small = [](int64_t value, int64_t most, const char* name) {
    STD_TORCH_CHECK(value >= 1 && value <= most, name, " is ", value, "; accepted are 1 to ", most);
    return int(value);
  };
  HierarchicalConfig config;
  config.param_size = small(param_size, fastl2o::kMaxUnits, "param_size");
  config.tensor_size = small(tensor_size, fastl2o::kMaxUnits, "tensor_size");
  config.global_size = small(global_size, fastl2o::kMaxUnits, "global_size");
  config.num_scales = small(num_scales, fastl2o::kMaxScales, "num_scales");
  return config;
}

std::string unsupported(const HierarchicalConfig& config) {
  if (fastl2o::cuda::supported(config)) return "";
  return "param_size " + std::to_string(config.param_size) + ", tensor_size " +
         std::to_string(config.tensor_size) + ", global_size " +
         std::to_string(config.global_size) + " and num_scales " +
         std::to_string(config.num_scales) + " (there are for 10, 20, 20 and 4)";
}

struct StepLists {
  const std::vector<Tensor>&params, &grads, &planes, &tensor_states, &steps;
  const std::vector<int64_t>& problems;
  const std::vector<double>&lr, &weight_decay;
};

std::vector<HierarchicalTensor> checked_tensors(const Call& call, const HierarchicalConfig& config,
                                                const StepLists& lists,
                                                const Tensor& global_states) {
  const ScalarType planes_type = lists.planes[0].scalar_type();
  STD_TORCH_CHECK(planes_type == ScalarType::Float || planes_type == ScalarType::BFloat16,
                  "planes must be float32 or bfloat16 for the CUDA kernels");
  std::vector<HierarchicalTensor> tensors;
  tensors.reserve(lists.params.size());
  for (size_t i = 0; i < lists.params.size(); ++i) {
    const int64_t index = int64_t(i), numel = lists.params[i].numel();
    const ScalarType param_type = lists.params[i].scalar_type();
    call.check(lists.params[i], param_type, "params", index);
    call.check(lists.grads[i], param_type, "grads", index);
    call.check(lists.planes[i], planes_type, "planes", index);
    call.check(lists.tensor_states[i], ScalarType::Float, "tensor_states", index);
    call.check(lists.steps[i], ScalarType::Float, "steps", index);
    STD_TORCH_CHECK(fastl2o::has_shape(lists.grads[i], lists.params[i], 0), place("grads", index),
                    " must have its parameter's shape");
    STD_TORCH_CHECK(fastl2o::has_shape(lists.planes[i], lists.params[i], config.state_planes()),
                    place("planes", index), " must be ", config.state_planes(),
                    " planes of its parameter's shape");
    STD_TORCH_CHECK(lists.tensor_states[i].numel() == config.tensor_size + 1,
                    place("tensor_states", index), " must hold ", config.tensor_size + 1,
                    " numbers");
    STD_TORCH_CHECK(lists.steps[i].numel() == 1, place("steps", index), " must be one number");
    const int64_t problem = lists.problems.empty() ? 0 : lists.problems[i];
    STD_TORCH_CHECK(problem >= 0 && problem < global_states.size(0), place("problems", index),
                    " is ", problem, "; global_states has ", global_states.size(0), " rows");
    tensors.push_back(
        {lists.params[i].mutable_data_ptr(), lists.grads[i].mutable_data_ptr(),
         lists.planes[i].mutable_data_ptr(), fastl2o::mutable_floats(lists.tensor_states[i]),
         fastl2o::mutable_floats(lists.steps[i]), numel, fastl2o::dtype_of(param_type, "params"),
         problem, lists.lr[i], lists.weight_decay[i]});
  }
  return tensors;
}

void hierarchical_step_(std::vector<Tensor> params, std::vector<Tensor> grads,
                        std::vector<Tensor> planes, std::vector<Tensor> tensor_states,
                        std::vector<Tensor> steps, Tensor global_states,
                        std::vector<int64_t> problems, Tensor meta, int64_t param_size,
                        int64_t tensor_size, int64_t global_size, int64_t num_scales,
                        std::vector<double> lr, std::vector<double> weight_decay, bool maximize,
                        int64_t nonfinite, std::optional<Tensor> grad_scale,
                        std::optional<Tensor> found_inf, std::optional<int64_t> rounding_seed) {
  const HierarchicalConfig config = make_config(param_size, tensor_size, global_size, num_scales);
  const size_t count = params.size();
  STD_TORCH_CHECK(grads.size() == count && planes.size() == count &&
                      tensor_states.size() == count && steps.size() == count &&
                      lr.size() == count && weight_decay.size() == count &&
                      (problems.empty() || problems.size() == count),
                  "params, grads, planes, tensor_states, steps, lr and weight_decay must be lists "
                  "of one length, and problems of that or none");
  STD_TORCH_CHECK(nonfinite >= 0 && nonfinite <= fastl2o::cuda::kRaise, "nonfinite is ", nonfinite,
                  "; accepted are 0 (pass), 1 (skip) and 2 (raise)");
  if (count == 0) return;
  const Call call(meta, unsupported(config), HierarchicalLayout(config).total);
  call.check(global_states, ScalarType::Float, "global_states");
  STD_TORCH_CHECK(global_states.dim() == 2 && global_states.size(1) == config.global_size,
                  "global_states must be (problems, ", config.global_size, ")");
  const std::vector<HierarchicalTensor> tensors = checked_tensors(
      call, config, {params, grads, planes, tensor_states, steps, problems, lr, weight_decay},
      global_states);
  HierarchicalOptions options;
  options.maximize = maximize;
  options.nonfinite = int(nonfinite);
  options.planes_dtype = fastl2o::dtype_of(planes[0].scalar_type(), "planes");
  STD_TORCH_CHECK(!rounding_seed.has_value() || options.planes_dtype == fastl2o::DType::bf16,
                  "stochastic rounding is of bfloat16 planes");
  options.stochastic_rounding = rounding_seed.has_value();
  options.seed = uint64_t(rounding_seed.value_or(0));
  options.grad_scale = device_scalar(call, grad_scale, "grad_scale");
  options.found_inf = device_scalar(call, found_inf, "found_inf");
  std::optional<Tensor> flags;
  if (nonfinite != 0) {
    flags = call.scratch(int64_t(count) + 1, ScalarType::Int);
    options.nonfinite_flags = static_cast<int*>(flags->mutable_data_ptr());
  }
  const fastl2o::cuda::HierarchicalPlan plan(tensors.data(), int64_t(count), global_states.size(0));
  // From torch's allocator, which keeps it for the next step and knows of streams and graphs.
  const Tensor workspace = call.scratch(plan.workspace_bytes(), ScalarType::Byte);
  call.done(fastl2o::cuda::hierarchical_step(plan, fastl2o::floats(meta),
                                             fastl2o::mutable_floats(global_states), options,
                                             workspace.mutable_data_ptr(), call.stream()));
  if (nonfinite == fastl2o::cuda::kRaise)
    check_finite(call, options.nonfinite_flags, int64_t(count));
}

std::tuple<Tensor, Tensor> hierarchical_unroll_backward(
    Tensor grads, Tensor state, int64_t step, Tensor meta, Tensor loss_weights, int64_t steps,
    std::vector<int64_t> sizes, int64_t param_size, int64_t tensor_size, int64_t global_size,
    int64_t num_scales, double lr, double weight_decay, std::optional<Tensor> d_updates) {
  const HierarchicalConfig config = make_config(param_size, tensor_size, global_size, num_scales);
  const Call call(meta, unsupported(config), HierarchicalLayout(config).total);
  call.check(grads, ScalarType::Float, "grads");
  call.check(state, ScalarType::Float, "state");
  call.check(loss_weights, ScalarType::Float, "loss_weights");
  if (d_updates.has_value()) call.check(*d_updates, ScalarType::Float, "d_updates");
  int64_t coordinates = 0;
  for (size_t i = 0; i < sizes.size(); ++i) {
    STD_TORCH_CHECK(sizes[i] >= 0, place("sizes", int64_t(i)), " is ", sizes[i],
                    "; accepted are numbers of coordinates");
    coordinates += sizes[i];
  }
  Tensor d_meta = torch::stable::empty_like(meta);
  Tensor d_state = torch::stable::empty_like(state);
  if (steps == 0 || grads.numel() == 0)
    return {torch::stable::fill_(d_meta, 0.0), torch::stable::fill_(d_state, 0.0)};
  fastl2o::check_recorded(grads, loss_weights, steps);
  fastl2o::cuda::HierarchicalWindowCall window = {};
  window.tensors = int64_t(sizes.size());
  window.steps = steps;
  window.rows = grads.size(0);
  window.runs = grads.size(1);
  window.coordinates = grads.size(2);
  window.width = config.state_planes() * coordinates + (config.tensor_size + 1) * window.tensors +
                 config.global_size;
  STD_TORCH_CHECK(coordinates == window.coordinates, "sizes add up to ", coordinates,
                  "; grads has ", window.coordinates, " coordinates");
  STD_TORCH_CHECK(state.dim() == 2 && state.size(0) == window.runs && state.size(1) == window.width,
                  "state must be (", window.runs, ", ", window.width, ")");
  window.meta = fastl2o::floats(meta);
  window.grads = fastl2o::floats(grads);
  window.state = fastl2o::floats(state);
  window.loss_weights = fastl2o::floats(loss_weights);
  window.d_updates = fastl2o::given_updates(d_updates, grads, steps);
  window.d_meta = fastl2o::mutable_floats(d_meta);
  window.d_state = fastl2o::mutable_floats(d_state);
  window.sizes = sizes.data();
  window.step = double(step);
  window.lr = lr;
  window.weight_decay = weight_decay;
  using fastl2o::cuda::HierarchicalWindow;
  const int64_t bytes = HierarchicalWindow(window, nullptr).workspace_bytes();
  const Tensor workspace = call.scratch(bytes, ScalarType::Byte);
  const HierarchicalWindow planned(window, workspace.mutable_data_ptr());
  STD_TORCH_CHECK(planned.fits(), "a window of ", window.runs, " runs of ", coordinates,
                  " coordinates is beyond the CUDA kernels' 32-bit counters; pass fewer in a call");
  call.done(fastl2o::cuda::hierarchical_unroll_backward(planned, call.stream()));
  return {d_meta, d_state};
}

bool hierarchical_supported(int64_t param_size, int64_t tensor_size, int64_t global_size,
                            int64_t num_scales) {
  return fastl2o::cuda::supported(make_config(param_size, tensor_size, global_size, num_scales));
}

#define FASTL2O_SIZES "int param_size, int tensor_size, int global_size, int num_scales"

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastl2o_cuda, m) {
  m.def(
      "hierarchical_step_(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] planes, "
      "Tensor(d!)[] tensor_states, Tensor(e!)[] steps, Tensor(f!) global_states, int[] problems, "
      "Tensor meta, " FASTL2O_SIZES
      ", float[] lr, float[] weight_decay, bool maximize, int nonfinite, Tensor? grad_scale=None, "
      "Tensor? found_inf=None, int? rounding_seed=None) -> ()");
  m.def(
      "hierarchical_unroll_backward(Tensor grads, Tensor state, int step, Tensor meta, Tensor "
      "loss_weights, int steps, int[] sizes, " FASTL2O_SIZES
      ", float lr, float weight_decay, Tensor? d_updates=None) -> (Tensor, Tensor)");
  m.def("hierarchical_supported(" FASTL2O_SIZES ") -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(fastl2o_cuda, CompositeExplicitAutograd, m) {
  m.impl("hierarchical_supported", TORCH_BOX(&hierarchical_supported));
}

STABLE_TORCH_LIBRARY_IMPL(fastl2o_cuda, CUDA, m) {
  m.impl("hierarchical_step_", TORCH_BOX(&hierarchical_step_));
  m.impl("hierarchical_unroll_backward", TORCH_BOX(&hierarchical_unroll_backward));
}
