// What a tensor of Python says of itself, without being taken: DLPack 1.3's exchange of types.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>

namespace vitfast {

// dlpack.h: DLTensor.
struct Tensor {
  void* data;
  int32_t device, device_id, ndim;
  uint8_t code, bits;
  uint16_t lanes;
  const int64_t *shape, *strides;
  uint64_t byte_offset;
};

// What there is to say of a tensor: shape and strides lie inside it. False after raising in Python,
// as for one without elements in memory of its own (sparse, nested, quantised).
bool describe(PyObject* tensor, Tensor& found);

}  // namespace vitfast
