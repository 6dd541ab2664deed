// Lists of tensors as the CPU ops take them, against the LibTorch stable ABI.
//
// A std::vector of torch::stable::Tensor costs a counted pointer for each tensor, copies of them
// where it is passed by value, and a search through all dtypes for each question about one: for a
// thousand small tensors as much time as a tenth of their step. A TensorList keeps torch's own list
// and asks each tensor once for all that is needed of it.
#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>

#include "python_lock.h"
#include "tensor_args.h"

namespace fastl2o {

// The dtypes of the kernels, in the numbers of the running torch.
inline DType dtype_of(int32_t type, const char* what) {
  static const int32_t types[] = {aoti_torch_dtype_float32(), aoti_torch_dtype_float64(),
                                  aoti_torch_dtype_bfloat16(), aoti_torch_dtype_float16()};
  if (type == types[0]) return DType::f32;
  if (type == types[1]) return DType::f64;
  if (type == types[2]) return DType::bf16;
  STD_TORCH_CHECK(type == types[3], what, " must be float32, float64, bfloat16 or float16");
  return DType::f16;
}

// What a list's tensor is. Valid as long as the list.
struct ListTensor {
  AtenTensorHandle handle;
  int32_t type;
  int64_t dim;
  int64_t* sizes;
  bool contiguous;

  explicit ListTensor(AtenTensorHandle of) : handle(of) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &type));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dim));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(handle, &contiguous));
  }

  int64_t numel() const {
    int64_t count = 1;
    for (int64_t d = 0; d < dim; ++d) count *= sizes[d];
    return count;
  }

  // As has_shape of two tensors.
  bool has_shape(const ListTensor& like, int64_t planes) const {
    const int64_t ahead = planes == 0 ? 0 : 1;
    if (dim != like.dim + ahead || (ahead == 1 && sizes[0] != planes)) return false;
    return std::equal(like.sizes, like.sizes + like.dim, sizes + ahead);
  }

  void* data() const {
    void* address = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(handle, &address));
    return address;
  }

  // Of one number of float32, or of several.
  float* floats(int64_t count, const char* name, size_t index) const {
    STD_TORCH_CHECK(dtype_of(type, name) == DType::f32 && contiguous && numel() == count, name, "[",
                    index, "] must be contiguous and hold ", count,
                    count == 1 ? " float32 number" : " float32 numbers");
    return static_cast<float*>(data());
  }
};

// Owns the list that the dispatcher made for one argument, and its handles.
class TensorList {
 public:
  explicit TensorList(StableListHandle list) : list_(list) {
    STABLE_TORCH_ERROR_CODE_CHECK(torch_list_size(list_, &size_));
  }
  TensorList(TensorList&& other) noexcept
      : list_(std::exchange(other.list_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  TensorList& operator=(TensorList&&) = delete;
  ~TensorList() {
    if (list_ == nullptr) return;
    std::optional<PythonLock> lock;
    if (size_ > 1) lock.emplace();
    for (size_t i = 0; i < size_; ++i) {
      StableIValue element;
      if (torch_list_get_item(list_, i, &element) == TORCH_SUCCESS)
        aoti_torch_delete_tensor_object(torch::stable::detail::to<AtenTensorHandle>(element));
    }
    torch_delete_list(list_);
  }

  size_t size() const { return size_; }
  ListTensor operator[](size_t index) const {
    StableIValue element;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_list_get_item(list_, index, &element));
    return ListTensor(torch::stable::detail::to<AtenTensorHandle>(element));
  }

 private:
  StableListHandle list_;
  size_t size_ = 0;
};

}  // namespace fastl2o

// How TORCH_BOX makes a TensorList of an argument.
template <>
struct torch::stable::detail::ToImpl<fastl2o::TensorList> {
  static fastl2o::TensorList call(StableIValue value, uint64_t, bool) {
    return fastl2o::TensorList(torch::stable::detail::to<StableListHandle>(value));
  }
};
