// What every processor of the architecture has: vectors of four floats, no fused multiply-add on
// x86.
#include "tile_kernels.h"

#define FASTL2O_ISA baseline
#define FASTL2O_TABLE kBaselineKernels
#define FASTL2O_WIDTH 4
#define FASTL2O_STEP_VECTORS 2
#define FASTL2O_UNROLL_VECTORS 2
#define FASTL2O_SWEEP_VECTORS 2
#define FASTL2O_UNIT_BLOCK 1
#include "kernels.inl"
