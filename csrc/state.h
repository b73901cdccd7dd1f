// Whether modules and tensors of Python are still what they were: what was found out about them once
// holds as long. With bindings.cpp the only code here that knows Python.
#pragma once
#include <pybind11/pybind11.h>

namespace vitfast {

void bind_state(pybind11::module_&);

}  // namespace vitfast
