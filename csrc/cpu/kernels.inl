// One instruction set's kernels, assembled. A file isa_<name>.cpp selects the target, defines
// FASTL2O_ISA (namespace and name), FASTL2O_WIDTH and the tile shape, and includes this.

namespace fastl2o::cpu::FASTL2O_ISA {

// Vectors per tile and hidden units per block of the inner product, chosen by measurement
// (kernels/lstm/README.md): their product times four accumulators must fit the register file.
inline constexpr int kStepVectors = FASTL2O_STEP_VECTORS;
inline constexpr int kUnrollVectors = FASTL2O_UNROLL_VECTORS;
inline constexpr int kUnitBlock = FASTL2O_UNIT_BLOCK;
inline constexpr int kSweepVectors = FASTL2O_SWEEP_VECTORS;

// In the order of use: each builds on those above it.
// clang-format off
#include "simd.inl"
#include "math.inl"
#include "forward.inl"
#include "in_place.inl"
#include "step.inl"
#include "backward.inl"
#include "weight_gradient.inl"
#include "unroll.inl"
#include "hierarchical_math.inl"
#include "hierarchical_levels.inl"
#include "hierarchical_products.inl"
#include "hierarchical_sweep.inl"
#include "hierarchical_panel.inl"
#include "hierarchical_backward.inl"
// clang-format on

static int64_t packed_floats(const RuleConfig& config, bool backward) {
  return packed_forward_floats(config) * (backward ? 2 : 1);
}

static void pack(const RuleConfig& config, bool backward, const float* meta, float* packed) {
  pack_forward(config, meta, packed);
  if (backward) pack_backward(config, meta, packed + packed_forward_floats(config));
}

}  // namespace fastl2o::cpu::FASTL2O_ISA

namespace fastl2o::cpu {

#define FASTL2O_STRING(x) #x
#define FASTL2O_NAME(x) FASTL2O_STRING(x)

extern const TileKernels FASTL2O_TABLE = {
    FASTL2O_NAME(FASTL2O_ISA),
    FASTL2O_ISA::kLanes<FASTL2O_ISA::kStepVectors>,
    FASTL2O_ISA::kLanes<FASTL2O_ISA::kUnrollVectors>,
    FASTL2O_ISA::packed_floats,
    FASTL2O_ISA::pack,
    FASTL2O_ISA::step_tile<FASTL2O_ISA::kStepVectors, true>,
    FASTL2O_ISA::step_own_tile<>,
    FASTL2O_ISA::unroll_scratch,
    FASTL2O_ISA::gradient_sums,
    FASTL2O_ISA::unpack_gradient,
    FASTL2O_ISA::unroll_tiles,
    {FASTL2O_ISA::kWidth, FASTL2O_ISA::sweep_block, FASTL2O_ISA::apply_block,
     FASTL2O_ISA::level_affine, FASTL2O_ISA::level_gru, FASTL2O_ISA::backward_scratch,
     FASTL2O_ISA::backward_block},
};

}  // namespace fastl2o::cpu
