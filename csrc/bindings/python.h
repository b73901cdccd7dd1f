// What the files that know Python share.
#pragma once
#include <pybind11/pybind11.h>

namespace vitfast {

// A new reference, of which nullptr says that Python has raised.
inline pybind11::object owned(PyObject* found) {
  if (found == nullptr) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::object>(found);
}

}  // namespace vitfast
