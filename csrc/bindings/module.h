// What each file of this folder adds to the module. An op whose calls can be recorded adds them to
// Replay, too.
#pragma once
#include <pybind11/pybind11.h>

namespace vitfast {

class Replay;

void bind_address(pybind11::module_&);
void bind_module_state(pybind11::module_&);
void bind_name_state(pybind11::module_&);
void bind_places(pybind11::module_&);
void bind_tensor_state(pybind11::module_&);
void bind_unwatched(pybind11::module_&);

pybind11::class_<Replay> bind_replay(pybind11::module_&);
void bind_attention(pybind11::module_&, pybind11::class_<Replay>&);
void bind_dwconv(pybind11::module_&, pybind11::class_<Replay>&);
void bind_gemm(pybind11::module_&, pybind11::class_<Replay>&);
void bind_grn(pybind11::module_&, pybind11::class_<Replay>&);
void bind_group_norm(pybind11::module_&);
void bind_norm(pybind11::module_&, pybind11::class_<Replay>&);
void bind_patchify(pybind11::module_&);
void bind_window(pybind11::module_&, pybind11::class_<Replay>&);

}  // namespace vitfast
