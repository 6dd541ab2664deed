// What a warp of the tensor-core window backward reads and keeps, the operands of its layers, and
// the replay of a tile's window from its first state.
#pragma once

#include "unroll_tensor.cuh"

namespace fastl2o::cuda::tensor {

using Units = float[kPairs][2];  // units 4p + t of the lane's two coordinates

template <bool kRnnprop, bool kExact, Aside kAside>
struct Tile {
  using Layout = TensorLayout<kRnnprop, kExact, kAside>;
  static constexpr int kFirstSteps = Layout::kFirstSteps, kSecondSteps = Layout::kSecondSteps;
  static constexpr int kMoments = kRnnprop ? 2 : 0;
  static constexpr int kPlanes = kMoments + 4 * kHidden;
  static constexpr int kParts = kExact ? 2 : 1;
  // Of the buffer: the first layer's h among its inputs.
  static constexpr int kHiddenRow = (kRnnprop ? 5 : 4) * kHidden;

  const WindowArgs& args;
  const float* const shared;  // weights
  float* const buffer;        // the group's, from (warp, row, 16): 80 of dL/da, 40 of inputs
  float* const aside;         // the group's
  const int group;            // of the grid
  const int warp;             // of the group
  const int barrier;          // the group's
  const Place<kExact> place;
  int tile = 0;
  MomentDecay decay;

  __device__ Tile(const WindowArgs& arguments, const float* weights, float* group_buffer,
                  float* put_aside, int group_of_grid, int warp_of_group, int barrier_number)
      : args(arguments),
        shared(weights),
        buffer(group_buffer),
        aside(put_aside),
        group(group_of_grid),
        warp(warp_of_group),
        barrier(barrier_number),
        decay{arguments.beta1,
              arguments.beta2,
              arguments.one_minus_beta1,
              arguments.one_minus_beta2,
              {arguments.log_beta1[0], arguments.log_beta1[1]},
              {arguments.log_beta2[0], arguments.log_beta2[1]}} {
#pragma unroll
    for (int n = 0; n < Layout::kFirstTiles + Layout::kSecondTiles; ++n)
      *tile_aside(n) = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if constexpr (kRnnprop)
#pragma unroll
      for (int k = 0; k < 3 * kPairs; ++k) *projection_sum(k) = 0.0f;
  }

  // The thread's own part of tile n of the weight gradients that are put aside.
  __device__ __forceinline__ float4* tile_aside(int n) const {
    return reinterpret_cast<float4*>(aside) + n * kGroupThreads + 32 * warp + place.lane;
  }
  // The first `count` tiles of a step's gradient are added to those aside from `at` on; and back.
  template <int kCount>
  __device__ __forceinline__ void add_aside(const float (&step)[kCount][4], int count,
                                            int at) const {
#pragma unroll
    for (int n = 0; n < count; ++n) {
      float4 sum = *tile_aside(at + n);
      sum.x += step[n][0], sum.y += step[n][1], sum.z += step[n][2], sum.w += step[n][3];
      *tile_aside(at + n) = sum;
    }
  }
  template <int kCount>
  __device__ __forceinline__ void fetch_aside(int at, int count, float (&out)[kCount][4]) const {
#pragma unroll
    for (int n = 0; n < count; ++n) {
      const float4 sum = *tile_aside(at + n);
      out[n][0] = sum.x, out[n][1] = sum.y, out[n][2] = sum.z, out[n][3] = sum.w;
    }
  }
  // The same of the projection's: the weights of g~ and m~ and the bias, for each p.
  __device__ __forceinline__ float* projection_sum(int k) const {
    return aside + Layout::kProjectionSums + k * kGroupThreads + 32 * warp + place.lane;
  }
  // Numbers of the lane's coordinates, which its quad shares. They wait in the buffer.
  enum Number { kThetaGradient, kRun, kMGradient, kVGradient, kOutput };
  __device__ __forceinline__ float* number(Number which) const {
    return buffer + Layout::kOfCoordinates + which * kGroupTile + warp * kWarpTile + place.g;
  }
  __device__ __forceinline__ void recall(Number which, float (&x)[2]) const {
    const float* from = number(which);
    x[0] = from[0], x[1] = from[8];
  }
  __device__ __forceinline__ void remember(Number which, const float (&x)[2]) const {
    __syncwarp();  // it has been read
    if (place.t == 0) {
      float* to = number(which);
      to[0] = x[0], to[8] = x[1];
    }
    __syncwarp();
  }
  __device__ __forceinline__ void synchronize() const {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(kGroupThreads) : "memory");
  }
  // The lane's first coordinate; its second lies 8 on. Computed anew where it is needed: registers
  // are short.
  __device__ __forceinline__ int64_t first() const {
    int now = tile;
    asm volatile("" : "+r"(now));
    return int64_t(now) * kGroupTile + warp * kWarpTile + place.g;
  }
  // Coordinates beyond N compute on zeros and give zero gradients.
  __device__ __forceinline__ void read(const float* plane, float (&out)[2]) const {
    const int64_t at = first();
#pragma unroll
    for (int j = 0; j < 2; ++j) out[j] = at + 8 * j < args.total ? plane[at + 8 * j] : 0.0f;
  }
  __device__ __forceinline__ void write(float* plane, const float (&in)[2]) const {
    const int64_t at = first();
#pragma unroll
    for (int j = 0; j < 2; ++j)
      if (at + 8 * j < args.total) plane[at + 8 * j] = in[j];
  }
  // Sums over the quad, the same in its four lanes.
  static __device__ __forceinline__ void sum_quad(float (&x)[2]) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      x[j] += __shfl_xor_sync(0xffffffffu, x[j], 1);
      x[j] += __shfl_xor_sync(0xffffffffu, x[j], 2);
    }
  }

  // The warp's record of the state before step t > 0; scratch begins with all (warp, step) records.
  __device__ __forceinline__ float* records(int t) const {
    int now = group * kGroupWarps + warp;
    asm volatile("" : "+r"(now));
    return args.window.scratch + (now * (args.window.steps - 1) + t - 1) * (kPlanes * kWarpTile);
  }
  // h or c (part 0 or 1) of a layer.
  __device__ __forceinline__ float2* record(int t, int layer, int part) const {
    return reinterpret_cast<float2*>(records(t)) + (2 * layer + part) * kPairs * 32 + place.lane;
  }
  __device__ __forceinline__ void load(int t, int layer, int part, Units& out) const {
    if (t == 0) {
      // One pointer moved along: the compiler would keep an address of each plane in registers.
      const float* from =
          args.window.state + (kMoments + (2 * layer + part) * kHidden + place.t) * args.total;
#pragma unroll
      for (int p = 0; p < kPairs; ++p, from += 4 * args.total) {
        asm volatile("" : "+l"(from));
        read(from, out[p]);
      }
      return;
    }
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      const float2 two = record(t, layer, part)[32 * p];
      out[p][0] = two.x, out[p][1] = two.y;
    }
  }
  __device__ __forceinline__ void load_cell(int t, int layer, int p, float (&out)[2]) const {
    if (t == 0) {
      read(
          args.window.state + (kMoments + (2 * layer + 1) * kHidden + 4 * p + place.t) * args.total,
          out);
      return;
    }
    const float2 two = record(t, layer, 1)[32 * p];
    out[0] = two.x, out[1] = two.y;
  }
  __device__ __forceinline__ void keep(int t, int layer, int part, int p,
                                       const float (&x)[2]) const {
    record(t, layer, part)[32 * p] = make_float2(x[0], x[1]);
  }
  // m and v: kept by the quad's lanes, one number each.
  __device__ __forceinline__ float* moments_record(int t) const {
    return records(t) + 4 * kHidden * kWarpTile + place.lane;
  }
  __device__ __forceinline__ void load_moments(int t, float (&m)[2], float (&v)[2]) const {
    if (t == 0) {
      read(args.window.state, m);
      read(args.window.state + args.total, v);
      return;
    }
    const float own = *moments_record(t);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      m[j] = __shfl_sync(0xffffffffu, own, (place.lane & ~3) + j);
      v[j] = __shfl_sync(0xffffffffu, own, (place.lane & ~3) + 2 + j);
    }
  }
  __device__ __forceinline__ void keep_moments(int t, const float (&m)[2],
                                               const float (&v)[2]) const {
    const float first = place.t < 2 ? m[0] : v[0], second = place.t < 2 ? m[1] : v[1];
    *moments_record(t) = place.t % 2 == 0 ? first : second;
  }

  struct Features {
    float grad[2];
    float values[2];     // LSTM rule: of group F's input t
    Moments moments[2];  // RNNprop
    float first, second;
  };
  __device__ __forceinline__ Features features(int t, const float (&m)[2],
                                               const float (&v)[2]) const {
    Features out = {};
    read(args.window.grads + t * args.total, out.grad);
    if constexpr (kRnnprop) {
      const float taken = float(args.window.first_step) + float(t) + 1.0f;
      out.first = moment_correction(decay.log_beta1, taken);
      out.second = moment_correction(decay.log_beta2, taken);
#pragma unroll
      for (int j = 0; j < 2; ++j)
        out.moments[j] = moment_features(decay, out.first, out.second, out.grad[j], m[j], v[j]);
    } else {
      const bool identity = args.features == 1;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float g = out.grad[j];
        const float first = identity ? g : log_feature(g, args.inverse_p, args.eps);
        const float second = identity ? 0.0f : sign_feature(g, args.exp_p);
        const float constant = place.t == 2 ? 1.0f : 0.0f;
        out.values[j] = place.t == 0 ? first : place.t == 1 ? second : constant;
      }
    }
    return out;
  }

  __device__ __forceinline__ Features features_before(int t) const {
    float m[2] = {}, v[2] = {};
    if constexpr (kRnnprop) load_moments(t, m, v);
    return features(t, m, v);
  }

  // The first layer's operands: group by group to `use(group, x)`.
  template <typename Use>
  __device__ __forceinline__ void first_inputs(const Features& now, const Units& h,
                                               Use&& use) const {
    if constexpr (kRnnprop) {
#pragma unroll
      for (int p = 0; p < kPairs; ++p) {
        const float4 w = projection(p);
        float z[2];
#pragma unroll
        for (int j = 0; j < 2; ++j)
          z[j] = elu(fmaf(w.x, now.moments[j].g_scaled, fmaf(w.y, now.moments[j].m_scaled, w.z)));
        use(p, z);
      }
#pragma unroll
      for (int p = 0; p < kPairs; ++p) use(kPairs + p, h[p]);
    } else {
#pragma unroll
      for (int p = 0; p < kPairs; ++p) use(p, h[p]);
      use(kPairs, now.values);
    }
  }
  static __device__ __forceinline__ void set_first(Split<kExact> (&x)[2 * kFirstSteps], int group,
                                                   const float (&in)[2]) {
    if (!kRnnprop && group == kPairs)  // features
      x[group].template set<true>(in[0], in[1]);
    else
      x[group].template set<false>(in[0], in[1]);
  }
  __device__ __forceinline__ float4 projection(int p) const {
    return reinterpret_cast<const float4*>(shared + Layout::kProjection)[4 * p + place.t];
  }
  __device__ __forceinline__ float readout(int p) const {
    return shared[Layout::kReadout + 4 * p + place.t];
  }

  template <int kLayer>
  static constexpr int kSteps = kLayer == 0 ? kFirstSteps : kSecondSteps;
  template <int kLayer>
  __device__ __forceinline__ const float* blocks(int p) const {
    return shared + (kLayer == 0 ? Layout::kFirst : Layout::kSecond) +
           2 * p * kSteps<kLayer> * 64 * kParts;
  }
  template <int kLayer>
  __device__ __forceinline__ Gates gates(const Split<kExact> (&x)[2 * kSteps<kLayer>],
                                         int p) const {
    float4 bias = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if constexpr (kLayer == 1 || kRnnprop)
      bias = reinterpret_cast<const float4*>(
          shared + (kLayer == 0 ? Layout::kFirstBias : Layout::kSecondBias))[4 * p + place.t];
    return gates_of<kExact, kSteps<kLayer>>(x, blocks<kLayer>(p), bias, place);
  }

  template <int kLayer>
  __device__ __forceinline__ void layer_forward(const Split<kExact> (&x)[2 * kSteps<kLayer>],
                                                int next, bool last, Units& h, Units& c) const {
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      asm volatile("" ::: "memory");
      const Gates now = gates<kLayer>(x, p);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        c[p][j] = fmaf(now.f[j], c[p][j], now.i[j] * now.cand[j]);
        h[p][j] = now.o[j] * tanh_accurate(c[p][j]);
      }
      if (last) continue;
      keep(next, kLayer, 0, p, h[p]);
      keep(next, kLayer, 1, p, c[p]);
    }
  }

  // Keeps the states after all steps but the last, of which h is returned.
  __device__ __forceinline__ void replay(Units (&h)[2]) const {
    const int steps = int(args.window.steps);
    Units c[2];
    float m[2] = {}, v[2] = {};
#pragma unroll
    for (int layer = 0; layer < 2; ++layer) {
      load(0, layer, 0, h[layer]);
      load(0, layer, 1, c[layer]);
    }
    if constexpr (kRnnprop) load_moments(0, m, v);
#pragma unroll 1
    for (int t = 0; t < steps; ++t) {
      asm volatile("" ::: "memory");
      const bool last = t + 1 == steps;
      {
        const Features now = features(t, m, v);
        if constexpr (kRnnprop) {
#pragma unroll
          for (int j = 0; j < 2; ++j) m[j] = now.moments[j].m, v[j] = now.moments[j].v;
          if (!last) keep_moments(t + 1, m, v);
        }
        Split<kExact> x[2 * kFirstSteps];
        first_inputs(now, h[0], [&](int group, const float (&in)[2]) { set_first(x, group, in); });
        layer_forward<0>(x, t + 1, last, h[0], c[0]);
      }
      Split<kExact> x[2 * kSecondSteps];
#pragma unroll
      for (int p = 0; p < kPairs; ++p) {
        x[p].template set<false>(h[0][p][0], h[0][p][1]);
        x[kPairs + p].template set<false>(h[1][p][0], h[1][p][1]);
      }
      layer_forward<1>(x, t + 1, last, h[1], c[1]);
    }
  }

  // `row`: the first of four, one for each lane of a quad.
  __device__ __forceinline__ void put(int row, const float (&x)[2]) const {
    *reinterpret_cast<float2*>(buffer + (warp * kBufferRows + row) * kWarpTile + place.write) =
        make_float2(x[0], x[1]);
  }
  __device__ __forceinline__ void get(int row, float (&x)[2]) const {
    const float2 two = *reinterpret_cast<const float2*>(
        buffer + (warp * kBufferRows + row) * kWarpTile + place.write);
    x[0] = two.x, x[1] = two.y;
  }
};

}  // namespace fastl2o::cuda::tensor
