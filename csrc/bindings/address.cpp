#include "address.h"

#include "module.h"
#include "python.h"

namespace py = pybind11;

namespace vitfast {
namespace {

py::object called(PyObject* tensor, const py::str& method) {
  return owned(PyObject_CallMethodObjArgs(tensor, method.ptr(), nullptr));
}

// A number to whoever asks for one. While it lives, so does what lies there: another thread may
// assign to the tensor's `data` while a kernel runs without the GIL.
struct Address {
  PyObject_HEAD
  PyObject* number;
  PyObject* storage;
};

void release(PyObject* self) {
  auto* const address = reinterpret_cast<Address*>(self);
  Py_XDECREF(address->number);
  Py_XDECREF(address->storage);
  PyTypeObject* const type = Py_TYPE(self);
  PyObject_Free(self);
  Py_DECREF(type);
}

PyObject* number(PyObject* self) { return Py_NewRef(reinterpret_cast<Address*>(self)->number); }

PyTypeObject* address_type() {
  static PyTypeObject* const type = [] {
    static PyType_Slot slots[] = {{Py_tp_dealloc, reinterpret_cast<void*>(release)},
                                  {Py_nb_index, reinterpret_cast<void*>(number)},
                                  {Py_nb_int, reinterpret_cast<void*>(number)},
                                  {0, nullptr}};
    static PyType_Spec spec = {"vitfast._native.Address", sizeof(Address), 0,
                               Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots};
    return reinterpret_cast<PyTypeObject*>(owned(PyType_FromSpec(&spec)).release().ptr());
  }();
  return type;
}

PyObject* address(PyObject*, PyObject* tensor) {
  if (tensor == Py_None) return PyLong_FromLong(0);
  try {
    static const auto* const data_ptr = new py::str("data_ptr");  // outlives the interpreter
    py::object storage = storage_of(tensor);
    py::object found = called(tensor, *data_ptr);
    auto* const made = PyObject_New(Address, address_type());
    if (made == nullptr) return nullptr;
    made->number = found.release().ptr();
    made->storage = storage.release().ptr();
    return reinterpret_cast<PyObject*>(made);
  } catch (py::error_already_set& error) {
    error.restore();
    return nullptr;
  }
}

}  // namespace

py::object storage_of(PyObject* tensor) {
  static const auto* const name = new py::str("untyped_storage");  // outlives the interpreter
  return called(tensor, *name);
}

void bind_address(py::module_& m) {
  // Called for each tensor of each kernel: not by way of pybind11, which takes as long again.
  static PyMethodDef method = {
      "address", address, METH_O,
      "Where a tensor's elements begin, as an object with `__index__` that "
      "keeps its storage; 0 for None."};
  m.add_object("address", owned(PyCFunction_New(&method, nullptr)));
  m.attr("Address") =
      py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(address_type()));
}

}  // namespace vitfast
