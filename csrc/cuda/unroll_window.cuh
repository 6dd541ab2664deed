// One tile's way through a window: replay from its first state, then the walk backwards.
#pragma once

#include "unroll.cuh"

namespace fastl2o::cuda {

// Gradients that a thread adds up over all its block's tiles; those of the first layer and the
// projection are in shared memory. The readout's are of its units.
template <bool kRnnprop>
struct Gradients {
  using Layout = WindowLayout<kRnnprop>;
  WeightGradient<Layout::kSecondRows, Layout::kRow> second;
  float readout[kOwned] = {}, readout_bias = 0.0f;
};

template <bool kRnnprop>
struct Window {
  using Layout = WindowLayout<kRnnprop>;
  using FirstGradient = WeightGradient<Layout::kFirstRows, Layout::kRow>;
  using SecondGradient = WeightGradient<Layout::kSecondRows, Layout::kRow>;
  static constexpr int kRow = Layout::kRow;
  static constexpr int kMoments = kRnnprop ? 2 : 0;
  static constexpr int kPlanes = kMoments + 4 * kHidden;

  const WindowArgs& args;
  float* const shared;
  float* const aside;
  float* const replayed;  // (T - 1, S, 32): the states before steps 1 ..
  const Place place;
  const int64_t total;  // N
  int64_t at = 0;       // the lane's coordinate
  int64_t run = 0;
  bool inside = false;  // lanes beyond N compute on zeros and give zero gradients
  MomentDecay decay;

  __device__ Window(const WindowArgs& arguments, float* shared_memory, float* put_aside,
                    float* states)
      : args(arguments),
        shared(shared_memory),
        aside(put_aside),
        replayed(states),
        total(arguments.window.runs * arguments.window.dim),
        decay{arguments.beta1,
              arguments.beta2,
              arguments.one_minus_beta1,
              arguments.one_minus_beta2,
              {arguments.log_beta1[0], arguments.log_beta1[1]},
              {arguments.log_beta2[0], arguments.log_beta2[1]}} {}

  __device__ __forceinline__ float* row(int start, int index) const {
    return shared + start + index * kRow + place.lane;
  }
  // The thread's gradient of the weights of g~ and m~ and of the bias of the projection's output j.
  __device__ __forceinline__ float* projection_sum(int j) const {
    return shared + Layout::kProjectionSums + 3 * j * kWindowThreads + threadIdx.x;
  }
  __device__ __forceinline__ float read(const float* plane) const {
    return inside ? plane[at] : 0.0f;
  }
  __device__ __forceinline__ float gradient(int64_t t) const {
    return read(args.window.grads + t * total);
  }
  // The state's plane of unit owned(j): h or c (part 0 or 1) of a layer.
  __device__ __forceinline__ int plane(int layer, int part, int j) const {
    return kMoments + (2 * layer + part) * kHidden + place.owned(j);
  }
  __device__ __forceinline__ float* kept(int64_t t, int plane_index) const {
    return replayed + ((t - 1) * kPlanes + plane_index) * kWindowTile + place.lane;
  }
  // The state before step t.
  __device__ __forceinline__ void load(int64_t t, Cells (&state)[2], float (&moments)[2]) const {
    if (t == 0) {
      // One pointer moved along: the compiler would keep an address of each plane in registers.
      const float* from = args.window.state + plane(0, 0, 0) * total + at;
#pragma unroll
      for (int layer = 0; layer < 2; ++layer)
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          float (&out)[kOwned] = part == 0 ? state[layer].h : state[layer].c;
#pragma unroll
          for (int j = 0; j < kOwned; ++j) {
            asm volatile("" : "+l"(from));
            out[j] = inside ? *from : 0.0f;
            from += total;
          }
          from += (kHidden - kOwned) * total;
        }
#pragma unroll
      for (int k = 0; k < kMoments; ++k) moments[k] = read(args.window.state + k * total);
      return;
    }
#pragma unroll
    for (int layer = 0; layer < 2; ++layer)
#pragma unroll
      for (int j = 0; j < kOwned; ++j) {
        state[layer].h[j] = *kept(t, plane(layer, 0, j));
        state[layer].c[j] = *kept(t, plane(layer, 1, j));
      }
#pragma unroll
    for (int k = 0; k < kMoments; ++k) moments[k] = *kept(t, k);
  }
  __device__ __forceinline__ void keep(int64_t t, const Cells (&state)[2],
                                       const float (&moments)[2]) const {
#pragma unroll
    for (int layer = 0; layer < 2; ++layer)
#pragma unroll
      for (int j = 0; j < kOwned; ++j) {
        *kept(t, plane(layer, 0, j)) = state[layer].h[j];
        *kept(t, plane(layer, 1, j)) = state[layer].c[j];
      }
    if (place.warp == 0)
#pragma unroll
      for (int k = 0; k < kMoments; ++k) *kept(t, k) = moments[k];
  }
  __device__ __forceinline__ void put(int start, int first_row, const float (&x)[kOwned]) const {
#pragma unroll
    for (int j = 0; j < kOwned; ++j) *row(start, first_row + place.owned(j)) = x[j];
  }

  struct Features {
    float grad;
    Moments moments;
    float first, second;  // correction factors
  };
  // The operands of both layers from the state before step t; every warp averages the moments.
  __device__ __forceinline__ Features features(int64_t t, const Cells (&state)[2],
                                               const float (&moments)[2]) const {
    Features out = {};
    out.grad = gradient(t);
    put(Layout::kFirst, 0, state[0].h);
    put(Layout::kSecond, 0, state[1].h);
    if constexpr (kRnnprop) {
      const float taken = float(args.window.first_step) + float(t) + 1.0f;
      out.first = moment_correction(decay.log_beta1, taken);
      out.second = moment_correction(decay.log_beta2, taken);
      out.moments = moment_features(decay, out.first, out.second, out.grad, moments[0], moments[1]);
      float z[kOwned];
#pragma unroll
      for (int j = 0; j < kOwned; ++j) {
        const float4 w =
            reinterpret_cast<const float4*>(shared + Layout::kProjection)[place.owned(j)];
        z[j] = elu(fmaf(w.x, out.moments.g_scaled, fmaf(w.y, out.moments.m_scaled, w.z)));
      }
      put(Layout::kFirst, kHidden, z);
    } else if (place.warp == 0) {
      const bool identity = args.features == 1;
      *row(Layout::kFirst, kHidden) =
          identity ? out.grad : log_feature(out.grad, args.inverse_p, args.eps);
      *row(Layout::kFirst, kHidden + 1) = identity ? 0.0f : sign_feature(out.grad, args.exp_p);
    }
    return out;
  }
  __device__ __forceinline__ Gates forward(int layer, Cells& state) const {
    if (layer == 0)
      return layer_forward<Layout::kFirstRows, kRow>(shared + Layout::kFirst,
                                                     shared + Layout::kFirstWeights,
                                                     shared + Layout::kFirstBias, place, state);
    return layer_forward<Layout::kSecondRows, kRow>(shared + Layout::kSecond,
                                                    shared + Layout::kSecondWeights,
                                                    shared + Layout::kSecondBias, place, state);
  }

  __device__ void replay() const {
    Cells state[2];
    float moments[2];
    load(0, state, moments);
#pragma unroll 1
    for (int64_t t = 0; t + 1 < args.window.steps; ++t) {
      const Features now = features(t, state, moments);
      moments[0] = now.moments.m;
      moments[1] = now.moments.v;
      __syncthreads();
      forward(0, state[0]);
      put(Layout::kSecond, kHidden, state[0].h);
      __syncthreads();
      forward(1, state[1]);
      keep(t + 1, state, moments);
      __syncthreads();
    }
  }

  // Sums over the warps of two numbers a lane. Ends with the sums in every warp.
  __device__ __forceinline__ void sum_warps(float& first, float& second) const {
    float* own = shared + Layout::kSums + 2 * place.warp * kWindowTile + place.lane;
    own[0] = first;
    own[kWindowTile] = second;
    __syncthreads();
    first = second = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kWindowWarps; ++warp) {
      const float* other = shared + Layout::kSums + 2 * warp * kWindowTile + place.lane;
      first += other[0];
      second += other[kWindowTile];
    }
  }

  __device__ __forceinline__ float loss_gradient(int64_t t) const {
    return inside ? args.window.loss_weights[t * args.window.runs + run] * gradient(t) : 0.0f;
  }

  // Back through ELU, projection and moment averages.
  __device__ __forceinline__ void projection_backward(int64_t t, const float (&d_z)[kOwned],
                                                      float (&d_moments)[2]) const {
    float d_g_scaled = 0.0f, d_m_scaled = 0.0f;
    float now[7];
    fetch(shared + Layout::kFeatures, now);
    const float grad = now[0], first = now[1], second = now[2], root = now[3];
    const float inverse_rms = now[4], g_scaled = now[5], m_scaled = now[6];
#pragma unroll
    for (int j = 0; j < kOwned; ++j) {
      const float z = *row(Layout::kFirst, kHidden + place.owned(j));
      const float d = z > 0.0f ? d_z[j] : d_z[j] * (z + 1.0f);
      float* sum = projection_sum(j);
      sum[0] = fmaf(d, g_scaled, sum[0]);
      sum[kWindowThreads] = fmaf(d, m_scaled, sum[kWindowThreads]);
      sum[2 * kWindowThreads] += d;
      const float4 w =
          reinterpret_cast<const float4*>(shared + Layout::kProjection)[place.owned(j)];
      d_g_scaled = fmaf(w.x, d, d_g_scaled);
      d_m_scaled = fmaf(w.y, d, d_m_scaled);
    }
    sum_warps(d_g_scaled, d_m_scaled);
    const float d_rms = -(d_g_scaled * g_scaled + d_m_scaled * m_scaled) * inverse_rms;
    // The square root has no slope at zero; there v is zero because every gradient was.
    const float d_v = root == 0.0f ? 0.0f : d_rms * (0.5f * second) / root;
    const float m_sum = fmaf(d_m_scaled * first, inverse_rms, d_moments[0]);
    const float v_sum = d_moments[1] + d_v;
    if (args.window.d_grads != nullptr && place.warp == 0 && inside)
      args.window.d_grads[t * total + at] = d_g_scaled * inverse_rms +
                                            m_sum * decay.one_minus_beta1 +
                                            v_sum * grad * (2.0f * decay.one_minus_beta2);
    d_moments[0] = m_sum * decay.beta1;
    d_moments[1] = v_sum * decay.beta2;
  }

  // dx1/dg = sign(g) / (p (|g| + eps)) unless clipped, dx2/dg = e^p unless clipped.
  __device__ __forceinline__ void features_backward(int64_t t) const {
    const float* d_gates = shared + Layout::kGates;
    float d[2] = {};
#pragma unroll
    for (int j = 0; j < kOwned; ++j)
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) {
        const float d_gate = d_gates[(gate * kHidden + place.owned(j)) * kRow + place.lane];
        const float* weight = shared + Layout::kFirstWeights + 4 * place.owned(j) + gate;
#pragma unroll
        for (int f = 0; f < 2; ++f) d[f] = fmaf(weight[(kHidden + f) * 4 * kHidden], d_gate, d[f]);
      }
    sum_warps(d[0], d[1]);
    if (place.warp != 0 || !inside) return;
    const float g = gradient(t);
    float d_g = d[0];
    if (args.features == 2) {
      const float shifted = fabsf(g) + args.eps;
      const bool logarithmic = logf(shifted) * args.inverse_p >= -1.0f && g != 0.0f;
      const float slope = logarithmic ? copysignf(1.0f, g) / (shifted * args.p) : 0.0f;
      d_g = d[0] * slope + d[1] * (fabsf(g * args.exp_p) <= 1.0f ? args.exp_p : 0.0f);
    }
    args.window.d_grads[t * total + at] = d_g;
  }

  // One step of the walk back: `adjoint` from dL/d(state after t) to dL/d(state before t).
  __device__ __forceinline__ void step_back(int64_t t, float d_update, Cells (&adjoint)[2],
                                            float (&d_moments)[2],
                                            Gradients<kRnnprop>& sums) const {
    float* const d_gates = shared + Layout::kGates;
    Cells state[2];
    float moments[2];
    load(t, state, moments);
    float c_before[2][kOwned];
#pragma unroll
    for (int layer = 0; layer < 2; ++layer)
#pragma unroll
      for (int j = 0; j < kOwned; ++j) c_before[layer][j] = state[layer].c[j];
    constexpr int part = kOwned * kWindowThreads;
    float* const first_adjoint = aside + Layout::kFirstGates + 6 * part;
    stash(adjoint[0].h, first_adjoint);
    stash(adjoint[0].c, first_adjoint + part);
    {
      const Features now = features(t, state, moments);
      if constexpr (kRnnprop)
        stash({now.grad, now.first, now.second, now.moments.root, now.moments.inverse_rms,
               now.moments.g_scaled, now.moments.m_scaled},
              shared + Layout::kFeatures);
    }
    __syncthreads();
    stash(forward(0, state[0]), c_before[0], aside + Layout::kFirstGates);
    put(Layout::kSecond, kHidden, state[0].h);
    __syncthreads();
    const Gates second = forward(1, state[1]);

    float d_output = d_update * args.output_scale;
    if constexpr (kRnnprop) {
      float output = 0.0f, unused = 0.0f;
#pragma unroll
      for (int j = 0; j < kOwned; ++j)
        output = fmaf(shared[Layout::kReadout + place.owned(j)], state[1].h[j], output);
      sum_warps(output, unused);
      const float bounded = tanh_accurate(output + shared[Layout::kReadout + kHidden]);
      d_output *= 1.0f - bounded * bounded;
    }
#pragma unroll
    for (int j = 0; j < kOwned; ++j) {
      adjoint[1].h[j] = fmaf(shared[Layout::kReadout + place.owned(j)], d_output, adjoint[1].h[j]);
      sums.readout[j] = fmaf(state[1].h[j], d_output, sums.readout[j]);
    }
    sums.readout_bias += d_output;

    float d_x[kOwned];
    cell_backward<kRow>(second, c_before[1], place, adjoint[1], d_gates);
    __syncthreads();
    sums.second += SecondGradient::of_step(shared + Layout::kSecond, d_gates, place);
    transposed_product<true, kRow>(d_gates, shared + Layout::kSecondWeights, place, adjoint[1].h,
                                   d_x);
    fetch(first_adjoint, adjoint[0].h);
    fetch(first_adjoint + part, adjoint[0].c);
#pragma unroll
    for (int j = 0; j < kOwned; ++j) adjoint[0].h[j] += d_x[j];
    __syncthreads();
    Gates first;
    fetch(aside + Layout::kFirstGates, first, c_before[0]);
    cell_backward<kRow>(first, c_before[0], place, adjoint[0], d_gates);
    __syncthreads();
    {
      FirstGradient sum = FirstGradient::of_step(shared + Layout::kFirst, d_gates, place);
      FirstGradient before;
      fetch(aside + Layout::kFirstSums, before.sums);
      sum += before;
      stash(sum.sums, aside + Layout::kFirstSums);
    }
    transposed_product<kRnnprop, kRow>(d_gates, shared + Layout::kFirstWeights, place, adjoint[0].h,
                                       d_x);
    if constexpr (kRnnprop)
      projection_backward(t, d_x, d_moments);
    else if (args.window.d_grads != nullptr)
      features_backward(t);
    __syncthreads();
  }

  __device__ void run_tile(int64_t tile, Gradients<kRnnprop>& sums) {
    at = tile * kWindowTile + place.lane;
    inside = at < total;
    run = inside ? at / args.window.dim : 0;
    replay();
    Cells adjoint[2];
    float d_moments[2] = {};
    const float* last = args.window.d_last_state;
    auto visit = [&](auto&& each) {
#pragma unroll
      for (int layer = 0; layer < 2; ++layer)
#pragma unroll
        for (int j = 0; j < kOwned; ++j) {
          each(plane(layer, 0, j), adjoint[layer].h[j]);
          each(plane(layer, 1, j), adjoint[layer].c[j]);
        }
#pragma unroll
      for (int k = 0; k < kMoments; ++k) each(k, d_moments[k]);
    };
    visit(
        [&](int index, float& own) { own = last == nullptr ? 0.0f : read(last + index * total); });
    const UnrollArgs& window = args.window;
    float d_theta = window.d_update == nullptr && window.rows > window.steps
                        ? loss_gradient(window.steps)
                        : 0.0f;
#pragma unroll 1
    for (int64_t t = window.steps - 1; t >= 0; --t) {
      const float d_update =
          window.d_update != nullptr ? read(window.d_update + t * total) : args.lr * d_theta;
      step_back(t, d_update, adjoint, d_moments, sums);
      if (window.d_update == nullptr) d_theta = fmaf(args.keep, d_theta, loss_gradient(t));
    }
    visit([&](int index, float& own) {
      if (inside && (index >= kMoments || place.warp == 0))
        window.d_state[index * total + at] = own;
    });
  }
};

}  // namespace fastl2o::cuda
