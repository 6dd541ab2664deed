// Driver of the hierarchical rule's unroll backward: runs are independent problems.
#include <algorithm>

#include "hierarchical_run.h"

namespace fastl2o::cpu {
namespace {

constexpr int64_t kMaxRunChunks = 64;   // ranges of runs, one partial gradient each
constexpr int64_t kManyRuns = 16;       // enough to deal them out whole
constexpr int64_t kSmallRun = 1 << 13;  // coordinates that are not worth dealing out

void serial(int64_t count, const RangeBody& body) {
  if (count > 0) body(0, count);
}

}  // namespace

int64_t hierarchical_row_size(const HierarchicalConfig& config, const std::vector<int64_t>& sizes) {
  return RowLayout(config, sizes).total;
}

void hierarchical_unroll_backward(const TileKernels& kernels, const HierarchicalConfig& config,
                                  const float* meta, const HierarchicalUnrollArgs& args,
                                  const ParallelFor& parallel_for) {
  const PackedStorage packed(config, meta);
  const int64_t size = packed.rule.layout.total,
                dim = RowLayout(config, args.sizes).coordinate_count;
  const int64_t chunks = std::min(args.runs, kMaxRunChunks);
  std::vector<double> partials(size_t(std::max<int64_t>(chunks, 1) * size), 0.0);
  // Threads share either the runs or each run's blocks; the sums are the same.
  const bool whole = args.runs >= kManyRuns || dim < kSmallRun;
  const ParallelFor alone = serial;
  auto body = [&](int64_t begin, int64_t end) {
    if (begin == end) return;
    RunBackward worker(kernels, packed.rule, args, whole ? alone : parallel_for);
    for (int64_t chunk = begin; chunk < end; ++chunk)
      for (int64_t run = chunk * args.runs / chunks; run < (chunk + 1) * args.runs / chunks; ++run)
        worker.run(run, partials.data() + chunk * size);
  };
  if (whole)
    parallel_for(chunks, body);
  else
    body(0, chunks);
  for (int64_t chunk = 1; chunk < chunks; ++chunk)
    for (int64_t k = 0; k < size; ++k) partials[size_t(k)] += partials[size_t(chunk * size + k)];
  std::copy_n(partials.data(), size, args.d_meta);
}

}  // namespace fastl2o::cpu
