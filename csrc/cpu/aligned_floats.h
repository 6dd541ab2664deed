// Scratch memory of the drivers.
#pragma once

#include <cstdint>
#include <memory>

namespace fastl2o::cpu {

// Uninitialised, from a cache line's start.
struct AlignedFloats {
  std::unique_ptr<float[]> storage;
  float* data;

  explicit AlignedFloats(int64_t count) : storage(new float[size_t(count) + 16]) {
    const auto address = reinterpret_cast<uintptr_t>(storage.get());
    data = storage.get() + ((64 - address % 64) % 64) / sizeof(float);
  }
};

}  // namespace fastl2o::cpu
