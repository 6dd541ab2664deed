// One tile of one tensor: gradient and state in, cells, update and state out.
#pragma once

#include "step.cuh"

namespace fastl2o::cuda {

// The random bits of stochastic rounding at a lane's coordinates.
struct Randomness {
  bool on;
  uint32_t base[4];  // of the four coordinates
  uint32_t own;      // of the one that the lane owns

  __device__ Randomness(bool on_, uint32_t key, int64_t tile, const Lane& lane) : on(on_) {
    if (!on) return;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      base[j] = rounding_base(key, tile + lane.first + (lane.vector ? j : 8 * j));
    own = rounding_base(key, tile + lane.own);
  }
  __device__ __forceinline__ void bits(uint32_t pair, uint32_t (&lower)[4],
                                       uint32_t (&upper)[4]) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      lower[j] = on ? rounding_bits(base[j], pair) : 0;
      upper[j] = lower[j] >> 16;
    }
  }
};

// Pointers to a lane's entries of the state planes: `from` and `to` at the tile's first coordinate,
// in the plane of unit t.
template <typename State>
struct Planes {
  const State* from;
  State* to;
  int64_t group_stride;  // elements between unit 4p + t and 4p + 4 + t

  __device__ __forceinline__ void read(int group, const Lane& lane, float (&out)[4]) const {
    load_four(from + group * group_stride, lane, out);
  }
};

// The part of the sums of unit 4p + t that does not depend on units: bias and features.
template <bool kFeatures>
__device__ __forceinline__ void affine_sums(const float (&features)[2][4], const float* affine,
                                            const Lane& lane, int p, UnitSums& sums) {
  constexpr int rows = kFeatures ? 3 : 1;
  const float4* unit = reinterpret_cast<const float4*>(affine) + rows * (4 * p + lane.quad);
  const float4 bias = unit[0];
  const float biases[4] = {bias.x, bias.y, bias.z, bias.w};
#pragma unroll
  for (int gate = 0; gate < 4; ++gate)
#pragma unroll
    for (int j = 0; j < 4; ++j) gate_of(sums, gate, j) = biases[gate];
  if constexpr (kFeatures) {
    const float4 first = unit[1], second = unit[2];
    const float weights[2][4] = {{first.x, first.y, first.z, first.w},
                                 {second.x, second.y, second.z, second.w}};
#pragma unroll
    for (int f = 0; f < 2; ++f)
#pragma unroll
      for (int gate = 0; gate < 4; ++gate)
#pragma unroll
        for (int j = 0; j < 4; ++j)
          gate_of(sums, gate, j) = fmaf(weights[f][gate], features[f][j], gate_of(sums, gate, j));
  }
}

// One layer. `state` starts at the layer's h, c follows kPairs groups on; `x` are the operands of
// the inputs that are units and of h. Each group's new h goes to `consume(group, h)`.
template <int kGroups, Products kProducts, bool kFeatures, typename State, typename Consume>
__device__ __forceinline__ void run_layer(const Operand<kProducts> (&x)[kGroups],
                                          const float (&features)[2][4], const float* weights,
                                          const float* affine, const Planes<State>& state,
                                          const Lane& lane, const Randomness& randomness, int layer,
                                          Consume&& consume) {
  constexpr bool kAtOnce = kProducts == Products::fma;  // all groups' products
  constexpr int kPerTile = kGroups * 32 * (kProducts == Products::tf32_split ? 2 : 1);
  UnitSums all[kAtOnce ? kPairs : 1];
  if constexpr (kAtOnce) {
#pragma unroll
    for (int p = 0; p < kPairs; ++p) affine_sums<kFeatures>(features, affine, lane, p, all[p]);
    multiply_rows(x, weights, lane, all);
  }
  float cell[4], next_cell[4];  // c of this group of units and the next: in flight while one works
  state.read(kPairs, lane, next_cell);
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
#pragma unroll
    for (int j = 0; j < 4; ++j) cell[j] = next_cell[j];
    if (p + 1 < kPairs) state.read(kPairs + p + 1, lane, next_cell);
    UnitSums& sums = all[kAtOnce ? p : 0];
    if constexpr (!kAtOnce) {
#pragma unroll
      for (int q = 0; q < 2; ++q) multiply(x, weights + (2 * p + q) * kPerTile, lane.lane, sums[q]);
      UnitSums rest;
      affine_sums<kFeatures>(features, affine, lane, p, rest);
#pragma unroll
      for (int gate = 0; gate < 4; ++gate)
#pragma unroll
        for (int j = 0; j < 4; ++j) gate_of(sums, gate, j) += gate_of(rest, gate, j);
    }

    float next[4], output[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float entering = sigmoid(gate_of(sums, 0, j)) * tanh_accurate(gate_of(sums, 2, j));
      next[j] = fmaf(sigmoid(gate_of(sums, 1, j)), cell[j], entering);
      output[j] = sigmoid(gate_of(sums, 3, j)) * tanh_accurate(next[j]);
    }
    uint32_t random_h[4], random_c[4];
    randomness.bits(layer * kHidden + 4 * p + lane.quad, random_h, random_c);
    store_four(state.to + p * state.group_stride, lane, output, randomness.on, random_h);
    store_four(state.to + (kPairs + p) * state.group_stride, lane, next, randomness.on, random_c);
    consume(p, output);
  }
}

// RNNprop: the new averages of the lane's own coordinate into planes 0 and 1, its features out.
template <typename State>
__device__ __forceinline__ void run_moments(const StepArgs& args, const State* from, State* to,
                                            int64_t numel, float grad, float steps_taken,
                                            const Lane& lane, const Randomness& randomness,
                                            float (&out)[2]) {
  const MomentDecay decay = {args.beta1,
                             args.beta2,
                             args.one_minus_beta1,
                             args.one_minus_beta2,
                             {args.log_beta1[0], args.log_beta1[1]},
                             {args.log_beta2[0], args.log_beta2[1]}};
  const float t = steps_taken + 1.0f;
  const float m = lane.owns ? to_float(from[lane.own]) : 0.0f;
  const float v = lane.owns ? to_float(from[numel + lane.own]) : 0.0f;
  const Moments moments = moment_features(decay, moment_correction(decay.log_beta1, t),
                                          moment_correction(decay.log_beta2, t), grad, m, v);
  out[0] = moments.g_scaled;
  out[1] = moments.m_scaled;
  if (!lane.owns) return;
  const uint32_t random = randomness.on ? rounding_bits(randomness.own, 2 * kHidden) : 0;
  store_one(to, lane.own, moments.m, randomness.on, random);
  store_one(to + numel, lane.own, moments.v, randomness.on, random >> 16);
}

// Sums over the four lanes of a group; lane t of it gets the sum of coordinate t.
__device__ __forceinline__ float reduce_quad(const float (&partial)[4], int quad) {
  const bool upper = quad & 2, odd = quad & 1;
  const float keep0 = upper ? partial[2] : partial[0], give0 = upper ? partial[0] : partial[2];
  const float keep1 = upper ? partial[3] : partial[1], give1 = upper ? partial[1] : partial[3];
  const float half0 = keep0 + __shfl_xor_sync(0xffffffffu, give0, 2);
  const float half1 = keep1 + __shfl_xor_sync(0xffffffffu, give1, 2);
  const float give = odd ? half0 : half1;
  return (odd ? half1 : half0) + __shfl_xor_sync(0xffffffffu, give, 1);
}

// theta <- keep theta + lr u; a float64 parameter is not rounded to float32 on the way.
__device__ __forceinline__ void apply_update(const StepArgs& args, void* param, int64_t at,
                                             float update) {
  const DType dtype = DType(args.param_dtype);
  if (args.update_only) {
    store_element(param, dtype, at, update);
  } else if (dtype == DType::f64) {
    double& theta = static_cast<double*>(param)[at];
    theta = args.keep * theta + args.lr * double(update);
  } else {
    const float theta = load_element(param, dtype, at);
    store_element(param, dtype, at, fmaf(float(args.keep), theta, float(args.lr) * update));
  }
}

template <bool kRnnprop, Products kProducts, typename State>
__device__ void step_tile(const StepArgs& args, const TensorEntry& entry, int64_t base,
                          uint32_t tensor, const float* shared) {
  using Layout = SharedLayout<kRnnprop, kProducts>;
  constexpr int kMoments = kRnnprop ? 2 : 0;
  const int64_t numel = entry.numel;
  State* const old_state = static_cast<State*>(entry.state);
  State* const new_state =
      reinterpret_cast<State*>(static_cast<char*>(entry.state) + args.state_shift);
  // Every plane starts on a multiple of a vector only where numel is one of 4.
  const uint64_t addresses = reinterpret_cast<uint64_t>(old_state) |
                             reinterpret_cast<uint64_t>(new_state) | numel * sizeof(State);
  const Lane lane(addresses % (4 * sizeof(State)) == 0, int(min(numel - base, int64_t(kTile))));
  const Randomness randomness(sizeof(State) == 2 && args.stochastic_rounding,
                              rounding_key(args.seed, tensor), base, lane);

  const int64_t offset = (kMoments + lane.quad) * numel + base;
  const Planes<State> first = {old_state + offset, new_state + offset, 4 * numel};
  const Planes<State> second = {first.from + 2 * kHidden * numel, first.to + 2 * kHidden * numel,
                                4 * numel};
  float h[kPairs][4];
#pragma unroll
  for (int p = 0; p < kPairs; ++p) first.read(p, lane, h[p]);

  const DType dtype = DType(args.param_dtype);
  float grad = lane.owns ? load_element(entry.grad, dtype, base + lane.own) : 0.0f;
  if (args.grad_scale != nullptr) {
    grad /= *args.grad_scale;
    if (lane.owns) store_element(entry.grad, dtype, base + lane.own, grad);
  }
  if (args.maximize) grad = -grad;

  float own[2], features[2][4];
  if constexpr (kRnnprop) {
    run_moments(args, old_state + base, new_state + base, numel, grad,
                entry.step != nullptr ? *entry.step : args.first_step, lane, randomness, own);
  } else {
    const bool identity = args.features == 1;
    own[0] = identity ? grad : log_feature(grad, args.inverse_p, args.eps);
    own[1] = identity ? 0.0f : sign_feature(grad, args.exp_p);
  }
  lane.gather(own[0], features[0]);
  lane.gather(own[1], features[1]);

  constexpr int kGroups = kFirstGroups<kRnnprop>;
  Operand<kProducts> inputs[kGroups];
  if constexpr (kRnnprop) {
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      const float4 row =
          reinterpret_cast<const float4*>(shared + Layout::kProjection)[4 * p + lane.quad];
      float z[4];
#pragma unroll
      for (int j = 0; j < 4; ++j)
        z[j] = elu(fmaf(row.x, features[0][j], fmaf(row.y, features[1][j], row.z)));
      inputs[p].set(z);
    }
  }
#pragma unroll
  for (int p = 0; p < kPairs; ++p) inputs[kGroups - kPairs + p].set(h[p]);
  run_layer<kGroups, kProducts, !kRnnprop>(inputs, features, shared + Layout::kFirst,
                                           shared + Layout::kAffine, first, lane, randomness, 0,
                                           [&](int p, const float (&output)[4]) {
#pragma unroll
                                             for (int j = 0; j < 4; ++j) h[p][j] = output[j];
                                           });

  Operand<kProducts> middle[2 * kPairs];
#pragma unroll
  for (int p = 0; p < kPairs; ++p) middle[p].set(h[p]);
#pragma unroll
  for (int p = 0; p < kPairs; ++p) second.read(p, lane, h[p]);
#pragma unroll
  for (int p = 0; p < kPairs; ++p) middle[kPairs + p].set(h[p]);
  float partial[4] = {};
  run_layer<2 * kPairs, kProducts, false>(
      middle, features, shared + Layout::kSecond, shared + Layout::kAffineSecond, second, lane,
      randomness, 1, [&](int p, const float (&output)[4]) {
        const float weight = shared[Layout::kReadout + 4 * p + lane.quad];
#pragma unroll
        for (int j = 0; j < 4; ++j) partial[j] = fmaf(weight, output[j], partial[j]);
      });

  const float output = reduce_quad(partial, lane.quad) + shared[Layout::kReadout + kHidden];
  const float update = args.output_scale * (kRnnprop ? tanh_accurate(output) : output);
  if (lane.owns) apply_update(args, entry.param, base + lane.own, update);
}

// Adds 1 to the step counters that the launch before has read.
__device__ __forceinline__ void count_steps(const StepArgs& args) {
  if (args.found_inf != nullptr && *args.found_inf != 0.0f) return;
  if (args.skip_all != nullptr && *args.skip_all != 0) return;
  for (int i = threadIdx.x; i < args.counters; i += blockDim.x)
    if (args.skip_counters == nullptr || args.skip_counters[i] == 0) *args.counter[i] += 1.0f;
}

// Consecutive tiles go to different blocks, so that a few tiles already fill the device.
template <bool kRnnprop, Products kProducts, typename State>
__device__ __forceinline__ void step_block(const StepArgs& args, float* shared) {
  if (blockIdx.x == 0) count_steps(args);
  if (args.found_inf != nullptr && *args.found_inf != 0.0f) return;
  if (args.skip_all != nullptr && *args.skip_all != 0) return;
  pack<kRnnprop, kProducts>(args, shared);
  __syncthreads();

  int index = 0;
  for (int64_t tile = blockIdx.x + int64_t(threadIdx.x / 32) * gridDim.x; tile < args.tiles;
       tile += int64_t(blockDim.x / 32) * gridDim.x) {
    while (index + 1 < args.tensors && tile >= args.table[index + 1].first_tile) ++index;
    if (args.skip != nullptr && args.skip[index] != 0) continue;
    const TensorEntry& entry = args.table[index];
    step_tile<kRnnprop, kProducts, State>(args, entry, (tile - entry.first_tile) * kTile,
                                          uint32_t(args.first_tensor + index), shared);
  }
}

template <bool kExact>
inline constexpr Products kDeviceProducts = step_products(kExact, kDeviceMajor);
template <bool kExact, typename State>
inline constexpr int kDeviceThreads =
    step_threads(kDeviceProducts<kExact>, sizeof(State), kDeviceMajor);

// Where there are only multiply-adds the host launches the exact kernel, and the other is empty.
template <bool kRnnprop, bool kExact, typename State>
__global__ void __launch_bounds__(kDeviceThreads<kExact, State>, 1)
    step_kernel(const __grid_constant__ StepArgs args) {
  extern __shared__ float4 shared_memory[];
  if constexpr (kExact || kDeviceProducts<kExact> != Products::fma)
    step_block<kRnnprop, kDeviceProducts<kExact>, State>(args,
                                                         reinterpret_cast<float*>(shared_memory));
}

}  // namespace fastl2o::cuda
