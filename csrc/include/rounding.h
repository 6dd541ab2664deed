// Stochastic rounding of float32 to bfloat16: the random bits are a hash of the place of a value,
// so every backend draws the same. fastl2o/_rounding.py states the same in Python.
#pragma once

#include <cstdint>

#include "both.h"

namespace fastl2o {

// A bijection of 32-bit words whose every output bit depends on every input bit: two rounds of xor,
// shift and multiply with the constants "lowbias32" of C. Wellons' search for good ones.
FASTL2O_BOTH uint32_t mix_bits(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

// Of a tensor, by its place in the list of a step with this seed.
FASTL2O_BOTH uint32_t rounding_key(uint64_t seed, uint32_t tensor) {
  return mix_bits(mix_bits(uint32_t(seed) + tensor) ^ uint32_t(seed >> 32));
}

// Of a coordinate of the tensor.
FASTL2O_BOTH uint32_t rounding_base(uint32_t key, int64_t coordinate) {
  return mix_bits(mix_bits(uint32_t(coordinate) ^ key) + uint32_t(uint64_t(coordinate) >> 32));
}

// 32 bits for two values of the coordinate: the lower 16 for h or the first moment, the upper ones
// for c or the second. Pair layer * hidden_size + unit; after the last of these, the moments. Of
// the hierarchical rule's state each plane is a pair of its own, of which the lower half is used:
// its h is computed unit by unit.
FASTL2O_BOTH uint32_t rounding_bits(uint32_t base, uint32_t pair) {
  return mix_bits(base ^ (pair + 1) * 0x9e3779b9u);
}

// Whether float32 `bits` are those of a finite number; others are rounded as ever.
FASTL2O_BOTH bool is_finite_bits(uint32_t bits) { return (bits & 0x7f800000u) != 0x7f800000u; }

// The bfloat16 above or below a finite float32, in proportion to its distance from either, from the
// lower 16 bits of `random`.
FASTL2O_BOTH uint16_t round_finite(uint32_t bits, uint32_t random) {
  return uint16_t((bits + (random & 0xffffu)) >> 16);
}

}  // namespace fastl2o
