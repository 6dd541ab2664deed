// The window backward: one launch takes every tile through all steps, a second one adds up the
// blocks' gradients in order. The identity is derived in kernels/lstm/README.md.
#include <cuda_runtime.h>

#include "unroll_tensor_window.cuh"
#include "unroll_window.cuh"

namespace fastl2o::cuda {
namespace {

template <bool kRnnprop>
__device__ void load_shared(const WindowArgs& args, float* shared) {
  using Layout = WindowLayout<kRnnprop>;
  load_weights(args, 0, kRnnprop ? kHidden : args.features, Layout::kFirstRows,
               shared + Layout::kFirstWeights, shared + Layout::kFirstBias);
  load_weights(args, 1, kHidden, Layout::kSecondRows, shared + Layout::kSecondWeights,
               shared + Layout::kSecondBias);
  for (int i = threadIdx.x; i <= kHidden; i += kWindowThreads)
    shared[Layout::kReadout + i] =
        args.meta[i < kHidden ? args.layout.readout_weight + i : args.layout.readout_bias];
  if constexpr (kRnnprop) {
    for (int i = threadIdx.x; i < 4 * kHidden; i += kWindowThreads)
      shared[Layout::kProjection + i] =
          i % 4 < 2 ? args.meta[args.layout.projection_weight + i / 4 * 2 + i % 4]
                    : args.meta[args.layout.projection_bias + i / 4];
    for (int i = threadIdx.x; i < 12 * kWindowThreads; i += kWindowThreads)
      shared[Layout::kProjectionSums + i] = 0.0f;
  } else {
    // Two features at most: the other rows meet weights of zero and must be finite.
    for (int i = threadIdx.x; i < 4 * Layout::kRow; i += kWindowThreads)
      shared[Layout::kFirst + kHidden * Layout::kRow + i] = 0.0f;
  }
}

template <bool kRnnprop>
__global__ void __launch_bounds__(kWindowThreads, 1)
    window_kernel(const __grid_constant__ WindowArgs args) {
#if __CUDA_ARCH__ < 800  // later devices take tensor_window_kernel
  extern __shared__ float4 shared_memory[];
  float* const shared = reinterpret_cast<float*>(shared_memory);
  load_shared<kRnnprop>(args, shared);
  __syncthreads();

  using Layout = WindowLayout<kRnnprop>;
  constexpr int planes = Window<kRnnprop>::kPlanes;
  const int64_t replayed = (args.window.steps - 1) * planes * kWindowTile;
  float* const states = args.window.scratch + blockIdx.x * replayed;
  float* const partials = args.window.scratch + args.partials * replayed;
  float* aside = shared + Layout::kAside;
  if constexpr (kDeviceSetsAsideInScratch)
    aside = partials + args.partials * args.layout.total + blockIdx.x * Layout::kAsideFloats;
  Window<kRnnprop> window(args, shared, aside, states);
  Gradients<kRnnprop> sums;
  stash(typename Window<kRnnprop>::FirstGradient().sums, aside + Layout::kFirstSums);
  for (int64_t tile = blockIdx.x; tile < args.tiles; tile += args.partials)
    window.run_tile(tile, sums);

  const MetaLayout& layout = args.layout;
  const Place& place = window.place;
  float* const partial = partials + blockIdx.x * layout.total;
  typename Window<kRnnprop>::FirstGradient first;
  fetch(aside + Layout::kFirstSums, first.sums);
  first.store(layout, 0, kRnnprop ? kHidden : args.features, place, partial);
  sums.second.store(layout, 1, kHidden, place, partial);
#pragma unroll
  for (int j = 0; j < kOwned; ++j) {
    const int unit = place.owned(j);
    const float readout = sum_lanes(sums.readout[j]);
    if (place.lane == 0) partial[layout.readout_weight + unit] = readout;
    if constexpr (kRnnprop)
#pragma unroll
      for (int k = 0; k < 3; ++k) {
        const float sum = sum_lanes(window.projection_sum(j)[k * kWindowThreads]);
        if (place.lane == 0)
          partial[k < 2 ? layout.projection_weight + 2 * unit + k : layout.projection_bias + unit] =
              sum;
      }
  }
  const float readout_bias = sum_lanes(sums.readout_bias);
  if (threadIdx.x == 0) partial[layout.readout_bias] = readout_bias;
#endif
}

template <bool kRnnprop, bool kExact>
__device__ void load_tensor_shared(const WindowArgs& args, float* shared) {
  using Layout = TensorLayout<kRnnprop, kExact, Aside::some>;  // all have the same weights
  tensor::load_blocks<kExact, Layout::kFirstSteps>(args, 0, !kRnnprop, shared + Layout::kFirst);
  tensor::load_blocks<kExact, Layout::kSecondSteps>(args, 1, false, shared + Layout::kSecond);
  for (int i = threadIdx.x; i < 4 * kHidden; i += blockDim.x) {
    const int row = i % 4 * kHidden + i / 4;
    shared[Layout::kFirstBias + i] = args.meta[args.layout.bias[0] + row];
    shared[Layout::kSecondBias + i] = args.meta[args.layout.bias[1] + row];
    if (kRnnprop)
      shared[Layout::kProjection + i] =
          i % 4 < 2 ? args.meta[args.layout.projection_weight + i / 4 * 2 + i % 4]
                    : args.meta[args.layout.projection_bias + i / 4];
    if (i <= kHidden)
      shared[Layout::kReadout + i] =
          args.meta[i < kHidden ? args.layout.readout_weight + i : args.layout.readout_bias];
  }
}

// One block a multiprocessor. Its groups never wait for one another.
template <bool kRnnprop, bool kExact, Aside kAside>
__global__ void __launch_bounds__(kMaxGroups* kGroupThreads, 1)
    tensor_window_kernel(const __grid_constant__ WindowArgs args) {
#if __CUDA_ARCH__ >= 800
  using Layout = TensorLayout<kRnnprop, kExact, kAside>;
  using Window = tensor::Window<kRnnprop, kExact, kAside>;
  extern __shared__ float4 shared_memory[];
  float* const shared = reinterpret_cast<float*>(shared_memory);
  load_tensor_shared<kRnnprop, kExact>(args, shared);
  __syncthreads();

  const int group = threadIdx.x / kGroupThreads, warp = threadIdx.x / 32 % kGroupWarps;
  const int index = blockIdx.x * (blockDim.x / kGroupThreads) + group;
  if (index >= args.partials) return;
  float* const partials =
      args.window.scratch + args.partials * (args.window.steps - 1) * Window::kPlanes * kGroupTile;
  float* const buffer = shared + Layout::kShared + group * Layout::kGroup;
  float* aside = buffer + Layout::kAside;
  if constexpr (kAside == Aside::scratch)
    aside = partials + (args.partials * args.layout.total + 3) / 4 * 4 +
            int64_t(index) * Layout::kAsideFloats;
  Window window(args, shared, buffer, aside, index, warp, 1 + group);
  for (int tile = index; tile < args.tiles; tile += int(args.partials)) window.run_tile(tile);
  window.store(partials + index * args.layout.total);
#endif
}

constexpr int kReduceThreads = 128;

// d_meta (count,) from partials (blocks, count).
__global__ void __launch_bounds__(kReduceThreads)
    reduce_kernel(const float* partials, int64_t blocks, int64_t count, float* d_meta) {
  const int64_t at = int64_t(blockIdx.x) * kReduceThreads + threadIdx.x;
  if (at >= count) return;
  double sum = 0.0;
  for (int64_t block = 0; block < blocks; ++block) sum += double(partials[block * count + at]);
  d_meta[at] = float(sum);
}

// Zeros where there is no device: the launch will say so.
struct Device {
  // Of the compute capability that the loaded image was compiled for: an older one than the
  // device's may have been compiled for it on loading.
  int major = 0;
  int available = 0;  // bytes of shared memory for a block
};

Device current_device() {
  Device device;
  int id = 0;
  if (cudaGetDevice(&id) == cudaSuccess) {
    cudaFuncAttributes image;
    if (cudaFuncGetAttributes(&image, window_kernel<false>) == cudaSuccess)
      device.major = image.ptxVersion / 10;
    cudaDeviceGetAttribute(&device.available, cudaDevAttrMaxSharedMemoryPerBlockOptin, id);
  }
  cudaGetLastError();  // a failed query must not be reported by someone's next launch
  return device;
}

cudaError_t launch(void (*kernel)(WindowArgs), const WindowArgs& args, int64_t blocks, int threads,
                   int bytes, cudaStream_t stream) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  kernel<<<int(blocks), threads, bytes, stream>>>(args);
  return cudaGetLastError();
}

template <bool kRnnprop, bool kExact>
cudaError_t launch_tensor(const WindowArgs& args, int available, cudaStream_t stream) {
  const TensorLaunch plan = tensor_launch<kRnnprop, kExact>(available);
  constexpr Aside usual = kExact ? Aside::more : Aside::some;
  auto kernel = tensor_window_kernel<kRnnprop, kExact, usual>;
  if constexpr (kRnnprop && kExact) {
    if (plan.aside == Aside::some) kernel = tensor_window_kernel<true, true, Aside::some>;
    if (plan.aside == Aside::scratch) kernel = tensor_window_kernel<true, true, Aside::scratch>;
  }
  return launch(kernel, args, (args.partials + plan.groups - 1) / plan.groups,
                plan.groups * kGroupThreads, plan.bytes, stream);
}

template <bool kRnnprop>
cudaError_t launch(const WindowArgs& args, const Device& device, Precision precision,
                   cudaStream_t stream) {
  if (!uses_tensor_cores(device.major))
    return launch(window_kernel<kRnnprop>, args, args.partials, kWindowThreads,
                  4 * WindowLayout<kRnnprop>::shared_floats(device.major), stream);
  return precision == Precision::exact
             ? launch_tensor<kRnnprop, true>(args, device.available, stream)
             : launch_tensor<kRnnprop, false>(args, device.available, stream);
}

}  // namespace

bool countable(const UnrollArgs& args) {
  const int64_t most_tiles = window_tiles(args, current_device().major);
  return std::max({args.steps, args.runs, most_tiles}) <= INT32_MAX - kMaxPartials;
}

int64_t unroll_scratch_floats(const RuleConfig& config, const UnrollArgs& args) {
  const Device device = current_device();
  return window_scratch_floats(config, args, device.major, device.available);
}

// Without tensor cores `fast` computes as `exact`.
int unroll_backward(const RuleConfig& config, const float* meta, const UnrollArgs& args,
                    Precision precision, void* stream) {
  if (!supported(config) || args.steps < 1) return cudaErrorInvalidValue;
  const Device device = current_device();
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const int64_t count = MetaLayout(config).total;
  const WindowArgs window = window_args(config, meta, args, device.major);
  if (!countable(args)) return cudaErrorInvalidValue;
  if (window.tiles > 0) {
    const cudaError_t error = config.is_rnnprop()
                                  ? launch<true>(window, device, precision, cuda_stream)
                                  : launch<false>(window, device, precision, cuda_stream);
    if (error != cudaSuccess) return error;
  }
  const float* partials =
      args.scratch + window.partials * replay_floats(config, args.steps, device.major);
  const int blocks = int((count + kReduceThreads - 1) / kReduceThreads);
  reduce_kernel<<<blocks, kReduceThreads, 0, cuda_stream>>>(partials, window.partials, count,
                                                            args.d_meta);
  return cudaGetLastError();
}

}  // namespace fastl2o::cuda
