#include "replay.h"

#include "arguments.h"
#include "common/scratch.h"
#include "module.h"

namespace py = pybind11;

namespace vitfast {

Replay::Replay(int64_t bytes, std::vector<int64_t> offsets)
    : bytes_(bytes), offsets_(std::move(offsets)) {
  for (const int64_t offset : offsets_) require(offset >= 0 && offset < bytes, "replay: offset");
}

void Replay::run(Bases bases) const {
  const common::Scratch scratch(bytes_);
  const auto own = reinterpret_cast<uintptr_t>(scratch.ptr);
  for (const int64_t offset : offsets_) bases.push_back(own + offset);
  for (const auto& call : calls_) call(bases);
}

py::class_<Replay> bind_replay(py::module_& m) {
  return py::class_<Replay>(m, "Replay")
      .def(py::init<int64_t, std::vector<int64_t>>(),
           "Bytes of its own, and where its own buffers lie there.")
      .def("run", &Replay::run, Release(), "All calls, on the addresses of the first buffers.");
}

}  // namespace vitfast
