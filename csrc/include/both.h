// Marks functions that host and device share.
#pragma once

#if defined(__CUDACC__)
#define FASTL2O_BOTH __host__ __device__ __forceinline__
#else
#define FASTL2O_BOTH static inline
#endif
