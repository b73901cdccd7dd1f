// Where a plan's tensors lie, looked at in each call of a list of launches. Floor: a call of Python
// for the storage of each tensor.
#include <utility>
#include <vector>

#include "address.h"
#include "module.h"
#include "place.h"

namespace py = pybind11;

namespace vitfast {
namespace {

class Places {
 public:
  explicit Places(const py::tuple& tensors) : facts_(facts(tensors)) {}

  py::object storages(const py::tuple& tensors) const {
    py::tuple found(tensors.size());  // taken first: of these the addresses are looked at
    for (size_t i = 0; i < tensors.size(); ++i)
      found[i] = storage_of(PyTuple_GET_ITEM(tensors.ptr(), i));
    if (facts(tensors) != facts_) return py::none();
    return std::move(found);
  }

 private:
  static std::vector<int64_t> facts(const py::tuple& tensors) {
    std::vector<int64_t> found;
    found.reserve(8 * tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i)
      Place(PyTuple_GET_ITEM(tensors.ptr(), i)).append_to(found);
    return found;
  }

  std::vector<int64_t> facts_;
};

}  // namespace

void bind_places(py::module_& m) {
  py::class_<Places>(m, "Places")
      .def(py::init<const py::tuple&>(),
           "Of dense tensors on any device: address, dtype, shape and strides; not what they hold.")
      .def("storages", &Places::storages, py::arg("tensors"),
           "The storages of these tensors where all of that is the same, else None. While they are "
           "kept, it holds, whatever another thread assigns to the tensors' `data`.");
}

}  // namespace vitfast
