// The CUDA kernels as ops of the namespace fastl2o_cuda, against the LibTorch stable ABI: the
// library holds implementations only. fastl2o/_ops_gpu.py decides which calls of the fastl2o ops
// come here.
//
// Every op takes the rule as (rnnprop, hidden_size, num_layers, log_sign, p, eps, scale, beta1,
// beta2); a family leaves unused what it does not have. `fast` allows TF32 products.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"
#include "tensor_args.h"

namespace {

using fastl2o::Family;
using fastl2o::floats;
using fastl2o::MetaLayout;
using fastl2o::mutable_floats;
using fastl2o::RuleConfig;
using fastl2o::cuda::Precision;
using fastl2o::cuda::StepOptions;
using fastl2o::cuda::StepTensor;
using fastl2o::cuda::UnrollArgs;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kLeastCapability = 75;  // ten times 7.5
constexpr int kRaise = 2;

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

std::string place(const char* name, int64_t index) {
  return index < 0 ? name : std::string(name) + "[" + std::to_string(index) + "]";
}

// Makes the device of a call current, and holds what its launches need.
class Call {
 public:
  Call(const RuleConfig& config, const Tensor& meta)
      : device_(checked_device(meta)), guard_(device_) {
    STD_TORCH_CHECK(fastl2o::cuda::supported(config), "no CUDA kernels for hidden_size ",
                    config.hidden_size, " and num_layers ", config.num_layers,
                    "; use the Triton or the reference backend");
    int major = 0, minor = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device_));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device_));
    STD_TORCH_CHECK(10 * major + minor >= kLeastCapability,
                    "the CUDA kernels need compute capability 7.5, device ", device_, " has ",
                    major, ".", minor, "; use the Triton backend");
    check(meta, ScalarType::Float, "meta");
    STD_TORCH_CHECK(meta.numel() == MetaLayout(config).total, "meta holds ", meta.numel(),
                    " numbers; this rule has ", MetaLayout(config).total, " meta-parameters");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream_));
  }

  void* stream() const { return stream_; }

  // `index` is the tensor's place in its list, -1 outside of lists.
  void check(const Tensor& tensor, ScalarType type, const char* name, int64_t index = -1) const {
    STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == device_, place(name, index),
                    " must be on CUDA device ", device_, " like meta; move it");
    STD_TORCH_CHECK(tensor.scalar_type() == type && tensor.is_contiguous(), place(name, index),
                    " must be contiguous and have the dtype that the op takes: float32, or in a "
                    "list that of its first tensor; convert it, or use the reference backend");
  }

  Tensor scratch(int64_t count, ScalarType type) const {
    return torch::stable::empty(
        {count}, type, std::nullopt,
        torch::stable::Device(torch::headeronly::DeviceType::CUDA, device_));
  }

  void done(int status) const { STD_CUDA_CHECK(cudaError_t(status)); }

 private:
  static int32_t checked_device(const Tensor& meta) {
    STD_TORCH_CHECK(meta.is_cuda(), "meta must be on a CUDA device; move it");
    return meta.get_device_index();
  }

  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

Precision precision(bool fast) { return fast ? Precision::fast : Precision::exact; }

const float* device_scalar(const Call& call, const std::optional<Tensor>& tensor,
                           const char* name) {
  if (!tensor.has_value()) return nullptr;
  call.check(*tensor, ScalarType::Float, name);
  STD_TORCH_CHECK(tensor->numel() == 1, name, " holds ", tensor->numel(), " numbers; expected 1");
  return floats(*tensor);
}

// The first tensor whose flag is set, or -1. Waits for the stream: only nonfinite = 2 asks.
int64_t first_flagged(const Call& call, const int* flags, int64_t count) {
  const auto stream = static_cast<cudaStream_t>(call.stream());
  std::vector<int> host(size_t(count) + 1);
  STD_CUDA_CHECK(cudaMemcpyAsync(host.data(), flags, host.size() * sizeof(int),
                                 cudaMemcpyDeviceToHost, stream));
  STD_CUDA_CHECK(cudaStreamSynchronize(stream));
  if (host.back() == 0) return -1;
  for (int64_t i = 0; i < count; ++i)
    if (host[size_t(i)] != 0) return i;
  return -1;
}

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
  const Call call(config, meta);
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
  if (nonfinite != kRaise) return;
  const int64_t bad = first_flagged(call, options.nonfinite_flags, int64_t(count));
  STD_TORCH_CHECK(bad < 0, "gradient ", bad,
                  " of the list holds NaN or Inf; nothing was changed. Mend the loss, or choose "
                  "nonfinite='skip' (leave such tensors alone) or 'pass' (feed them to the rule)");
}

std::tuple<Tensor, Tensor> step(Tensor grad, Tensor state, int64_t first_step, Tensor meta,
                                bool rnnprop, int64_t hidden_size, int64_t num_layers,
                                bool log_sign, double p, double eps, double scale, double beta1,
                                double beta2, bool fast) {
  const RuleConfig config =
      make_config(rnnprop, hidden_size, num_layers, log_sign, p, eps, scale, beta1, beta2);
  const Call call(config, meta);
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
  const Call call(config, meta);
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
                                           double weight_decay, bool fast) {
  const RuleConfig config =
      make_config(rnnprop, hidden_size, num_layers, log_sign, p, eps, scale, beta1, beta2);
  const Call call(config, meta);
  call.check(grads, ScalarType::Float, "grads");
  call.check(state, ScalarType::Float, "state");
  call.check(loss_weights, ScalarType::Float, "loss_weights");
  Tensor d_meta = torch::stable::empty_like(meta);
  Tensor d_state = torch::stable::empty_like(state);
  const auto window =
      fastl2o::recorded_window(config, grads, state, double(first_step), loss_weights, steps, lr,
                               weight_decay, d_state, d_meta);
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
      "float lr, float weight_decay, bool fast) -> (Tensor, Tensor)");
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
