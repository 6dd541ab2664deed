// What the CUDA ops of every family make of their arguments, against the LibTorch stable ABI.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <optional>
#include <string>
#include <vector>

#include "tensor_args.h"

namespace fastl2o::cuda {

inline constexpr int kLeastCapability = 75;  // ten times 7.5
inline constexpr int kRaise = 2;

inline std::string place(const char* name, int64_t index) {
  return index < 0 ? name : std::string(name) + "[" + std::to_string(index) + "]";
}

// Makes the device of a call current, and holds what its launches need.
class Call {
 public:
  // `unsupported`: sizes of the rule for which there are no kernels, "" where there are. `total`:
  // the number of its meta-parameters.
  Call(const Tensor& meta, const std::string& unsupported, int64_t total)
      : device_(checked_device(meta)), guard_(device_) {
    STD_TORCH_CHECK(unsupported.empty(), "no CUDA kernels for ", unsupported,
                    "; use the Triton or the reference backend");
    int major = 0, minor = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device_));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device_));
    STD_TORCH_CHECK(10 * major + minor >= kLeastCapability,
                    "the CUDA kernels need compute capability 7.5, device ", device_, " has ",
                    major, ".", minor, "; use the Triton backend");
    check(meta, ScalarType::Float, "meta");
    STD_TORCH_CHECK(meta.numel() == total, "meta holds ", meta.numel(), " numbers; this rule has ",
                    total, " meta-parameters");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream_));
  }

  void* stream() const { return stream_; }

  // `index` is the tensor's place in its list, -1 outside of lists.
  void check(const Tensor& tensor, ScalarType type, const char* name, int64_t index = -1) const {
    STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == device_, place(name, index),
                    " must be on CUDA device ", device_, " like meta; move it");
    STD_TORCH_CHECK(tensor.scalar_type() == type && tensor.is_contiguous(), place(name, index),
                    " must be contiguous and have the dtype that the op takes: float32, or in a "
                    "list that of its first tensor; convert it, or use the reference backend");
  }

  Tensor scratch(int64_t count, ScalarType type) const {
    return torch::stable::empty(
        {count}, type, std::nullopt,
        torch::stable::Device(torch::headeronly::DeviceType::CUDA, device_));
  }

  void done(int status) const { STD_CUDA_CHECK(cudaError_t(status)); }

 private:
  static int32_t checked_device(const Tensor& meta) {
    STD_TORCH_CHECK(meta.is_cuda(), "meta must be on a CUDA device; move it");
    return meta.get_device_index();
  }

  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

inline const float* device_scalar(const Call& call, const std::optional<Tensor>& tensor,
                                  const char* name) {
  if (!tensor.has_value()) return nullptr;
  call.check(*tensor, ScalarType::Float, name);
  STD_TORCH_CHECK(tensor->numel() == 1, name, " holds ", tensor->numel(), " numbers; expected 1");
  return floats(*tensor);
}

// The first tensor whose flag is set, or -1. Waits for the stream: only nonfinite = 2 asks.
inline int64_t first_flagged(const Call& call, const int* flags, int64_t count) {
  const auto stream = static_cast<cudaStream_t>(call.stream());
  std::vector<int> host(size_t(count) + 1);
  STD_CUDA_CHECK(cudaMemcpyAsync(host.data(), flags, host.size() * sizeof(int),
                                 cudaMemcpyDeviceToHost, stream));
  STD_CUDA_CHECK(cudaStreamSynchronize(stream));
  if (host.back() == 0) return -1;
  for (int64_t i = 0; i < count; ++i)
    if (host[size_t(i)] != 0) return i;
  return -1;
}

// `flags` as in StepOptions::nonfinite_flags. Waits for the stream.
inline void check_finite(const Call& call, const int* flags, int64_t count) {
  const int64_t bad = first_flagged(call, flags, count);
  STD_TORCH_CHECK(bad < 0, "gradient ", bad,
                  " of the list holds NaN or Inf; nothing was changed. Mend the loss, or choose "
                  "nonfinite='skip' (leave such tensors alone) or 'pass' (feed them to the rule)");
}

}  // namespace fastl2o::cuda
