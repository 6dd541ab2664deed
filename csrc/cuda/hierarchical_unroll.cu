// The hierarchical rule's window backward: on the caller's stream, without synchronisation.
#include "hierarchical.h"
#include "hierarchical_window.h"
#include "hierarchical_window_levels.cuh"
#include "hierarchical_window_sweep.cuh"
#include "launcher.h"

namespace fastl2o::cuda {
namespace {

// What the replay's state has beside a call's rows: global states, and counts of steps.
__global__ void __launch_bounds__(kLevelThreads)
    window_enter_kernel(const __grid_constant__ HierarchicalWindowArgs args) {
  float* const global_states = args.current + args.problems * args.width;
  float* const steps = global_states + args.problems * kGlobalUnits;
  for (int i = threadIdx.x; i < args.problems * kGlobalUnits; i += blockDim.x)
    global_states[i] =
        args.before[(i / kGlobalUnits + 1) * args.width - kGlobalUnits + i % kGlobalUnits];
  for (int i = threadIdx.x; i < args.entries; i += blockDim.x) steps[i] = args.step;
}

__device__ __forceinline__ float sum_rows(const float* rows, int count, int64_t width,
                                          int64_t column) {
  double sum = 0.0;
  for (int row = 0; row < count; ++row) sum += double(rows[row * width + column]);
  return float(sum);
}

__global__ void __launch_bounds__(kLevelThreads)
    window_reduce_sweep_kernel(const __grid_constant__ HierarchicalWindowArgs args) {
  const int column = blockIdx.x * blockDim.x + threadIdx.x;
  if (column >= kSweepRow) return;
  const int64_t meta = meta_of(column / 32, column % 32);
  if (meta >= 0)
    args.d_meta[meta] = sum_rows(args.sweep_rows, args.sweep_row_count, kSweepRow, column);
}

__global__ void __launch_bounds__(kLevelThreads)
    window_reduce_levels_kernel(const __grid_constant__ HierarchicalWindowArgs args) {
  const int column = blockIdx.x * blockDim.x + threadIdx.x;
  if (column < kLevelRow)
    args.d_meta[kFirstLevel + column] =
        sum_rows(args.level_rows, args.level_row_count, kLevelRow, column);
}

class Queue {
 public:
  Queue(const HierarchicalPlan& plan, void* stream) : plan_(plan), launch_(stream) {}

  cudaError_t error() const { return launch_.error(); }
  void copy(void* to, const void* from, size_t bytes) {
    if (launch_.ok())
      launch_.note(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, launch_.stream()));
  }
  void zero(void* to, size_t bytes) {
    if (launch_.ok()) launch_.note(cudaMemsetAsync(to, 0, bytes, launch_.stream()));
  }
  void list(const HierarchicalArgs& args) {
    if (launch_.ok()) launch_.note(cudaError_t(hierarchical_send(plan_, args, launch_.stream())));
  }
  void replay(const HierarchicalArgs& args) {
    if (launch_.ok()) launch_.note(cudaError_t(hierarchical_replay(args, launch_.stream())));
  }
  void launch(WindowKernel kernel, int64_t blocks, const HierarchicalWindowArgs& args) {
    const int threads = kernel == WindowKernel::sweep ? kWindowThreads : kLevelThreads;
    launch_(kernel_of(kernel), blocks, threads, args);
  }

 private:
  static void (*kernel_of(WindowKernel kernel))(HierarchicalWindowArgs) {
    switch (kernel) {
      case WindowKernel::enter: return window_enter_kernel;
      case WindowKernel::ahead: return window_ahead_kernel;
      case WindowKernel::tensors: return window_tensors_kernel;
      case WindowKernel::sweep: return window_sweep_kernel;
      case WindowKernel::injected: return window_injected_kernel;
      case WindowKernel::reduce_sweep: return window_reduce_sweep_kernel;
      default: return window_reduce_levels_kernel;
    }
  }

  const HierarchicalPlan& plan_;
  Launcher launch_;
};

}  // namespace

int hierarchical_unroll_backward(const HierarchicalWindow& window, void* stream) {
  if (!window.fits()) return cudaErrorInvalidValue;
  Queue queue(window.plan(), stream);
  window.run(queue);
  return queue.error();
}

}  // namespace fastl2o::cuda
