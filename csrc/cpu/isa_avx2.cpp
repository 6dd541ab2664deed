// AVX2 with FMA: 16 registers of 8 floats.
#include "tile_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC target("avx2,fma")
#define FASTL2O_ISA avx2
#define FASTL2O_TABLE kAvx2Kernels
#define FASTL2O_WIDTH 8
#define FASTL2O_STEP_VECTORS 3
#define FASTL2O_UNROLL_VECTORS 3
#define FASTL2O_SWEEP_VECTORS 2
#define FASTL2O_UNIT_BLOCK 1
#include "kernels.inl"
#endif
