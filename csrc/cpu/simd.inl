// Vectors of FASTL2O_WIDTH floats with the few operations the cell maths needs. Included inside the
// namespace of one instruction set, after its target pragma.

#define FASTL2O_INLINE inline __attribute__((always_inline))

inline constexpr int kWidth = FASTL2O_WIDTH;

typedef float Vec __attribute__((vector_size(4 * FASTL2O_WIDTH), may_alias));
typedef unsigned UVec __attribute__((vector_size(4 * FASTL2O_WIDTH), may_alias));
typedef int IVec __attribute__((vector_size(4 * FASTL2O_WIDTH), may_alias));
typedef float UnalignedVec __attribute__((vector_size(4 * FASTL2O_WIDTH), aligned(4), may_alias));

FASTL2O_INLINE Vec splat(float x) { return x - Vec{}; }
FASTL2O_INLINE IVec isplat(int x) { return x - IVec{}; }
FASTL2O_INLINE Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
FASTL2O_INLINE void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }
FASTL2O_INLINE IVec bits(Vec v) { return reinterpret_cast<IVec>(v); }
FASTL2O_INLINE Vec from_bits(IVec v) { return reinterpret_cast<Vec>(v); }
FASTL2O_INLINE Vec absolute(Vec x) { return from_bits(bits(x) & 0x7fffffff); }
// minimum and maximum return b when either operand is NaN, so a NaN in b survives a clamp against
// a.

#if FASTL2O_WIDTH == 16

FASTL2O_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
FASTL2O_INLINE Vec square_root(Vec x) { return (Vec)_mm512_sqrt_ps((__m512)x); }
FASTL2O_INLINE Vec minimum(Vec a, Vec b) { return (Vec)_mm512_min_ps((__m512)a, (__m512)b); }
FASTL2O_INLINE Vec maximum(Vec a, Vec b) { return (Vec)_mm512_max_ps((__m512)a, (__m512)b); }
// x = n + r with n whole and |r| <= 1/2.
FASTL2O_INLINE void split(Vec x, Vec& n, Vec& r) {
  r = (Vec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  n = x - r;
}
// x - floor(x), and p * 2^floor(x): scalef takes the floor of its second operand by itself.
FASTL2O_INLINE Vec above_floor(Vec x) {
  return (Vec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}
FASTL2O_INLINE Vec scale_by_floor(Vec p, Vec x, Vec) {
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)x);
}
FASTL2O_INLINE Vec scale_by_power(Vec x, Vec n) {
  return (Vec)_mm512_scalef_ps((__m512)x, (__m512)n);
}
// x held to |x| <= bound, NaN included: that becomes the bound, with its sign.
FASTL2O_INLINE Vec clamp_magnitude(Vec x, float bound) {
  constexpr int smaller_magnitude = 2, sign_of_first = 0 << 2;
  return (Vec)_mm512_range_ps((__m512)x, _mm512_set1_ps(bound), smaller_magnitude | sign_of_first);
}
// x less its whole part, with the sign of x; NaN for NaN.
FASTL2O_INLINE Vec fraction(Vec x) {
  return (Vec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
}
// table[n mod 32] for the whole part n of x.
FASTL2O_INLINE Vec look_up(const float (&table)[32], Vec x) {
  const __m512i index = _mm512_cvttps_epi32((__m512)x);
  return (Vec)_mm512_permutex2var_ps(_mm512_loadu_ps(table), index, _mm512_loadu_ps(table + 16));
}
// One Newton step on the 14-bit estimate: within 1 ulp or so for 1 <= x < 2^126.
FASTL2O_INLINE Vec reciprocal(Vec x) {
  const Vec r = (Vec)_mm512_rcp14_ps((__m512)x);
  const Vec error = (Vec)_mm512_fnmadd_ps((__m512)x, (__m512)r, _mm512_set1_ps(1.0f));
  return fma(error, r, r);
}
// The same for 1 / sqrt(x) and 2^-126 <= x < infinity.
FASTL2O_INLINE Vec reciprocal_root(Vec x) {
  const Vec r = (Vec)_mm512_rsqrt14_ps((__m512)x);
  const Vec error = (Vec)_mm512_fnmadd_ps((__m512)(x * r), (__m512)r, _mm512_set1_ps(1.0f));
  return fma(error, r * 0.5f, r);
}
FASTL2O_INLINE Vec load_some(const float* p, int count) {
  return (Vec)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), p);
}
FASTL2O_INLINE void store_some(float* p, int count, Vec v) {
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << count) - 1), (__m512)v);
}

#else

#if FASTL2O_WIDTH == 8
FASTL2O_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
FASTL2O_INLINE Vec square_root(Vec x) { return (Vec)_mm256_sqrt_ps((__m256)x); }
FASTL2O_INLINE Vec minimum(Vec a, Vec b) { return (Vec)_mm256_min_ps((__m256)a, (__m256)b); }
FASTL2O_INLINE Vec maximum(Vec a, Vec b) { return (Vec)_mm256_max_ps((__m256)a, (__m256)b); }
#else
FASTL2O_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
FASTL2O_INLINE Vec minimum(Vec a, Vec b) { return a < b ? a : b; }
FASTL2O_INLINE Vec maximum(Vec a, Vec b) { return a > b ? a : b; }
FASTL2O_INLINE Vec square_root(Vec x) {
  for (int lane = 0; lane < kWidth; ++lane) x[lane] = __builtin_sqrtf(x[lane]);
  return x;
}
#endif

FASTL2O_INLINE void split(Vec x, Vec& n, Vec& r) {
  // Adding 1.5 * 2^23 leaves no fraction bits: round to nearest even, for |x| < 2^22.
  const float magic = 12582912.0f;
  n = (x + magic) - magic;
  r = x - n;
}
// For whole n in [-126, 127]: adds to the exponent field through an exact power of two.
FASTL2O_INLINE Vec scale_by_power(Vec x, Vec n) {
  const IVec exponent = __builtin_convertvector(n, IVec) + 127;
  return x * from_bits(exponent << 23);
}
// x less its floor; an exact tie may give 1 instead of 0, which the polynomial covers too.
FASTL2O_INLINE Vec above_floor(Vec x) {
  const float magic = 12582912.0f;
  return x - (((x - 0.5f) + magic) - magic);
}
FASTL2O_INLINE Vec scale_by_floor(Vec p, Vec x, Vec above) { return scale_by_power(p, x - above); }
FASTL2O_INLINE Vec reciprocal(Vec x) { return 1.0f / x; }
FASTL2O_INLINE Vec reciprocal_root(Vec x) { return 1.0f / square_root(x); }
FASTL2O_INLINE Vec load_some(const float* p, int count) {
  Vec v{};
  for (int lane = 0; lane < count; ++lane) v[lane] = p[lane];
  return v;
}
FASTL2O_INLINE void store_some(float* p, int count, Vec v) {
  for (int lane = 0; lane < count; ++lane) p[lane] = v[lane];
}

#endif

// Touches the planes of a later tile while this one computes: eighty streams are more than the
// hardware prefetcher follows. A cache line at a time, spread over the rows of the inner product,
// because lines on their way occupy the buffers that the weights come through too.
struct Prefetch {
  uintptr_t base = 0;  // of the present plane
  int64_t plane_bytes = 0;
  int bytes = 0;  // wanted of each plane
  int planes = 0;
  int lines_per_block = 0;
  int byte = 0;
  int lines_left = 0;  // in this block of units

  // All planes over this many blocks of units.
  FASTL2O_INLINE void spread(int blocks) {
    lines_per_block = ((bytes + 63) / 64 * planes + blocks - 1) / blocks;
  }
  FASTL2O_INLINE void start_block() { lines_left = planes > 0 ? lines_per_block : 0; }
  FASTL2O_INLINE void advance() {
    if (lines_left == 0) return;
    --lines_left;
    __builtin_prefetch(reinterpret_cast<const void*>(base + uintptr_t(byte)), 1, 2);
    byte += 64;
    if (byte < bytes) return;
    byte = 0;
    base += uintptr_t(plane_bytes);
    if (--planes == 0) lines_left = 0;
  }
  // What a block of few rows left over.
  FASTL2O_INLINE void finish_block() {
    while (lines_left > 0) advance();
  }
};

struct NoPrefetch {
  FASTL2O_INLINE void start_block() {}
  FASTL2O_INLINE void advance() {}
  FASTL2O_INLINE void finish_block() {}
};

// Denormals cost a hundred cycles each, and gradients of saturated networks are full of them. What
// is flushed is below 1.2e-38. Restores the thread's own setting at the end of the scope.
class FlushDenormals {
#if defined(__x86_64__)
 public:
  FlushDenormals() : saved_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(saved_ | 0x8040); }
  ~FlushDenormals() { __builtin_ia32_ldmxcsr(saved_); }

 private:
  unsigned saved_;
#else
 public:
  FlushDenormals() {}
  ~FlushDenormals() {}
#endif
};
