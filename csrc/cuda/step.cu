// The in-place step over lists of tensors and the functional step: launches on the caller's stream,
// no allocation, no synchronisation, so both can be captured into a graph. (To raise for gradients
// that are not finite, the op reads the flags of the scan and so cannot.)
#include <cuda_runtime.h>

#include <algorithm>

#include "kernels.h"
#include "step_plan.h"
#include "step_tile.cuh"

namespace fastl2o::cuda {
namespace {

constexpr int kScanThreads = 384;

// Sets the flag of every tensor of the table whose gradient holds NaN or Inf, and `any`.
__global__ void __launch_bounds__(kScanThreads)
    scan_kernel(const __grid_constant__ StepArgs args, int* flags, int* any) {
  if (args.found_inf != nullptr && *args.found_inf != 0.0f) return;
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  int index = 0;
  for (int64_t tile = int64_t(blockIdx.x) * warps + threadIdx.x / 32; tile < args.tiles;
       tile += int64_t(gridDim.x) * warps) {
    while (index + 1 < args.tensors && tile >= args.table[index + 1].first_tile) ++index;
    const TensorEntry& entry = args.table[index];
    const int64_t at = (tile - entry.first_tile) * kTile + lane;
    if (at < entry.numel && !is_finite(entry.grad, DType(args.param_dtype), at))
      flags[index] = *any = 1;  // whoever else writes here writes the same
  }
}

// The last tensors' step counters, when no further step launch is there to do it.
__global__ void count_kernel(const __grid_constant__ StepArgs args) { count_steps(args); }

struct Device {
  int multiprocessors = 0;
  cudaError_t error = cudaSuccess;
};

Device current_device() {
  Device device;
  int id = 0;
  device.error = cudaGetDevice(&id);
  if (device.error == cudaSuccess)
    device.error =
        cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, id);
  return device;
}

int blocks_for(const Device& device, int64_t units) {
  return int(std::clamp<int64_t>(units, 1, device.multiprocessors));
}

template <bool kRnnprop, bool kExact, Products kProducts, typename State>
cudaError_t launch_as(const Device& device, int major, const StepArgs& args, cudaStream_t stream) {
  const auto kernel = step_kernel<kRnnprop, kExact, State>;
  const int threads = step_threads(kProducts, sizeof(State), major);
  constexpr int bytes = SharedLayout<kRnnprop, kProducts>::kTotal * int(sizeof(float));
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  kernel<<<blocks_for(device, args.tiles), threads, bytes, stream>>>(args);
  return cudaGetLastError();
}

template <bool kRnnprop, bool kExact, typename State>
cudaError_t launch(const Device& device, const StepArgs& args, cudaStream_t stream) {
  // Not the device's capability: an older image may have been compiled for it on loading.
  cudaFuncAttributes image;
  const cudaError_t error = cudaFuncGetAttributes(&image, step_kernel<kRnnprop, kExact, State>);
  if (error != cudaSuccess) {
    cudaGetLastError();  // returned here, it must not be reported by someone's next launch too
    return error;
  }
  const int major = image.ptxVersion / 10;
  if (step_products(kExact, major) == Products::fma)
    return launch_as<kRnnprop, true, Products::fma, State>(device, major, args, stream);
  return launch_as<kRnnprop, kExact, step_products(kExact, 8), State>(device, major, args, stream);
}

template <bool kRnnprop, bool kExact>
cudaError_t launch(const Device& device, const StepArgs& args, DType state, cudaStream_t stream) {
  if (state == DType::f32) return launch<kRnnprop, kExact, float>(device, args, stream);
  if (state == DType::bf16) return launch<kRnnprop, kExact, bf16>(device, args, stream);
  return cudaErrorInvalidValue;
}

cudaError_t launch(const Device& device, const RuleConfig& config, const StepArgs& args,
                   DType state, Precision precision, cudaStream_t stream) {
  const bool exact = precision == Precision::exact;
  if (config.is_rnnprop())
    return exact ? launch<true, true>(device, args, state, stream)
                 : launch<true, false>(device, args, state, stream);
  return exact ? launch<false, true>(device, args, state, stream)
               : launch<false, false>(device, args, state, stream);
}

cudaError_t scan(const Device& device, StepPlan plan, const StepOptions& options, int64_t count,
                 cudaStream_t stream) {
  int* const flags = options.nonfinite_flags;
  if (flags == nullptr) return cudaErrorInvalidValue;
  cudaError_t error = cudaMemsetAsync(flags, 0, size_t(count + 1) * sizeof(int), stream);
  while (error == cudaSuccess && plan.next() && plan.args().tensors > 0) {
    const StepArgs& args = plan.args();
    // Short work per tile: more blocks than multiprocessors, to have enough reads under way.
    const int blocks = 4 * blocks_for(device, (args.tiles + 47) / 48);
    scan_kernel<<<blocks, kScanThreads, 0, stream>>>(args, flags + args.first_tensor,
                                                     flags + count);
    error = cudaGetLastError();
  }
  return error;
}

}  // namespace

bool supported(const RuleConfig& config) {
  return config.hidden_size == kHidden && config.num_layers == 2;
}

int step(const RuleConfig& config, const float* meta, const StepTensor* tensors, int64_t count,
         const StepOptions& options, void* stream) {
  if (!supported(config)) return cudaErrorInvalidValue;
  if (count == 0) return cudaSuccess;
  const Device device = current_device();
  if (device.error != cudaSuccess) return device.error;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  StepPlan plan(config, meta, tensors, count, options);
  if (options.nonfinite != 0) {
    const cudaError_t error = scan(device, plan, options, count, cuda_stream);
    if (error != cudaSuccess) return error;
  }
  while (plan.next()) {
    const StepArgs& args = plan.args();
    cudaError_t error = cudaSuccess;
    if (args.tiles > 0) {
      error = launch(device, config, args, options.state_dtype, options.precision, cuda_stream);
    } else if (args.counters > 0) {
      count_kernel<<<1, kTableSize, 0, cuda_stream>>>(args);
      error = cudaGetLastError();
    }
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

int functional_step(const RuleConfig& config, const float* meta, int64_t numel, double first_step,
                    const float* grad, const float* state, float* update, float* new_state,
                    Precision precision, void* stream) {
  if (!supported(config)) return cudaErrorInvalidValue;
  if (numel == 0) return cudaSuccess;
  const Device device = current_device();
  if (device.error != cudaSuccess) return device.error;
  const StepArgs args =
      functional_args(config, meta, numel, first_step, grad, state, update, new_state);
  return launch(device, config, args, DType::f32, precision, static_cast<cudaStream_t>(stream));
}

}  // namespace fastl2o::cuda
