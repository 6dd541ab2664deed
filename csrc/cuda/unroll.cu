// The window backward: one launch takes every tile through all steps, a second one adds up the
// blocks' gradients in order. The identity is derived in kernels/lstm/README.md.
#include <cuda_runtime.h>

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

// Two blocks a multiprocessor, which leaves a thread 168 registers.
template <bool kRnnprop>
__global__ void __launch_bounds__(kWindowThreads, 2)
    window_kernel(const __grid_constant__ WindowArgs args) {
  extern __shared__ float4 shared_memory[];
  float* const shared = reinterpret_cast<float*>(shared_memory);
  load_shared<kRnnprop>(args, shared);
  __syncthreads();

  constexpr int planes = Window<kRnnprop>::kPlanes;
  const int64_t replayed = (args.window.steps - 1) * planes * kWindowTile;
  float* const states = args.window.scratch + blockIdx.x * replayed;
  Window<kRnnprop> window(args, shared, states);
  Gradients<kRnnprop> sums;
  stash(typename Window<kRnnprop>::FirstGradient().sums,
        shared + WindowLayout<kRnnprop>::kFirstSums);
  for (int64_t tile = blockIdx.x; tile < args.tiles; tile += args.partials)
    window.run_tile(tile, sums);

  const MetaLayout& layout = args.layout;
  const Place& place = window.place;
  float* const partial = args.window.scratch + args.partials * replayed + blockIdx.x * layout.total;
  typename Window<kRnnprop>::FirstGradient first;
  fetch(shared + WindowLayout<kRnnprop>::kFirstSums, first.sums);
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

template <bool kRnnprop>
cudaError_t launch(const WindowArgs& args, cudaStream_t stream) {
  const auto kernel = window_kernel<kRnnprop>;
  constexpr int bytes = WindowLayout<kRnnprop>::kTotal * int(sizeof(float));
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  kernel<<<int(args.partials), kWindowThreads, bytes, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace

int64_t unroll_scratch_floats(const RuleConfig& config, const UnrollArgs& args) {
  return window_partials(args) * (replay_floats(config, args.steps) + MetaLayout(config).total);
}

// `fast` computes as `exact`: its TF32 products are not there yet, and exact is within its bound.
int unroll_backward(const RuleConfig& config, const float* meta, const UnrollArgs& args,
                    Precision /*precision*/, void* stream) {
  if (!supported(config) || args.steps < 1) return cudaErrorInvalidValue;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const int64_t count = MetaLayout(config).total;
  const WindowArgs window = window_args(config, meta, args);
  if (window.tiles > 0) {
    const cudaError_t error = config.is_rnnprop() ? launch<true>(window, cuda_stream)
                                                  : launch<false>(window, cuda_stream);
    if (error != cudaSuccess) return error;
  }
  const float* partials = args.scratch + window.partials * replay_floats(config, args.steps);
  const int blocks = int((count + kReduceThreads - 1) / kReduceThreads);
  reduce_kernel<<<blocks, kReduceThreads, 0, cuda_stream>>>(partials, window.partials, count,
                                                            args.d_meta);
  return cudaGetLastError();
}

}  // namespace fastl2o::cuda
