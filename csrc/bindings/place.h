// All that a kernel is told of a tensor: address, device, dtype, sizes and strides.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "dlpack.h"

namespace vitfast {

class Place {
 public:
  explicit Place(PyObject* tensor) {
    if (!describe(tensor, tensor_)) throw pybind11::error_already_set();
  }

  int64_t head() const { return reinterpret_cast<int64_t>(tensor_.data) + tensor_.byte_offset; }
  const int64_t* shape() const { return tensor_.shape; }

  // Of what is appended.
  size_t size() const { return 3 + (tensor_.strides ? 2 : 1) * size_t(tensor_.ndim); }

  void append_to(std::vector<int64_t>& facts) const {
    facts.insert(facts.end(), {head(), kind(), tensor_.ndim});
    facts.insert(facts.end(), tensor_.shape, tensor_.shape + tensor_.ndim);
    if (tensor_.strides) facts.insert(facts.end(), tensor_.strides, tensor_.strides + tensor_.ndim);
  }

 private:
  int64_t kind() const {
    return int64_t{tensor_.device} << 40 | int64_t{tensor_.device_id} << 32 | tensor_.lanes << 16 |
           tensor_.code << 8 | tensor_.bits;
  }

  Tensor tensor_{};
};

}  // namespace vitfast
