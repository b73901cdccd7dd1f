// vitfast._native: this folder is all that knows pybind11 and Python, a file per op.
#include "module.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/huge_pages.h"
#include "cpu/isa.h"
#include "replay.h"

namespace py = pybind11;
using namespace vitfast;

namespace {

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = std::string("Clang ") + __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = std::string("GCC ") + __VERSION__;
#elif defined(_MSC_VER)
  info["compiler"] = "MSVC " + std::to_string(_MSC_VER);
#endif
#if defined(VITFAST_X86)
  info["isas"] = std::vector<std::string>{"baseline", "avx2", "avx512", "avx512_bf16"};
#else
  info["isas"] = std::vector<std::string>{"baseline"};
#endif
#if defined(_OPENMP)
  info["openmp"] = _OPENMP;
#else
  info["openmp"] = py::none();
#endif
  return info;
}

void bind_isa(py::module_& m) {
  m.def(
      "best_isa", [] { return static_cast<int>(best_isa()); },
      "Highest instruction set of this CPU and build, as an index into ISA_LEVELS.");
  m.def(
      "selected_isa", [] { return static_cast<int>(selected_isa()); },
      "Instruction set that kernels run with.");
  m.def(
      "select_isa",
      [](int level) {
        if (level < 0) throw std::invalid_argument("instruction set levels start at 0");
        select_isa(static_cast<Isa>(level));
      },
      py::arg("level"), "Lower the instruction set; ValueError above best_isa().");
  m.def("build_info", &build_info, "Compiler, instruction sets, OpenMP version, CUDA or not.");
}

void bind_pages(py::module_& m) {
  m.def(
      "ask_for_huge_pages",
      [](uintptr_t begin, int64_t bytes) {
        ask_for_huge_pages(reinterpret_cast<void*>(begin), bytes);
      },
      "See csrc/common/huge_pages.h.");
  m.def(
      "release_pages",
      [](uintptr_t begin, int64_t bytes) {
        release_pages(reinterpret_cast<void*>(begin), bytes);
      },
      "See csrc/common/huge_pages.h.");
}

}  // namespace

PYBIND11_MODULE(_native, m, py::mod_gil_not_used()) {
  m.doc() = "Native kernels of vitfast";
  bind_isa(m);
  bind_pages(m);
  bind_address(m);
  bind_name_state(m);
  bind_module_state(m);
  bind_places(m);
  bind_tensor_state(m);
  bind_unwatched(m);
  py::class_<Replay> replay = bind_replay(m);
  bind_attention(m, replay);
  bind_window(m, replay);
  bind_gemm(m, replay);
  bind_norm(m, replay);
  bind_grn(m, replay);
  bind_dwconv(m, replay);
  bind_group_norm(m);
  bind_patchify(m);
}
