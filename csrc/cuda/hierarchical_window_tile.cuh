// The hierarchical window backward over the parameters: a step's features, GRU and readouts,
// computed anew, and back. Up to the direction the arithmetic is that of the forward sweep to the
// last bit: where a tensor has few coordinates the gradient of the direction is a difference of
// almost equal numbers, of which the forward sweep's direction made one and this one the other.
//
// A lane holds a coordinate. What products over a tile need lies in shared memory, a row of 32
// coordinates a number; a lane then adds up one gate's weights over the tile.
#pragma once

#include "hierarchical_cells.cuh"
#include "hierarchical_tables.cuh"
#include "hierarchical_weights.cuh"
#include "hierarchical_window_args.h"

namespace fastl2o::cuda {

inline constexpr int kWindowThreads = 32 * kWindowWarps;
inline constexpr int kWindowBlocks = 6;  // on a multiprocessor: a thread may have 168 registers

// Rows of a warp's tile. The first 32 hold what each lane multiplies its inputs by: preactivations'
// gradients and the decays' (until then r, u and c themselves).
enum Row {
  kUpdateRow = kUnits,
  kCandidateRow = 2 * kUnits,
  kSquareDecayRow = 3 * kUnits,
  kAverageDecayRow,
  kFeatureRow,
  kStateRow = kFeatureRow + kInputs,
  kResetRow = kStateRow + kUnits,  // r h
  kNewRow = kResetRow + kUnits,    // the new h
  kDirectionRow = kNewRow + kUnits,
  kRateRow,
  kMomentumRow,
  kOffsetRow,
  kCentredRow,
  kOneRow,
  kDirectRow,  // of old h past the GRU's matrices
  kRows = kDirectRow + kUnits,
};
inline constexpr int kRowStride = 36;  // lanes read four numbers of a row each without conflicts
static_assert(kFeatureRow == 32);

struct WindowShared {
  ParamRows rows;
  float shortcut[kScales];
  float square_decay_bias, average_decay_bias, rate_bias, offset, momentum;
  float told[kWindowWarps][kTold];
  alignas(16) float tile[kWindowWarps][kRows][kRowStride];
  // Of LaneSums, of each lane: together with what a coordinate needs they do not fit the registers.
  float sums[kWindowWarps][kLaneSums + 2][32];
};

__device__ inline void load_window_weights(const float* meta, WindowShared& shared) {
  load_rows(meta, shared.rows);
  const int thread = threadIdx.x;
  if (thread < kScales) shared.shortcut[thread] = meta[kMeta.shortcut + thread];
  if (thread == 0) {
    shared.square_decay_bias = meta[kMeta.square_decay_bias];
    shared.average_decay_bias = meta[kMeta.average_decay_bias];
    shared.rate_bias = meta[kMeta.rate_bias];
    shared.offset = meta[kMeta.log_rate_offset];
    shared.momentum = sigmoid(meta[kMeta.rate_momentum]);
  }
  shared.tile[thread / 32][kOneRow][thread % 32] = 1.0f;
}

// A coordinate of a tile. Those beyond the tensor, at an address inside it, leave zeros for
// gradients.
struct WindowTile {
  const WindowShared& shared;
  const float* told;
  float (*tile)[kRowStride];
  const float* planes;  // at the coordinate, before the step
  float* d_planes;
  float grad, adjoint;
  int64_t numel;
  bool first_step, inside;

  __device__ __forceinline__ float& at(int row) const { return tile[row][threadIdx.x % 32]; }
  __device__ __forceinline__ float plane(int number) const { return planes[number * numel]; }

  // The two weights after a row's.
  __device__ __forceinline__ float2 readouts(int row) const {
    return *reinterpret_cast<const float2*>(&shared.rows[row][kColumns]);
  }

  // weights of a row times the inputs.
  __device__ __forceinline__ float product(int row, const float (&x)[kInputs],
                                           const float (&units)[kUnits]) const {
    const float4* const weights = reinterpret_cast<const float4*>(shared.rows[row]);
    float4 weight;
    float sum = told[kToldBiases + row];
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      if (k % 4 == 0) weight = weights[k / 4];
      sum = fmaf(k % 4 == 0   ? weight.x
                 : k % 4 == 1 ? weight.y
                 : k % 4 == 2 ? weight.z
                              : weight.w,
                 k < kInputs ? x[k] : units[k < kInputs ? 0 : k - kInputs], sum);
    }
    return sum;
  }

  // d += the row of weights times a preactivation's gradient.
  __device__ __forceinline__ void add_transposed(int row, float d_gate,
                                                 float (&d)[kColumns]) const {
    const float4* const weights = reinterpret_cast<const float4*>(shared.rows[row]);
    float4 weight;
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      if (k % 4 == 0) weight = weights[k / 4];
      d[k] = fmaf(k % 4 == 0   ? weight.x
                  : k % 4 == 1 ? weight.y
                  : k % 4 == 2 ? weight.z
                               : weight.w,
                  d_gate, d[k]);
    }
  }

  // What an average and its square are mixed of, and what of the sum the features take.
  struct Scale {
    float behind, average, square_behind, square, inverse;

    __device__ __forceinline__ Scale(float average_decay, float square_decay, float old_average,
                                     float old_square, float grad) {
      behind = old_average - grad;
      average = mixed(average_decay, old_average, grad);
      const float fresh = fmaf(average, average, kSquareEps);
      square_behind = old_square - fresh;
      square = mixed(square_decay, old_square, fresh) + kRmsEps;
      inverse = inverse_root(square);
    }
  };
  __device__ __forceinline__ Scale scale(int s, float average_decay, float square_decay) const {
    return {average_decay, square_decay, plane(kAverages + s), plane(kSquares + s), grad};
  }
  // The average's decay of the next scale; 0, in a first step, stays.
  __device__ __forceinline__ float next_decay(float decay) const {
    return first_step ? 0.0f : root_accurate(decay);
  }

  __device__ __forceinline__ void features(float average_decay, float square_decay, float rate,
                                           float (&x)[kInputs]) const {
    float logs[kScales], mean = 0.0f;
    int first_exponent = 0;
#pragma unroll
    for (int s = 0; s < kScales; ++s) {
      const Scale own = scale(s, average_decay, square_decay);
      x[s] = asinh_accurate(own.average * own.inverse);
      int exponent;
      float mantissa;
      split_float(own.square, exponent, mantissa);
      if (s == 0) first_exponent = exponent;
      logs[s] = log2_approx(mantissa) + fmaf(own.square, 0.0f, float(exponent - first_exponent));
      mean += logs[s];
      average_decay = next_decay(average_decay);
    }
#pragma unroll
    for (int s = 0; s + 1 < kScales; ++s) x[kScales + s] = x[s] * x[s + 1];
#pragma unroll
    for (int s = 0; s < kScales; ++s)
      x[2 * kScales - 1 + s] = fmaf(logs[s], kLn2, mean * (-kLn2 / kScales));
    x[kInputs - 1] = rate - told[kMeanRate];
  }

  // From the update and the new log rate to the direction and the sum of old log rate and readout,
  // whose gradients it returns in place.
  __device__ __forceinline__ void readouts_backward(float rate, float& direction,
                                                    float& eta) const {
    const float log_rate = at_least(at_most(rate + eta, kLogRateLimit), -kLogRateLimit);
    const float upstream = exp_accurate(log_rate + shared.offset) * adjoint;
    const float y = direction * told[kInverseRms], momentum = shared.momentum;
    const float through_step = -upstream * y;
    float* const d_plane = d_planes + kLogRate * numel;
    const float d_rate = inside ? *d_plane + told[kRateGradient] : 0.0f;
    direction = inside ? -fmaf(y, told[kMeanProduct], upstream) * told[kInverseRms] : 0.0f;
    eta = fmaf(1.0f - momentum, d_rate, through_step);
    at(kDirectionRow) = direction;
    at(kRateRow) = eta;
    at(kMomentumRow) = momentum * (1.0f - momentum) * d_rate * (rate - log_rate);
    at(kOffsetRow) = through_step;
    if (inside) *d_plane = fmaf(momentum, d_rate, eta);
  }

  // From the features' gradients d to the planes' and the decays' readouts'.
  __device__ __forceinline__ void features_backward(float average_decay, float square_decay,
                                                    float d_direction,
                                                    const float (&d)[kColumns]) const {
    const float share = 1.0f - average_decay;
    float d_average_logit = 0.0f, d_square_decay = 0.0f, mean = 0.0f, part = 1.0f;
#pragma unroll
    for (int s = 0; s < kScales; ++s) mean += d[2 * kScales - 1 + s] * (1.0f / kScales);
#pragma unroll
    for (int s = 0; s < kScales; ++s) {
      const Scale own = scale(s, average_decay, square_decay);
      const float ratio = own.average * own.inverse;
      float d_m = fmaf(d_direction, shared.shortcut[s], d[s]);
      if (s + 1 < kScales) d_m = fmaf(d[kScales + s], at(kFeatureRow + s + 1), d_m);
      if (s > 0) d_m = fmaf(d[kScales + s - 1], at(kFeatureRow + s - 1), d_m);
      const float d_ratio = d_m * inverse_root(fmaf(ratio, ratio, 1.0f));
      const float d_log = d[2 * kScales - 1 + s] - mean - 0.5f * d_ratio * ratio;
      float* const average_plane = d_planes + (kAverages + s) * numel;
      float* const square_plane = d_planes + (kSquares + s) * numel;
      const float d_square = fmaf(d_log * own.inverse, own.inverse, inside ? *square_plane : 0.0f);
      float d_average = fmaf(d_ratio, own.inverse, inside ? *average_plane : 0.0f);
      d_average = fmaf(d_square * (1.0f - square_decay), 2.0f * own.average, d_average);
      d_square_decay = fmaf(d_square, own.square_behind, d_square_decay);
      // beta_s = beta^part: d beta_s / d logit = part beta_s (1 - beta).
      d_average_logit = fmaf(d_average * own.behind, part * average_decay, d_average_logit);
      if (inside) {
        *square_plane = d_square * square_decay;
        *average_plane = d_average * average_decay;
      }
      average_decay = next_decay(average_decay);
      part *= 0.5f;
    }
    at(kAverageDecayRow) = inside ? d_average_logit * share : 0.0f;
    at(kSquareDecayRow) = inside ? d_square_decay * square_decay * (1.0f - square_decay) : 0.0f;
  }

  // Leaves the rows of its products.
  __device__ __forceinline__ void run() const {
    float x[kInputs], h[kUnits], reset[kUnits];
    float average_decay = shared.average_decay_bias, square_decay = shared.square_decay_bias;
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
      const float2 weight = readouts(k);
      at(kStateRow + k) = h[k] = plane(k);
      square_decay = fmaf(weight.x, h[k], square_decay);
      average_decay = fmaf(weight.y, h[k], average_decay);
    }
    average_decay = first_step ? 0.0f : decay_of(average_decay);
    square_decay = first_step ? 0.0f : decay_of(square_decay);
    const float rate = plane(kLogRate);
    features(average_decay, square_decay, rate, x);
    float direction = 0.0f, eta = shared.rate_bias;
#pragma unroll
    for (int k = 0; k < kInputs; ++k) at(kFeatureRow + k) = x[k];
#pragma unroll
    for (int s = 0; s < kScales; ++s) direction = fmaf(shared.shortcut[s], x[s], direction);
    // Loops over units are rolled: written out, their weights together do not fit the registers.
#pragma unroll 1
    for (int k = 0; k < kUnits; ++k) {
      const float r = sigmoid(product(k, x, h));
      at(k) = r;
      at(kResetRow + k) = r * at(kStateRow + k);
    }
#pragma unroll
    for (int k = 0; k < kUnits; ++k) reset[k] = at(kResetRow + k);
#pragma unroll 1
    for (int k = 0; k < kUnits; ++k) {
      const float update = product(kUpdateRow + k, x, h);
      const float candidate = product(kCandidateRow + k, x, reset);
      const float2 weight = readouts(kCandidateRow + k);
      const float next = next_unit(update, candidate, at(kStateRow + k));
      direction = fmaf(weight.x, next, direction);
      eta = fmaf(weight.y, next, eta);
      at(kUpdateRow + k) = sigmoid(update);
      at(kCandidateRow + k) = tanh_accurate(candidate);
      at(kNewRow + k) = next;
    }
    readouts_backward(rate, direction, eta);
    gru_backward(average_decay, square_decay, direction, eta);
  }

  __device__ __forceinline__ void gru_backward(float average_decay, float square_decay,
                                               float d_direction, float d_eta) const {
    float d[kColumns] = {};
#pragma unroll 1
    for (int k = 0; k < kUnits; ++k) {
      const float2 weight = readouts(kCandidateRow + k);
      float d_next = inside ? d_planes[k * numel] + told[k] : 0.0f;
      d_next = fmaf(d_eta, weight.y, fmaf(d_direction, weight.x, d_next));
      const float u = at(kUpdateRow + k), c = at(kCandidateRow + k);
      const float d_candidate = d_next * (1.0f - u) * fmaf(-c, c, 1.0f);
      at(kUpdateRow + k) = d_next * (at(kStateRow + k) - c) * u * (1.0f - u);
      at(kCandidateRow + k) = d_candidate;
      at(kDirectRow + k) = d_next * u;
      add_transposed(kCandidateRow + k, d_candidate, d);
    }
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
      const float r = at(k), d_reset = d[kInputs + k];
      at(k) = d_reset * at(kStateRow + k) * r * (1.0f - r);
      d[kInputs + k] = fmaf(d_reset, r, at(kDirectRow + k));
    }
#pragma unroll 1
    for (int k = 0; k < 2 * kUnits; ++k) add_transposed(k, at(k), d);
#pragma unroll
    for (int k = 0; k < kInputs; ++k) d[k] += inside ? told[kUnits + k] : 0.0f;
    const float centred = d[kInputs - 1];
    at(kCentredRow) = centred;
    if (inside) d_planes[kLogRate * numel] += centred;
    features_backward(average_decay, square_decay, d_direction, d);
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
      const float2 weight = readouts(k);
      const float d_old =
          fmaf(at(kSquareDecayRow), weight.x, fmaf(at(kAverageDecayRow), weight.y, d[kInputs + k]));
      if (inside) d_planes[k * numel] = d_old;
    }
  }
};

}  // namespace fastl2o::cuda
