// The hierarchical window backward over the parameters. After each tile a lane adds up the
// gradients of one gate's weights over the tile's coordinates.
#pragma once

#include "hierarchical_window_tile.cuh"

namespace fastl2o::cuda {

// What a lane adds up of a warp's tiles: the products of its gate's gradient with the GRU's inputs
// and its sum, and one product of two rows.
struct LaneSums {
  // 32 apart: the products, the other two over all chunks, and these over a chunk.
  float* const shared;

  __device__ __forceinline__ float& gate() const { return shared[32 * kLaneSums]; }
  __device__ __forceinline__ float& pair() const { return shared[32 * (kLaneSums + 1)]; }

  // Rows whose product a lane adds up: direction and log rate by the new h and features, then sums.
  __device__ static int first_of_pair(int lane) {
    if (lane < kUnits) return kDirectionRow;
    if (lane < 2 * kUnits) return kRateRow;
    if (lane < 2 * kUnits + kScales) return kDirectionRow;
    return min(kRateRow + lane - 2 * kUnits - kScales, int(kCentredRow));
  }
  __device__ static int second_of_pair(int lane) {
    if (lane < 2 * kUnits) return kNewRow + lane % kUnits;
    return lane < 2 * kUnits + kScales ? kFeatureRow + lane - 2 * kUnits : int(kOneRow);
  }

  __device__ __forceinline__ void add(const float (&tile)[kRows][kRowStride]) const {
    const int lane = threadIdx.x % 32;
    const bool candidate = lane >= kCandidateRow && lane < kSquareDecayRow;
    const float (*const units)[kRowStride] = &tile[candidate ? kResetRow : kStateRow];
    const float* const first = tile[first_of_pair(lane)];
    const float* const second = tile[second_of_pair(lane)];
    float products[kColumns], own = gate(), product = pair();
#pragma unroll
    for (int k = 0; k < kColumns; ++k) products[k] = shared[32 * k];
#pragma unroll 1
    for (int at = 0; at < 32; at += 4) {
      const auto four = [at](const float* row) {
        return *reinterpret_cast<const float4*>(row + at);
      };
      const auto dot = [](float4 a, float4 b, float sum) {
        return fmaf(a.x, b.x, fmaf(a.y, b.y, fmaf(a.z, b.z, fmaf(a.w, b.w, sum))));
      };
      const float4 d = four(tile[lane]);
#pragma unroll
      for (int k = 0; k < kColumns; ++k)
        products[k] =
            dot(d, four(k < kInputs ? tile[kFeatureRow + k] : units[k < kInputs ? 0 : k - kInputs]),
                products[k]);
      own += (d.x + d.y) + (d.z + d.w);
      product = dot(four(first), four(second), product);
    }
    gate() = own;
    pair() = product;
#pragma unroll
    for (int k = 0; k < kColumns; ++k) shared[32 * k] = products[k];
  }
};
inline constexpr int kCentredLane = 2 * kUnits + kScales + kCentredRow - kRateRow;

__global__ void __launch_bounds__(kWindowThreads, kWindowBlocks)
    window_sweep_kernel(const __grid_constant__ HierarchicalWindowArgs args) {
  __shared__ __align__(16) WindowShared shared;
  load_window_weights(args.meta, shared);
  __syncthreads();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float (&told)[kTold] = shared.told[warp];
  const LaneSums sums{&shared.sums[warp][0][lane]};
  for (int k = 0; k < kLaneSums + 2; ++k) sums.shared[32 * k] = 0.0f;
  for_chunks(args, blockIdx.x, gridDim.x, [&](int before, int index, int chunk) {
    const HierarchicalEntry& entry = args.list[index];
    if (index != before) {
      __syncwarp();
      for (int i = lane; i <= kInverseRms; i += 32) told[i] = args.told[int64_t(index) * kTold + i];
      __syncwarp();
    }
    const Span span(entry, chunk);
    const int64_t planes = static_cast<const float*>(entry.planes) - args.current;
    const int64_t grads = static_cast<const float*>(entry.grad) - args.current_grads;
    const bool first_step = args.before[entry.step - args.current] == 0.0f;
    for (int start = 0; start < span.size; start += 32) {
      const int64_t at = span.first + min(start + lane, span.size - 1);
      const bool inside = start + lane < span.size;
      WindowTile{shared,
                 told,
                 shared.tile[warp],
                 args.before + planes + at,
                 args.d_rows + planes + at,
                 bounded_gradient(args.grads[grads + at]),
                 inside ? args.lr * args.adjoint[grads + at] : 0.0f,
                 entry.numel,
                 first_step,
                 inside}
          .run();
      __syncwarp();
      sums.add(shared.tile[warp]);
      __syncwarp();
    }
    float* const chunk_sums = args.chunk_sums + int64_t(chunk) * kChunkSums;
    if (lane < 3 * kUnits) chunk_sums[lane] = sums.gate();
    if (lane == kCentredLane) chunk_sums[kCentredSum] = sums.pair();
    sums.shared[32 * kColumns] += sums.gate();
    sums.shared[32 * (kColumns + 1)] += sums.pair();
    sums.gate() = sums.pair() = 0.0f;
  });
  const int row = blockIdx.x + warp * gridDim.x;
  float* const to = args.sweep_rows + int64_t(row) * kSweepRow + lane;
  for (int k = 0; k < kLaneSums; ++k) to[32 * k] += sums.shared[32 * k];
}

// The meta-parameter whose gradient number `slot` of a lane is, -1 for none.
__device__ inline int64_t meta_of(int slot, int lane) {
  const bool candidate = lane >= kCandidateRow, decay = lane >= kSquareDecayRow;
  if (slot < kColumns) {
    if (decay) {
      const int64_t readout = lane == kSquareDecayRow ? kMeta.square_decay : kMeta.average_decay;
      return slot < kInputs ? -1 : readout + slot - kInputs;
    }
    return candidate ? kMeta.param.candidate + (lane - kCandidateRow) * kColumns + slot
                     : kMeta.param.gates + lane * kColumns + slot;
  }
  if (slot == kColumns) {
    if (decay) return lane == kSquareDecayRow ? kMeta.square_decay_bias : kMeta.average_decay_bias;
    return candidate ? kMeta.param.candidate_bias + lane - kCandidateRow
                     : kMeta.param.gates_bias + lane;
  }
  if (lane < kUnits) return kMeta.direction + lane;
  if (lane < 2 * kUnits) return kMeta.rate + lane - kUnits;
  if (lane < 2 * kUnits + kScales) return kMeta.shortcut + lane - 2 * kUnits;
  switch (lane - 2 * kUnits - kScales + kRateRow) {
    case kRateRow: return kMeta.rate_bias;
    case kMomentumRow: return kMeta.rate_momentum;
    case kOffsetRow: return kMeta.log_rate_offset;
    default: return -1;
  }
}

}  // namespace fastl2o::cuda
