// Addresses of tensors as kernels take them from Python.
#pragma once
#include <pybind11/pybind11.h>

namespace vitfast {

// The storage of a tensor: its own object, whatever the tensor comes to hold later.
pybind11::object storage_of(PyObject* tensor);

}  // namespace vitfast
