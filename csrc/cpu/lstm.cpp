// Drivers of the coordinate-wise rules: which tiles there are, who computes them, in which order
// partial results are added. The work on a tile is in the kernels of one instruction set.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "aligned_floats.h"
#include "nonfinite.h"
#include "rounding_keys.h"
#include "tile_kernels.h"

namespace fastl2o::cpu {
namespace {

constexpr int kMaxTile = 64;  // coordinates of the widest tile

// A coordinate of a list of tensors.
struct Place {
  size_t tensor;
  int64_t offset;
};

// Where a thread's share may begin: at the tile of a tensor that coordinate `at` of all is in.
Place tile_at(const std::vector<int64_t>& starts, int64_t at, int64_t lanes) {
  if (at >= starts.back()) return {starts.size() - 1, 0};
  const size_t tensor = owner_of(starts, at);
  return {tensor, (at - starts[tensor]) / lanes * lanes};
}

// What whole tiles leave of each tensor, collected into tiles of several tensors.
class Leftovers {
 public:
  Leftovers(const TileKernels& kernels, const StepContext& context)
      : kernels_(kernels), context_(context) {}

  // The coordinates from `offset` to the tensor's end, fewer than a tile.
  void add(const StepTensor& tensor, int64_t offset, const StepTensor* following) {
    while (offset < tensor.numel) {
      const int room = kernels_.step_tile - lanes_;
      const int count = int(std::min<int64_t>(room, tensor.numel - offset));
      segments_[count_++] = {&tensor, offset, count, lanes_};
      lanes_ += count;
      offset += count;
      if (count == room) step(following);
    }
  }

  void step(const StepTensor* following) {
    if (count_ > 0) kernels_.step(context_, {segments_, count_, following});
    count_ = lanes_ = 0;
  }

 private:
  const TileKernels& kernels_;
  const StepContext& context_;
  Segment segments_[kMaxTile];
  int count_ = 0;
  int lanes_ = 0;
};

// A tile of one tensor is stepped where its state lies, a tile of several has to be gathered and
// scattered: so each tensor has whole tiles of its own from its start.
void step_tiles(const TileKernels& kernels, const StepContext& context,
                const std::vector<StepTensor>& tensors, const ParallelFor& parallel_for) {
  const std::vector<int64_t> starts = starts_of(tensors);
  const int64_t lanes = kernels.step_tile;
  parallel_for((starts.back() + lanes - 1) / lanes, [&](int64_t begin, int64_t end) {
    const Place first = tile_at(starts, begin * lanes, lanes);
    const Place last = tile_at(starts, end * lanes, lanes);
    Leftovers leftovers(kernels, context);
    for (size_t i = first.tensor; i < tensors.size() && i <= last.tensor; ++i) {
      const StepTensor& tensor = tensors[i];
      const StepTensor* following = i + 1 < tensors.size() ? &tensors[i + 1] : nullptr;
      const int64_t stop = i == last.tensor ? last.offset : tensor.numel;
      int64_t offset = i == first.tensor ? first.offset : 0;
      for (; offset + lanes <= stop; offset += lanes) {
        const Segment segment{&tensor, offset, int(lanes), 0};
        kernels.step(context, {&segment, 1, following});
      }
      if (i != last.tensor) leftovers.add(tensor, offset, following);
    }
    leftovers.step(nullptr);
  });
}

// As step_tiles, but every tensor has tiles of its own, stepped by the tensor's own set of the
// `context`'s meta-parameters.
void step_tiles_of_sets(const TileKernels& kernels, const StepContext& context,
                        const std::vector<StepTensor>& tensors, const ParallelFor& parallel_for) {
  const int64_t size = MetaLayout(context.config).total;
  const int64_t lanes = kernels.step_tile;
  std::vector<int64_t> starts(tensors.size() + 1, 0);
  for (size_t i = 0; i < tensors.size(); ++i)
    starts[i + 1] = starts[i] + (tensors[i].numel + lanes - 1) / lanes;
  parallel_for(starts.back(), [&](int64_t begin, int64_t end) {
    size_t owner = owner_of(starts, begin);
    StepContext own = context;
    for (int64_t tile = begin; tile < end; ++tile) {
      while (starts[owner + 1] <= tile) ++owner;
      const StepTensor& tensor = tensors[owner];
      const int64_t offset = (tile - starts[owner]) * lanes;
      const Segment segment{&tensor, offset, int(std::min(lanes, tensor.numel - offset)), 0};
      const bool more = owner + 1 < tensors.size();
      own.meta = context.meta + tensor.meta_set * size;
      kernels.step_own(own, {&segment, 1, more ? &tensors[owner + 1] : nullptr});
    }
  });
}

// Tensors have most often taken as many steps as the one before: two powers a call, not a tensor.
void correct_moments(const RuleConfig& config, std::vector<StepTensor>& tensors) {
  const StepTensor* before = nullptr;
  for (StepTensor& tensor : tensors) {
    if (before != nullptr && *before->step == *tensor.step) {
      tensor.correction1 = before->correction1;
      tensor.correction2 = before->correction2;
    } else {
      const double t = double(*tensor.step) + 1.0;
      tensor.correction1 = float(1.0 / (1.0 - std::pow(config.beta1, t)));
      tensor.correction2 = float(1.0 / (1.0 - std::pow(config.beta2, t)));
    }
    before = &tensor;
  }
}

// Beyond what fits here a window's activations are replayed in segments, from checkpoints: up to
// 100 steps of 2 x 20 are not. They then lie in L3 or in memory, which costs less than replaying
// twice: a step's record is written and read once while thousands of multiply-adds go by. A longer
// window is replayed twice however long its segments are, so those fit into L2.
constexpr int64_t kRecordBytes = 4000 * 1024;
constexpr int64_t kSegmentBytes = 1 << 20;
constexpr int64_t kMaxChunks = 64;
constexpr int64_t kPartialBytes = 8 << 20;

int64_t choose_segment_steps(const TileKernels& kernels, const RuleConfig& config, int64_t steps) {
  const int64_t state = config.state_planes();
  const int64_t record = config.num_features() + 2 * config.num_inputs() + 4 +
                         7 * config.num_layers * config.hidden_size;
  const int64_t step_bytes = record * kernels.unroll_tile * int64_t(sizeof(float));
  if (steps * step_bytes <= kRecordBytes) return std::max<int64_t>(steps, 1);
  // Checkpoints and records take the least memory together when they are of equal size.
  const auto balanced =
      int64_t(std::ceil(std::sqrt(double(steps) * double(state) / double(record))));
  return std::clamp<int64_t>(std::max(kSegmentBytes / step_bytes, balanced), 1, steps);
}

}  // namespace

int64_t step(const TileKernels& kernels, const RuleConfig& config, const float* meta,
             std::vector<StepTensor>& tensors, const StepOptions& options,
             const ParallelFor& parallel_for) {
  set_rounding_keys(options, tensors);
  const int64_t bad = screen(options.nonfinite, tensors, parallel_for);
  if (bad >= 0) return bad;
  if (tensors.empty()) return -1;
  if (config.is_rnnprop()) correct_moments(config, tensors);
  StepContext context{config, options, meta, nullptr, float(std::exp(config.p))};
  if (options.meta_sets == 1) {
    const AlignedFloats packed(kernels.packed_floats(config, false));
    kernels.pack(config, false, meta, packed.data);
    context.packed = packed.data;
    step_tiles(kernels, context, tensors, parallel_for);
  } else {
    step_tiles_of_sets(kernels, context, tensors, parallel_for);
  }
  for (StepTensor& tensor : tensors)
    if (tensor.step != nullptr) *tensor.step += 1.0f;
  return -1;
}

void step_runs(const TileKernels& kernels, const RuleConfig& config, const float* meta,
               const Runs& all, double lr, double weight_decay, const ParallelFor& parallel_for) {
  StepOptions options;
  options.lr = lr;
  options.weight_decay = weight_decay;
  options.nonfinite = NonFinite::pass;
  options.meta_sets = all.runs;
  std::vector<float> taken(size_t(all.runs), float(all.step));
  std::vector<StepTensor> tensors;
  tensors.reserve(size_t(all.runs));
  for (int64_t run = 0; run < all.runs; ++run) {
    tensors.push_back({all.params + run * all.dim, const_cast<float*>(all.grads) + run * all.dim,
                       all.states + run * config.state_planes() * all.dim, &taken[size_t(run)],
                       all.dim, DType::f32});
    tensors.back().meta_set = run;
  }
  step(kernels, config, meta, tensors, options, parallel_for);
}

void functional_step(const TileKernels& kernels, const RuleConfig& config, const float* meta,
                     int64_t numel, double first_step, const float* grad, const float* state,
                     float* update, float* new_state, const ParallelFor& parallel_for) {
  if (config.state_planes() * numel > 0)
    std::memcpy(new_state, state, sizeof(float) * size_t(config.state_planes() * numel));
  std::fill_n(update, numel, 0.0f);
  float taken = float(first_step);
  // With a parameter of zero, lr 1 and no decay the new parameter is the update itself.
  std::vector<StepTensor> tensors{{update, const_cast<float*>(grad), new_state,
                                   config.is_rnnprop() ? &taken : nullptr, numel, DType::f32}};
  StepOptions options;
  options.nonfinite = NonFinite::pass;
  step(kernels, config, meta, tensors, options, parallel_for);
}

void unroll_backward(const TileKernels& kernels, const RuleConfig& config, const float* meta,
                     const UnrollArgs& args, const ParallelFor& parallel_for) {
  const AlignedFloats packed(kernels.packed_floats(config, true));
  kernels.pack(config, true, meta, packed.data);
  const UnrollContext context{config,
                              args,
                              meta,
                              packed.data,
                              float(std::exp(config.p)),
                              choose_segment_steps(kernels, config, args.steps)};
  const int64_t total = args.runs * args.dim;
  const int64_t tiles = (total + kernels.unroll_tile - 1) / kernels.unroll_tile;
  const int64_t size = kernels.gradient_sums(config);
  // One partial gradient per chunk of tiles, added in order. The chunks depend on the problem only,
  // so the number of threads does not change a bit.
  const int64_t affordable =
      std::max<int64_t>(16, kPartialBytes / (size * int64_t(sizeof(double))));
  const int64_t chunks = std::min({tiles, kMaxChunks, affordable});
  std::vector<double> partials(size_t(std::max<int64_t>(chunks, 1) * size), 0.0);
  parallel_for(chunks, [&](int64_t begin, int64_t end) {
    AlignedFloats scratch(kernels.unroll_scratch(context));
    for (int64_t chunk = begin; chunk < end; ++chunk)
      kernels.unroll(context, chunk * tiles / chunks, (chunk + 1) * tiles / chunks,
                     partials.data() + chunk * size, scratch.data);
  });
  for (int64_t chunk = 1; chunk < chunks; ++chunk)
    for (int64_t k = 0; k < size; ++k) partials[size_t(k)] += partials[size_t(chunk * size + k)];
  kernels.unpack_gradient(config, partials.data(), args.d_meta);
}

const char* kernel_name(const TileKernels& kernels) { return kernels.name; }

const TileKernels* find_kernels(const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (std::strcmp(name, "avx512") == 0)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                   __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx2") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")
               ? &kAvx512Kernels
               : nullptr;
  if (std::strcmp(name, "avx2") == 0)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &kAvx2Kernels
                                                                           : nullptr;
#endif
  return std::strcmp(name, "baseline") == 0 ? &kBaselineKernels : nullptr;
}

const TileKernels& best_kernels() {
  static const TileKernels& best = [&]() -> const TileKernels& {
    for (const char* name : {"avx512", "avx2"})
      if (const TileKernels* kernels = find_kernels(name)) return *kernels;
    return kBaselineKernels;
  }();
  return best;
}

}  // namespace fastl2o::cpu
