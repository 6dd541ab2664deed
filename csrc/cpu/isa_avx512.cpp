// AVX-512 (F, DQ, BW, VL): 32 registers of 16 floats.
#include "tile_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

// GCC 12 takes the deliberately undefined operands in its own header for a mistake.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")
#define FASTL2O_ISA avx512
#define FASTL2O_TABLE kAvx512Kernels
#define FASTL2O_WIDTH 16
#define FASTL2O_STEP_VECTORS 3
#define FASTL2O_UNROLL_VECTORS 2
#define FASTL2O_SWEEP_VECTORS 3
#define FASTL2O_UNIT_BLOCK 2
#include "kernels.inl"
#endif
