// Launches kernels on a stream until one fails.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

namespace fastl2o::cuda {

class Launcher {
 public:
  explicit Launcher(void* stream) : stream_(static_cast<cudaStream_t>(stream)) {
    int device = 0;
    note(cudaGetDevice(&device));
    if (ok())
      note(cudaDeviceGetAttribute(&multiprocessors_, cudaDevAttrMultiProcessorCount, device));
  }

  bool ok() const { return error_ == cudaSuccess; }
  void note(cudaError_t error) {
    if (ok()) error_ = error;
  }
  cudaError_t error() const { return error_; }
  cudaStream_t stream() const { return stream_; }

  // At most `blocks` a multiprocessor; 1 after an error, when no multiprocessors may be known.
  int grid(int64_t units, int blocks) const {
    return int(std::max<int64_t>(1, std::min(units, int64_t(blocks) * multiprocessors_)));
  }

  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t grid, int threads,
                  const Arguments&... arguments) {
    if (!ok()) return;
    kernel<<<unsigned(grid), threads, 0, stream_>>>(arguments...);
    note(cudaGetLastError());
  }

 private:
  cudaStream_t stream_;
  int multiprocessors_ = 0;
  cudaError_t error_ = cudaSuccess;
};

}  // namespace fastl2o::cuda
