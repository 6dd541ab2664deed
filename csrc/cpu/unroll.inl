// The backward pass over a truncation window, tile by tile: replay the hidden states from the
// window's first state, keep a segment's activations in cache, walk it backwards. The identity is
// derived in kernels/lstm/README.md.

// Planes recorded per step, as offsets in rows of kLanes<V>.
struct RecordLayout {
  struct Layer {
    int h, c, gates, tanh_c;
  };
  int features, z, moments, readout;
  Layer layer[kMaxLayers];
  int planes;

  explicit RecordLayout(const RuleConfig& config) {
    const int hidden = config.hidden_size;
    int at = 0;
    auto take = [&at](int count) __attribute__((always_inline)) {
      at += count;
      return at - count;
    };
    features = take(config.num_features());
    z = config.is_rnnprop() ? take(hidden) : features;
    moments = take(config.num_moments());
    readout = take(1);
    for (int l = 0; l < config.num_layers; ++l) {
      layer[l].h = take(hidden);
      layer[l].c = take(hidden);
      layer[l].gates = take(4 * hidden);
      layer[l].tanh_c = take(hidden);
    }
    planes = at;
  }
};

static int64_t num_segments(const UnrollContext& context) {
  return (context.args.steps + context.segment_steps - 1) / context.segment_steps;
}

template <int V>
struct UnrollTile {
  static constexpr int lanes = kLanes<V>;
  const UnrollContext& context;
  const RuleConfig& config;
  const UnrollArgs& args;
  MetaLayout layout;
  RecordLayout record;
  MomentDecay decay;
  int hidden;
  int64_t total;       // N
  int64_t stride;      // floats per record
  float* records;      // (segment_steps + 1) records; the first holds the state before the segment
  float* checkpoints;  // (segments, S): the state before each segment
  float* dh;           // (layers, H)
  float* dc;           // (layers, H)
  float* dx;           // first layer's inputs
  float* d_moments;    // (2)
  float* adjoint;      // dL/dtheta_t
  float* d_gates;      // (4, H): dL/d(preactivations) of one layer, or of the projection (H)
  float* transposed;   // the same, (lanes, padded rows)
  float* ones;         // (1): the bias's input
  float* d_readout;    // (readout inputs + 1): the readout's gradient before the sum over lanes
  float* sums;         // (gradient_sums): the other weights' gradient of the segment
  int64_t first = 0;   // the tile's first coordinate
  int count = 0;       // its coordinates; the other lanes are zero

  UnrollTile(const UnrollContext& shared, float* scratch)
      : context(shared),
        config(shared.config),
        args(shared.args),
        layout(config),
        record(config),
        decay(config),
        hidden(config.hidden_size),
        total(args.runs * args.dim),
        stride(int64_t(record.planes) * lanes) {
    auto take = [&scratch](int64_t planes) __attribute__((always_inline)) {
      float* own = scratch;
      scratch += planes * lanes;
      return own;
    };
    records = take((shared.segment_steps + 1) * record.planes);
    checkpoints = take(num_segments(shared) * config.state_planes());
    dh = take(kMaxLayers * hidden);
    dc = take(kMaxLayers * hidden);
    dx = take(config.num_inputs());
    d_moments = take(kMoments);
    adjoint = take(1);
    d_gates = take(4 * hidden);
    transposed = take(padded_rows(4 * hidden));
    ones = take(1);
    for (int lane = 0; lane < lanes; ++lane) ones[lane] = 1.0f;
    d_readout = take(config.readout_inputs() + 1);
    sums = scratch;
  }

  static int64_t scratch_floats(const UnrollContext& shared) {
    const RecordLayout record(shared.config);
    return lanes * ((shared.segment_steps + 1) * int64_t(record.planes) +
                    num_segments(shared) * int64_t(shared.config.state_planes()) +
                    2 * kMaxLayers * int64_t(shared.config.hidden_size) +
                    shared.config.num_inputs() + kMoments + 1 + 4 * shared.config.hidden_size +
                    padded_rows(4 * shared.config.hidden_size) + 1 +
                    shared.config.readout_inputs() + 1) +
           gradient_sums(shared.config);
  }

  FASTL2O_INLINE void load_row(const float* row, float* out) const {
    if (count == lanes) {
      for (int at = 0; at < lanes; at += kWidth) store(out + at, load(row + first + at));
      return;
    }
    for (int lane = 0; lane < lanes; ++lane) out[lane] = lane < count ? row[first + lane] : 0.0f;
  }

  FASTL2O_INLINE void store_row(const float* values, float* row) const {
    for (int lane = 0; lane < count; ++lane) row[first + lane] = values[lane];
  }

  static FASTL2O_INLINE void copy_planes(const float* from, float* to, int planes) {
    for (int64_t at = 0; at < int64_t(planes) * lanes; at += kWidth)
      store(to + at, load(from + at));
  }

  // Between a record and planes in the order of the state.
  void unpack_state(const float* planes, float* rec) const {
    copy_planes(planes, rec + record.moments * lanes, config.num_moments());
    for (int l = 0; l < config.num_layers; ++l) {
      copy_planes(planes + config.h_plane(l) * lanes, rec + record.layer[l].h * lanes, hidden);
      copy_planes(planes + config.c_plane(l) * lanes, rec + record.layer[l].c * lanes, hidden);
    }
  }
  void pack_state(const float* rec, float* planes) const {
    copy_planes(rec + record.moments * lanes, planes, config.num_moments());
    for (int l = 0; l < config.num_layers; ++l) {
      copy_planes(rec + record.layer[l].h * lanes, planes + config.h_plane(l) * lanes, hidden);
      copy_planes(rec + record.layer[l].c * lanes, planes + config.c_plane(l) * lanes, hidden);
    }
  }

  // Step t from record `before` into record `after`, activations included.
  void replay_step(int64_t t, const float* before, float* after) const {
    alignas(64) float grad[lanes];
    load_row(args.grads + t * total, grad);
    float* x = after + record.features * lanes;
    if (config.is_rnnprop()) {
      const MomentCorrection correction(config, args.first_step + double(t) + 1.0);
      for (int at = 0; at < lanes; at += kWidth) {
        const float* old = before + record.moments * lanes + at;
        float* own = after + record.moments * lanes + at;
        Vec m = load(old), v = load(old + lanes), g_scaled, m_scaled;
        moment_features(decay, splat(correction.first), splat(correction.second), load(grad + at),
                        m, v, g_scaled, m_scaled);
        store(own, m);
        store(own + lanes, v);
        store(x + at, g_scaled);
        store(x + lanes + at, m_scaled);
      }
      project<V>(context.meta + layout.projection_weight, context.meta + layout.projection_bias, x,
                 after + record.z * lanes, hidden);
    } else {
      gradient_features<V>(config, context.exp_p, grad, x);
    }
    NoPrefetch none;
    const float* packed = context.packed;
    const float* inputs = after + record.z * lanes;
    for (int l = 0; l < config.num_layers; ++l) {
      const auto& at = record.layer[l];
      float* old = const_cast<float*>(before);  // read only, as c_in and c_out differ
      const LayerState state{old + at.h * lanes,
                             Rows{old + at.c * lanes, lanes},
                             Rows{after + at.c * lanes, lanes},
                             after + at.h * lanes,
                             Rows{},
                             Rows{}};
      packed = layer_forward<V, true>(
          packed, inputs, config.layer_inputs(l), state, hidden,
          GatePlanes{after + at.gates * lanes, after + at.tanh_c * lanes}, none);
      inputs = state.h_next;
    }
    if (config.is_rnnprop()) {
      Vec out[V];
      dense_row<V>(context.meta + layout.readout_weight, context.meta[layout.readout_bias], inputs,
                   config.readout_inputs(), out);
      for (int v = 0; v < V; ++v)
        store(after + record.readout * lanes + v * kWidth, tanh_vec(out[v]));
    }
  }

  // w_t of each lane's run.
  FASTL2O_INLINE void lane_weights(int64_t t, float* out) const {
    const float* weights = args.loss_weights + t * args.runs;
    const int64_t run = first / args.dim;
    int64_t left = (run + 1) * args.dim - first;  // lanes until the next run starts
    for (int lane = 0, r = 0; lane < lanes; ++lane) {
      if (left == 0) {
        ++r;
        left = args.dim;
      }
      --left;
      out[lane] = lane < count ? weights[run + r] : 0.0f;
    }
  }

  // adjoint <- w_t g_t + keep * adjoint
  void advance_adjoint(int64_t t, float keep) const {
    alignas(64) float grad[lanes], weight[lanes];
    load_row(args.grads + t * total, grad);
    lane_weights(t, weight);
    for (int at = 0; at < lanes; at += kWidth)
      store(adjoint + at, fma(load(weight + at), load(grad + at), load(adjoint + at) * keep));
  }

  void backward_step(int64_t t, const float* before, float* after) const {
    alignas(64) float d_update[lanes];
    if (args.d_update != nullptr) {
      load_row(args.d_update + t * total, d_update);
    } else {
      for (int at = 0; at < lanes; at += kWidth)
        store(d_update + at, load(adjoint + at) * float(args.lr));
    }
    alignas(64) float d_out[lanes];
    for (int at = 0; at < lanes; at += kWidth) {
      const Vec out = load(after + record.readout * lanes + at);
      const Vec slope =
          config.is_rnnprop() ? (1.0f - out * out) * -config.step_size : splat(config.output_scale);
      store(d_out + at, load(d_update + at) * slope);
    }
    readout_backward(d_out, after);
    backward_layers(before, after);
    if (config.is_rnnprop())
      rnnprop_features_backward(t, after);
    else if (args.d_grads != nullptr)
      log_sign_backward(t);
  }

  void readout_backward(const float* d_out, const float* after) const {
    const int inputs = config.readout_inputs(), top_layer = config.num_layers - 1;
    const float* x = after + (top_layer < 0 ? record.features : record.layer[top_layer].h) * lanes;
    const float* weight = context.meta + layout.readout_weight;
    float* d_top = top_layer < 0 ? dx : dh + int64_t(top_layer) * hidden * lanes;
    for (int k = 0; k < inputs; ++k)
      for (int at = 0; at < lanes; at += kWidth) {
        const Vec d = load(d_out + at);
        float *own = d_top + k * lanes + at, *d_weight = d_readout + k * lanes + at;
        store(own, fma(splat(weight[k]), d, top_layer < 0 ? Vec{} : load(own)));
        store(d_weight, fma(load(x + k * lanes + at), d, load(d_weight)));
      }
    float* d_bias = d_readout + inputs * lanes;
    for (int at = 0; at < lanes; at += kWidth)
      store(d_bias + at, load(d_bias + at) + load(d_out + at));
  }

  void backward_layers(const float* before, const float* after) const {
    const float* packed = context.packed + packed_forward_floats(config);
    const float* layer_weights[kMaxLayers] = {};
    for (int l = 0; l < config.num_layers; ++l) {
      layer_weights[l] = packed;
      packed += 4 * int64_t(hidden) * (hidden + config.layer_inputs(l));
    }
    const GradientLayout gradient(config);
    const int rows = 4 * hidden;
    for (int l = config.num_layers - 1; l >= 0; --l) {
      const auto& at = record.layer[l];
      float* own_dh = dh + int64_t(l) * hidden * lanes;
      cell_backward<V>(after + at.gates * lanes, after + at.tanh_c * lanes, before + at.c * lanes,
                       own_dh, dc + int64_t(l) * hidden * lanes, d_gates, hidden);
      transposed_product<V, false>(layer_weights[l], d_gates, rows, hidden, own_dh);
      const float* input_weights = layer_weights[l] + int64_t(rows) * hidden;
      if (l > 0)
        transposed_product<V, true>(input_weights, d_gates, rows, hidden,
                                    own_dh - int64_t(hidden) * lanes);
      else if (config.is_rnnprop() || args.d_grads != nullptr)
        transposed_product<V, false>(input_weights, d_gates, rows, config.num_inputs(), dx);
      const int inputs = l > 0 ? record.layer[l - 1].h : record.z;
      add_columns(
          rows, sums + gradient.layer[l],
          {{after + inputs * lanes, config.layer_inputs(l)}, {before + at.h * lanes, hidden}});
    }
  }

  struct Columns {
    const float* planes;
    int count;
  };
  // Adds d_gates (rows) times these columns and times one, for the bias.
  void add_columns(int rows, float* own, std::initializer_list<Columns> inputs) const {
    const int64_t stride = padded_rows(rows);
    transpose_planes<V>(d_gates, rows, transposed);
    for (const Columns& x : inputs)
      own = add_gradient<V>(transposed, stride, x.planes, x.count, own);
    add_gradient<V>(transposed, stride, ones, 1, own);
  }

#include "features_backward.inl"

  void clear_gradients() const {
    __builtin_memset(d_readout, 0, sizeof(float) * (config.readout_inputs() + 1) * lanes);
    __builtin_memset(sums, 0, sizeof(float) * size_t(gradient_sums(config)));
  }

  void add_gradients(double* partial) const {
    const GradientLayout gradient(config);
    for (int64_t k = 0; k < gradient.readout; ++k) partial[k] += double(sums[k]);
    for (int k = 0; k <= config.readout_inputs(); ++k)
      partial[gradient.readout + k] += double(sum_lanes(d_readout + k * lanes, lanes));
  }

  void load_planes(const float* source, float* planes) const {
    for (int plane = 0; plane < config.state_planes(); ++plane)
      load_row(source + plane * total, planes + int64_t(plane) * lanes);
  }

  // dL/d(state) between planes in state order and the running dh, dc and moment adjoints.
  void start_adjoints() const {
    const int64_t cells = int64_t(kMaxLayers) * hidden;
    __builtin_memset(dh, 0, sizeof(float) * cells * lanes);
    __builtin_memset(dc, 0, sizeof(float) * cells * lanes);
    __builtin_memset(d_moments, 0, sizeof(float) * kMoments * lanes);
    __builtin_memset(adjoint, 0, sizeof(float) * lanes);
    if (args.d_last_state != nullptr)
      for_state_planes(
          [&](int plane, float* own) { load_row(args.d_last_state + plane * total, own); });
  }
  void finish_adjoints() const {
    for_state_planes([&](int plane, float* own) { store_row(own, args.d_state + plane * total); });
  }
  template <typename Visit>
  void for_state_planes(Visit visit) const {
    for (int k = 0; k < config.num_moments(); ++k) visit(k, d_moments + k * lanes);
    for (int l = 0; l < config.num_layers; ++l)
      for (int k = 0; k < hidden; ++k) {
        visit(config.h_plane(l) + k, dh + int64_t(l * hidden + k) * lanes);
        visit(config.c_plane(l) + k, dc + int64_t(l * hidden + k) * lanes);
      }
  }

  void run(int64_t first_coordinate, double* partial) {
    first = first_coordinate;
    count = int(total - first < lanes ? total - first : lanes);
    const int64_t segments = num_segments(context), length = context.segment_steps;
    load_planes(args.state, checkpoints);
    for (int64_t s = 0; s + 1 < segments; ++s) {
      unpack_state(checkpoints + s * config.state_planes() * lanes, records);
      for (int64_t j = 0; j < length; ++j)  // two records suffice while only the state is wanted
        replay_step(s * length + j, records + (j & 1) * stride, records + (~j & 1) * stride);
      pack_state(records + (length & 1) * stride,
                 checkpoints + (s + 1) * config.state_planes() * lanes);
    }
    start_adjoints();
    const bool own_updates = args.d_update == nullptr;
    const float keep = float(1.0 - args.lr * args.weight_decay);
    if (own_updates && args.rows > args.steps) advance_adjoint(args.steps, keep);
    for (int64_t s = segments - 1; s >= 0; --s) {
      const int64_t start = s * length;
      const int64_t steps = args.steps - start < length ? args.steps - start : length;
      unpack_state(checkpoints + s * config.state_planes() * lanes, records);
      for (int64_t j = 0; j < steps; ++j)
        replay_step(start + j, records + j * stride, records + (j + 1) * stride);
      clear_gradients();
      for (int64_t j = steps - 1; j >= 0; --j) {
        backward_step(start + j, records + j * stride, records + (j + 1) * stride);
        if (own_updates) advance_adjoint(start + j, keep);
      }
      add_gradients(partial);
    }
    finish_adjoints();
  }
};

static int64_t unroll_scratch(const UnrollContext& context) {
  return UnrollTile<kUnrollVectors>::scratch_floats(context);
}

static void unroll_tiles(const UnrollContext& context, int64_t first, int64_t last, double* partial,
                         float* scratch) {
  const FlushDenormals guard;
  UnrollTile<kUnrollVectors> tile(context, scratch);
  for (int64_t index = first; index < last; ++index) tile.run(index * tile.lanes, partial);
}
