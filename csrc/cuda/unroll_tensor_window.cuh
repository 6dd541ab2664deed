// One tile's way through a window on tensor cores: replay from its first state, then the walk
// backwards. Four warps of 16 coordinates go together; a warp's coordinates are its own but for the
// weight gradients, where it owns gates and sums over the coordinates of all four.
//
// Only h and c are kept of a step. The walk back takes the second layer first: its inputs, the
// first layer's h, were kept too. So no layer's gates outlive the handling of four of its units.
#pragma once

#include "unroll_tensor_tile.cuh"

namespace fastl2o::cuda::tensor {

template <bool kRnnprop, bool kExact, Aside kAside>
struct Window : Tile<kRnnprop, kExact, kAside> {
  using Base = Tile<kRnnprop, kExact, kAside>;
  using Base::add_aside, Base::args, Base::buffer, Base::decay, Base::features_before,
      Base::fetch_aside, Base::first, Base::first_inputs, Base::get, Base::kFirstSteps,
      Base::kHiddenRow, Base::kMoments, Base::kSecondSteps, Base::load, Base::load_cell,
      Base::place, Base::projection, Base::projection_sum, Base::put, Base::read, Base::readout,
      Base::recall, Base::remember, Base::replay, Base::shared, Base::sum_quad, Base::synchronize,
      Base::tile, Base::warp, Base::write;
  using Base::Base;
  using typename Base::Features;
  using typename Base::Layout;
  template <int kLayer>
  static constexpr int kSteps = Base::template kSteps<kLayer>;

  // Sums over all tiles.
  using FirstGradient = WeightGradient<kExact, kFirstSteps, kRnnprop, 2>;
  using SecondGradient = WeightGradient<kExact, kSecondSteps, true, 0>;
  static_assert(FirstGradient::kCount == Layout::kFirstTiles);
  typename SecondGradient::Sums second_sum = {};
  float readout_sum[kPairs] = {}, readout_bias_sum = 0.0f;

  // Gates again, and back through the cell: `d_h` (what `add` makes of it) and `d_c` are of the
  // state after the step; d_c becomes that before. Sums of the inputs' gradients; the gates' go to
  // the buffer.
  template <int kLayer, typename Add>
  __device__ __forceinline__ void layer_backward(const Split<kExact> (&x)[2 * kSteps<kLayer>],
                                                 int t, const Units& d_h, Units& d_c,
                                                 float (&d_x)[kSteps<kLayer>][4], Add&& add) {
    float next_cell[2];
    load_cell(t, kLayer, 0, next_cell);
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      fence_schedule(t);
      const float c_before[2] = {next_cell[0], next_cell[1]};
      if (p + 1 < kPairs) load_cell(t, kLayer, p + 1, next_cell);
      const Gates now = this->template gates<kLayer>(x, p);
      float tanh_c[2], d[2], d_gates[4][2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        tanh_c[j] = tanh_accurate(fmaf(now.f[j], c_before[j], now.i[j] * now.cand[j]));
        d[j] = d_h[p][j];
      }
      add(p, now, tanh_c, d);
      cell_backward(now, tanh_c, c_before, d, d_c[p], d_gates);
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) put(16 * p + 4 * gate, d_gates[gate]);
      transposed_product<kExact, kSteps<kLayer>>(d_gates, this->template blocks<kLayer>(p), place,
                                                 d_x);
    }
  }
  // Of input group `group`.
  template <int kCount>
  static __device__ __forceinline__ float input_gradient(const float (&d_x)[kCount][4], int group,
                                                         int j) {
    return d_x[group / 2][group % 2 + 2 * j];
  }

  __device__ __forceinline__ void keep_output(const Units& h) const {
    float out[2] = {};
#pragma unroll
    for (int p = 0; p < kPairs; ++p)
#pragma unroll
      for (int j = 0; j < 2; ++j) out[j] = fmaf(readout(p), h[p][j], out[j]);
    sum_quad(out);
    remember(Base::kOutput, out);
  }

  // Back through ELU, projection and moment averages.
  __device__ __forceinline__ void projection_backward(int t, const Features& now,
                                                      const float (&d_x)[kFirstSteps][4]) {
    float d_g_scaled[2] = {}, d_m_scaled[2] = {};
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      const float4 w = projection(p);
      float sums[3] = {};
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float g_scaled = now.moments[j].g_scaled, m_scaled = now.moments[j].m_scaled;
        const float z = elu(fmaf(w.x, g_scaled, fmaf(w.y, m_scaled, w.z)));
        const float d_z = input_gradient(d_x, p, j);
        const float d = z > 0.0f ? d_z : d_z * (z + 1.0f);
        sums[0] = fmaf(d, g_scaled, sums[0]);
        sums[1] = fmaf(d, m_scaled, sums[1]);
        sums[2] += d;
        d_g_scaled[j] = fmaf(w.x, d, d_g_scaled[j]);
        d_m_scaled[j] = fmaf(w.y, d, d_m_scaled[j]);
      }
#pragma unroll
      for (int k = 0; k < 3; ++k) *projection_sum(3 * p + k) += sums[k];
    }
    sum_quad(d_g_scaled);
    sum_quad(d_m_scaled);
    float d_grad[2], d_m[2], d_v[2];
    recall(Base::kMGradient, d_m);
    recall(Base::kVGradient, d_v);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const Moments& of = now.moments[j];
      const float d_rms =
          -(d_g_scaled[j] * of.g_scaled + d_m_scaled[j] * of.m_scaled) * of.inverse_rms;
      // The square root has no slope at zero; there v is zero because every gradient was.
      const float d_root = of.root == 0.0f ? 0.0f : d_rms * (0.5f * now.second) / of.root;
      const float m_sum = fmaf(d_m_scaled[j] * now.first, of.inverse_rms, d_m[j]);
      const float v_sum = d_v[j] + d_root;
      d_grad[j] = d_g_scaled[j] * of.inverse_rms + m_sum * decay.one_minus_beta1 +
                  v_sum * now.grad[j] * (2.0f * decay.one_minus_beta2);
      d_m[j] = m_sum * decay.beta1;
      d_v[j] = v_sum * decay.beta2;
    }
    remember(Base::kMGradient, d_m);
    remember(Base::kVGradient, d_v);
    if (args.window.d_grads != nullptr && place.t == 0)
      write(args.window.d_grads + t * args.total, d_grad);
  }

  // dx1/dg = sign(g) / (p (|g| + eps)) unless clipped, dx2/dg = e^p unless clipped.
  __device__ __forceinline__ void features_backward(int64_t t,
                                                    const float (&d_x)[kFirstSteps][4]) const {
    float grad[2], d_grad[2];
    read(args.window.grads + t * args.total, grad);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float own = input_gradient(d_x, kPairs, j);  // of feature t
      const float second = __shfl_down_sync(0xffffffffu, own, 1);
      const float g = grad[j];
      d_grad[j] = own;
      if (args.features != 2) continue;
      const float shifted = fabsf(g) + args.eps;
      const bool logarithmic = logf(shifted) * args.inverse_p >= -1.0f && g != 0.0f;
      const float slope = logarithmic ? copysignf(1.0f, g) / (shifted * args.p) : 0.0f;
      d_grad[j] = own * slope + second * (fabsf(g * args.exp_p) <= 1.0f ? args.exp_p : 0.0f);
    }
    if (place.t == 0) write(args.window.d_grads + t * args.total, d_grad);
  }

  // Gradients of the state after a step; of the step before when it has been walked back.
  struct Adjoint {
    Units h[2], c[2];
  };

  // One step of the walk back. The buffer holds the first layer's h after step t, then the one
  // before; so does kOutput, the readout without its bias.
  __device__ __forceinline__ void step_back(int t, const float (&d_update)[2], Adjoint& adjoint) {
    float d_output[2], output[2];
    if constexpr (kRnnprop) recall(Base::kOutput, output);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      d_output[j] = d_update[j] * args.output_scale;
      if constexpr (kRnnprop) {
        const float bounded = tanh_accurate(output[j] + shared[Layout::kReadout + kHidden]);
        d_output[j] *= 1.0f - bounded * bounded;
      }
      readout_bias_sum += d_output[j];
    }
    {
      Split<kExact> x[2 * kSecondSteps];
      {
        Units inputs, h;
#pragma unroll
        for (int p = 0; p < kPairs; ++p) get(kHiddenRow + 4 * p, inputs[p]);
        synchronize();  // now all have read what they need of the step walked back before this one
        load(t, 1, 0, h);
        if constexpr (kRnnprop) keep_output(h);
#pragma unroll
        for (int p = 0; p < kPairs; ++p) {
          x[p].template set<false>(inputs[p][0], inputs[p][1]);
          x[kPairs + p].template set<false>(h[p][0], h[p][1]);
          put(4 * kHidden + 4 * p, inputs[p]);
          put(5 * kHidden + 4 * p, h[p]);
        }
      }
      float d_x[kSecondSteps][4] = {};
      layer_backward<1>(x, t, adjoint.h[1], adjoint.c[1], d_x,
                        [&](int p, const Gates& now, const float (&tanh_c)[2], float (&d)[2]) {
#pragma unroll
                          for (int j = 0; j < 2; ++j) {
                            d[j] = fmaf(readout(p), d_output[j], d[j]);
                            readout_sum[p] =
                                fmaf(now.o[j] * tanh_c[j], d_output[j], readout_sum[p]);
                          }
                        });
#pragma unroll
      for (int p = 0; p < kPairs; ++p)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          adjoint.h[0][p][j] += input_gradient(d_x, p, j);
          adjoint.h[1][p][j] = input_gradient(d_x, kPairs + p, j);
        }
    }
    synchronize();
    {
      typename SecondGradient::Sums step;
      SecondGradient::of_step(buffer, warp, place, step);
#pragma unroll
      for (int n = Layout::kSecondTiles; n < SecondGradient::kCount; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) second_sum[n][i] += step[n][i];
      add_aside(step, Layout::kSecondTiles, Layout::kFirstTiles);
    }
    synchronize();
    {
      Split<kExact> x[2 * kFirstSteps];
      {
        Units h;
        load(t, 0, 0, h);
        first_inputs(features_before(t), h, [&](int group, const float (&in)[2]) {
          Base::set_first(x, group, in);
          put(4 * kHidden + 4 * group, in);
        });
      }
      float d_x[kFirstSteps][4] = {};
      layer_backward<0>(x, t, adjoint.h[0], adjoint.c[0], d_x,
                        [](int, const Gates&, const float (&)[2], float (&)[2]) {});
      constexpr int h_group = kRnnprop ? kPairs : 0;
#pragma unroll
      for (int p = 0; p < kPairs; ++p)
#pragma unroll
        for (int j = 0; j < 2; ++j) adjoint.h[0][p][j] = input_gradient(d_x, h_group + p, j);
      if constexpr (kRnnprop)
        projection_backward(t, features_before(t), d_x);
      else if (args.window.d_grads != nullptr)
        features_backward(t, d_x);
    }
    synchronize();
    {
      typename FirstGradient::Sums step;
      FirstGradient::of_step(buffer, warp, place, step);
      add_aside(step, Layout::kFirstTiles, 0);
    }
  }

  // dL/dtheta before step t from that after it.
  __device__ __forceinline__ void add_loss_gradient(int t, float (&d_theta)[2]) const {
    float grad[2], run[2];
    read(args.window.grads + t * args.total, grad);
    recall(Base::kRun, run);
#pragma unroll
    for (int j = 0; j < 2; ++j)
      d_theta[j] =
          fmaf(args.keep, d_theta[j],
               args.window.loss_weights[t * args.window.runs + __float_as_int(run[j])] * grad[j]);
    remember(Base::kThetaGradient, d_theta);
  }

  // All planes of an adjoint, by plane number.
  template <typename Visit>
  __device__ __forceinline__ void visit(Adjoint& adjoint, Visit&& each) const {
#pragma unroll
    for (int layer = 0; layer < 2; ++layer)
#pragma unroll
      for (int p = 0; p < kPairs; ++p) {
        const int plane = kMoments + 2 * layer * kHidden + 4 * p + place.t;
        each(plane, adjoint.h[layer][p]);
        each(plane + kHidden, adjoint.c[layer][p]);
      }
  }

  __device__ __forceinline__ void run_tile(int index) {
    tile = index;
    float run[2];
#pragma unroll
    for (int j = 0; j < 2; ++j)
      run[j] = __int_as_float(int(min(first() + 8 * j, args.total - 1) / args.window.dim));
    remember(Base::kRun, run);
    const UnrollArgs& window = args.window;
    {
      Units h[2];
      replay(h);
      if constexpr (kRnnprop) keep_output(h[1]);
      synchronize();  // the tile before has been read
#pragma unroll
      for (int p = 0; p < kPairs; ++p) put(kHiddenRow + 4 * p, h[0][p]);
    }
    Adjoint adjoint = {};
    if (const float* last = window.d_last_state; last != nullptr) {
      visit(adjoint, [&](int64_t plane, float (&own)[2]) { read(last + plane * args.total, own); });
    }
    float numbers[2] = {};
    if constexpr (kRnnprop)
#pragma unroll
      for (int k = 0; k < kMoments; ++k) {
        if (window.d_last_state != nullptr) read(window.d_last_state + k * args.total, numbers);
        remember(k == 0 ? Base::kMGradient : Base::kVGradient, numbers);
      }
    const bool given = window.d_update != nullptr;
    numbers[0] = numbers[1] = 0.0f;
    if (!given && window.rows > window.steps)
      add_loss_gradient(int(window.steps), numbers);
    else
      remember(Base::kThetaGradient, numbers);
#pragma unroll 1
    for (int t = int(window.steps) - 1; t >= 0; --t) {
      float d_update[2];
      if (given) {
        read(window.d_update + t * args.total, d_update);
      } else {
        recall(Base::kThetaGradient, numbers);
#pragma unroll
        for (int j = 0; j < 2; ++j) d_update[j] = args.lr * numbers[j];
        add_loss_gradient(t, numbers);
      }
      step_back(t, d_update, adjoint);
    }
    visit(adjoint, [&](int64_t plane, const float (&own)[2]) {
      write(window.d_state + plane * args.total, own);
    });
    if constexpr (kRnnprop)
#pragma unroll
      for (int k = 0; k < kMoments; ++k) {
        recall(k == 0 ? Base::kMGradient : Base::kVGradient, numbers);
        if (place.t == 0) write(window.d_state + k * args.total, numbers);
      }
  }

  // Over the rows of a warp: the same sum in lanes of equal t.
  static __device__ __forceinline__ float sum_rows(float x) {
#pragma unroll
    for (int step = 16; step > 2; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
  }

  // The group's gradients into its partial.
  __device__ __forceinline__ void store(float* partial) {
    typename FirstGradient::Sums first;
    fetch_aside(0, Layout::kFirstTiles, first);
    fetch_aside(Layout::kFirstTiles, Layout::kSecondTiles, second_sum);
    FirstGradient::store(first, args, 0, warp, place, partial);
    SecondGradient::store(second_sum, args, 1, warp, place, partial);
    // What is summed by unit lies in all warps: (number, warp), added in order of the warps.
    constexpr int kNumbers = 1 + kHidden + (kRnnprop ? 3 * kHidden : 0);
    synchronize();
    auto put_sum = [&](int number, float x) {
      x = sum_rows(x);
      if (place.g == 0) buffer[number * kGroupWarps + warp] = x;
    };
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      put_sum(4 * p + place.t, readout_sum[p]);
      if constexpr (kRnnprop)
#pragma unroll
        for (int k = 0; k < 3; ++k)
          put_sum(kHidden + 1 + k * kHidden + 4 * p + place.t, *projection_sum(3 * p + k));
    }
    const float bias_sum = sum_rows(readout_bias_sum);
    if (place.lane == 0) buffer[kHidden * kGroupWarps + warp] = bias_sum;
    synchronize();
    const int number = 32 * warp + place.lane;
    if (number >= kNumbers) return;
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < kGroupWarps; ++k) sum += buffer[number * kGroupWarps + k];
    const int k = (number - kHidden - 1) / kHidden, unit = (number - kHidden - 1) % kHidden;
    const MetaLayout& layout = args.layout;
    if (number < kHidden)
      partial[layout.readout_weight + number] = sum;
    else if (number == kHidden)
      partial[layout.readout_bias] = sum;
    else
      partial[k < 2 ? layout.projection_weight + 2 * unit + k : layout.projection_bias + unit] =
          sum;
  }
};

}  // namespace fastl2o::cuda::tensor
