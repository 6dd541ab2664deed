#include "nonfinite.h"

#include <algorithm>
#include <atomic>

namespace fastl2o::cpu {
namespace {

constexpr int64_t kScanChunk = 1 << 16;  // coordinates per unit of the scan

template <typename Word>
bool any_nonfinite(const void* values, int64_t begin, int64_t end, Word exponent) {
  const Word* words = static_cast<const Word*>(values);
  Word found = 0;
  for (int64_t i = begin; i < end; ++i) found |= Word((words[i] & exponent) == exponent);
  return found != 0;
}

bool any_nonfinite(const Gradient& grad, int64_t begin, int64_t end) {
  switch (grad.dtype) {
    case DType::f32: return any_nonfinite<uint32_t>(grad.values, begin, end, 0x7f800000u);
    case DType::f64: return any_nonfinite<uint64_t>(grad.values, begin, end, 0x7ff0000000000000ull);
    case DType::bf16: return any_nonfinite<uint16_t>(grad.values, begin, end, 0x7f80);
    case DType::f16: return any_nonfinite<uint16_t>(grad.values, begin, end, 0x7c00);
  }
  return false;
}

}  // namespace

size_t owner_of(const std::vector<int64_t>& starts, int64_t at) {
  return size_t(std::upper_bound(starts.begin(), starts.end(), at) - starts.begin()) - 1;
}

std::vector<bool> find_nonfinite(const std::vector<Gradient>& grads,
                                 const ParallelFor& parallel_for) {
  const std::vector<int64_t> starts = starts_of(grads);
  const int64_t total = starts.back();
  std::vector<std::atomic<bool>> found(grads.size());
  parallel_for((total + kScanChunk - 1) / kScanChunk, [&](int64_t begin, int64_t end) {
    int64_t at = begin * kScanChunk;
    const int64_t stop = std::min(end * kScanChunk, total);
    for (size_t i = owner_of(starts, at); at < stop; ++i) {
      const int64_t upto = std::min(starts[i + 1], stop);
      if (upto > at && any_nonfinite(grads[i], at - starts[i], upto - starts[i])) found[i] = true;
      at = std::max(at, upto);
    }
  });
  return {found.begin(), found.end()};
}

}  // namespace fastl2o::cpu
