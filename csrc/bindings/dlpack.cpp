#include "dlpack.h"

#include <stdexcept>

#include "python.h"

namespace py = pybind11;

namespace vitfast {
namespace {

// dlpack.h: DLPackExchangeAPI.
struct Exchange {
  uint32_t major, minor;
  void* header;
  void* managed[3];
  int (*tensor)(PyObject*, Tensor*);
};

const Exchange& exchange(PyObject* t) {
  static const Exchange* found = nullptr;
  if (found == nullptr) {
    const auto type = reinterpret_cast<PyObject*>(Py_TYPE(t));
    const py::object capsule = owned(PyObject_GetAttrString(type, "__dlpack_c_exchange_api__"));
    const auto* const api =
        static_cast<const Exchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (api == nullptr) throw py::error_already_set();
    if (api->major != 1) throw std::runtime_error("vitfast knows DLPack's version 1 only");
    found = api;  // it lives as long as torch
  }
  return *found;
}

}  // namespace

bool describe(PyObject* tensor, Tensor& found) {
  return exchange(tensor).tensor(tensor, &found) == 0;
}

}  // namespace vitfast
