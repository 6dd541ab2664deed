// The seam between the drivers (lstm.cpp) and the code compiled per instruction set.
#pragma once

#include <initializer_list>

#include "core.h"
#include "hierarchical_kernels.h"
#include "rounding.h"

namespace fastl2o::cpu {

// Consecutive coordinates of one tensor inside a tile.
struct Segment {
  const StepTensor* tensor;
  int64_t offset;  // first coordinate within the tensor
  int count;
  int lane;  // first lane within the tile
};

struct StepTile {
  const Segment* segments;
  int num_segments;
  const StepTensor* following;  // the tensor after the last segment's, or null
};

// Everything about one step call that all tiles share.
struct StepContext {
  RuleConfig config;
  StepOptions options;
  const float* meta;
  const float* packed;  // null for `step_own`
  float exp_p;          // e^p
};

struct UnrollContext {
  RuleConfig config;
  UnrollArgs args;
  const float* meta;
  const float* packed;
  float exp_p;
  int64_t segment_steps;  // steps recorded in full at a time; the rest is replayed from checkpoints
};

struct TileKernels {
  const char* name;
  int step_tile;    // coordinates per tile of the step
  int unroll_tile;  // coordinates per tile of the unroll backward
  // The meta-parameters in the order the kernels read them; `backward` adds the transposed ones.
  int64_t (*packed_floats)(const RuleConfig&, bool backward);
  void (*pack)(const RuleConfig&, bool backward, const float* meta, float* packed);
  void (*step)(const StepContext&, const StepTile&);
  // The same for a tile of one segment, stepped by meta-parameters that are not packed.
  void (*step_own)(const StepContext&, const StepTile&);
  // Floats of scratch that one call of `unroll` needs (64-byte aligned).
  int64_t (*unroll_scratch)(const UnrollContext&);
  // The gradient of the meta-parameters in the order in which `unroll` adds it up: its length, and
  // from there to (M,).
  int64_t (*gradient_sums)(const RuleConfig&);
  void (*unpack_gradient)(const RuleConfig&, const double* sums, float* d_meta);
  // Back-propagates tiles [first, last) of `unroll_tile` coordinates; adds to partial
  // (gradient_sums).
  void (*unroll)(const UnrollContext&, int64_t first, int64_t last, double* partial,
                 float* scratch);
  HierarchicalKernels hierarchical;
};

extern const TileKernels kBaselineKernels;
extern const TileKernels kAvx2Kernels;
extern const TileKernels kAvx512Kernels;

}  // namespace fastl2o::cpu
