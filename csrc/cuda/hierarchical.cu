// The hierarchical rule's in-place step: launches on the caller's stream, no allocation, no
// synchronisation, so it can be captured into a graph.
#include "hierarchical.h"
#include "hierarchical_levels.cuh"
#include "hierarchical_plan.h"
#include "hierarchical_sweep.cuh"
#include "launcher.h"

namespace fastl2o::cuda {
namespace {

constexpr int kApplyBlocks = 4;  // a multiprocessor

// Entries on their way to the list.
__global__ void hierarchical_send_kernel(const __grid_constant__ HierarchicalArgs args) {
  constexpr int words = sizeof(HierarchicalEntry) / sizeof(uint64_t);
  const auto* from = reinterpret_cast<const uint64_t*>(args.table);
  auto* to = reinterpret_cast<uint64_t*>(args.list + args.first);
  for (int i = threadIdx.x; i < args.count * words; i += blockDim.x) to[i] = from[i];
}

// Sets the flag of every tensor whose gradient holds NaN or Inf, and `any`.
__global__ void __launch_bounds__(kLevelThreads)
    hierarchical_scan_kernel(const __grid_constant__ HierarchicalArgs args, int* flags, int* any) {
  if (args.found_inf != nullptr && *args.found_inf != 0.0f) return;
  for_chunks(args, blockIdx.x, gridDim.x, [&](int, int index, int chunk) {
    const HierarchicalEntry& entry = entries_of(args)[index];
    const Span span(entry, chunk);
    const DType dtype = DType(entry.dtype);
    bool finite = true;
#pragma unroll 8
    for (int at = threadIdx.x % 32; at < span.size; at += 32)
      finite &= is_finite(entry.grad, dtype, span.first + at);
    if (!finite) flags[entry.index] = *any = 1;  // whoever else writes here writes the same
  });
}

// What each problem's tensors share, where a warp of the sweep cannot look at all tensors itself.
__global__ void __launch_bounds__(kLevelThreads)
    hierarchical_problems_kernel(const __grid_constant__ HierarchicalArgs args) {
  if (rests(args)) return;
  const HierarchicalEntry* const entries = entries_of(args);
  const int problem = blockIdx.x, lane = threadIdx.x;
  const RateSum rates = sum_rates<kLevelThreads>(
      problem_entries(args, problem), [&](RateSum& sum, int i) { sum.add(args, entries[i]); });
  if (lane < 32)
    args.problem_values[int64_t(problem) * 32 + lane] = problem_value(args, problem, lane, rates);
}

// The workspace's list of all entries.
void send_entries(const HierarchicalPlan& plan, HierarchicalArgs args, Launcher& launch) {
  for (int64_t first = 0; first < plan.entries(); first += kEntries) {
    plan.send(first, args);
    launch(hierarchical_send_kernel, 1, kLevelThreads, args);
  }
}

// The first two passes.
void launch_sweep(void (*sweep)(HierarchicalArgs), const HierarchicalArgs& args, Launcher& launch) {
  int blocks = 1;
  if (launch.ok())
    launch.note(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, sweep, kSweepThreads, 0));
  launch(sweep, launch.grid(args.chunks, blocks), kSweepThreads, args);
  launch(hierarchical_tensors_kernel, launch.grid(args.entries, kApplyBlocks), kLevelThreads, args);
}

}  // namespace

bool supported(const HierarchicalConfig& config) {
  return config.param_size == kUnits && config.num_scales == kScales &&
         config.tensor_size == kTensorUnits && config.global_size == kGlobalUnits;
}

int hierarchical_step(const HierarchicalPlan& plan, const float* meta, float* global_states,
                      const HierarchicalOptions& options, void* workspace, void* stream) {
  const int64_t count = plan.count(), problems = plan.problems();
  Launcher launch(stream);
  if (options.nonfinite != 0 && launch.ok())
    launch.note(cudaMemsetAsync(options.nonfinite_flags, 0, size_t(count + 1) * sizeof(int),
                                launch.stream()));
  if (!plan.fits()) return cudaErrorInvalidValue;
  if (plan.empty()) return launch.error();
  HierarchicalArgs args = plan.args(meta, global_states, options, workspace);
  if (plan.listed()) send_entries(plan, args, launch);
  const int64_t units = (int64_t(args.chunks) + kLevelThreads / 32 - 1) / (kLevelThreads / 32);
  if (options.nonfinite != 0)
    launch(hierarchical_scan_kernel, launch.grid(units, kApplyBlocks), kLevelThreads, args,
           options.nonfinite_flags, options.nonfinite_flags + count);
  if (plan.listed()) launch(hierarchical_problems_kernel, problems, kLevelThreads, args);
  launch_sweep(options.planes_dtype == DType::f32 ? hierarchical_sweep_kernel<float, false>
               : options.stochastic_rounding      ? hierarchical_sweep_kernel<bf16, true>
                                                  : hierarchical_sweep_kernel<bf16, false>,
               args, launch);
  launch(hierarchical_apply_kernel, problems + launch.grid(units, kApplyBlocks), kLevelThreads,
         args);
  return launch.error();
}

int hierarchical_send(const HierarchicalPlan& plan, const HierarchicalArgs& args, void* stream) {
  Launcher launch(stream);
  send_entries(plan, args, launch);
  return launch.error();
}

int hierarchical_replay(const HierarchicalArgs& args, void* stream) {
  Launcher launch(stream);
  if (args.list != nullptr)
    launch(hierarchical_problems_kernel, args.problems, kLevelThreads, args);
  launch_sweep(hierarchical_sweep_kernel<float, false>, args, launch);
  // Without blocks for the parameters, only the global states.
  launch(hierarchical_apply_kernel, args.problems, kLevelThreads, args);
  return launch.error();
}

}  // namespace fastl2o::cuda
