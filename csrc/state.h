// Whether modules, names and tensors of Python are still what they were: what was found out about
// them once holds as long. And whether anyone watches.
#pragma once
#include <pybind11/pybind11.h>

namespace vitfast {

void bind_module_state(pybind11::module_&);
void bind_name_state(pybind11::module_&);
void bind_tensor_state(pybind11::module_&);
void bind_unwatched(pybind11::module_&);

}  // namespace vitfast
