// Floor: one cache miss a line of what is asked and looked at, some forty in all.
#include <exception>
#include <tuple>
#include <utility>
#include <vector>

#include "dlpack.h"
#include "lines.h"
#include "module.h"
#include "python.h"

namespace py = pybind11;

namespace vitfast {
namespace {

// What decides whether a layer may leave timm's forward, whatever its children are.
class Unwatched {
 public:
  // See bind_unwatched.
  Unwatched(const py::tuple& types, py::object is_negated, const py::tuple& questions,
            const py::tuple& empty, const py::tuple& values)
      : is_negated_(std::move(is_negated)) {
    for (const py::handle type : types) types_.push_back(py::reinterpret_borrow<py::object>(type));
    for (const py::handle one : questions)
      questions_.push_back(py::reinterpret_borrow<py::object>(one));
    for (const py::handle one : empty) empty_.push_back(py::cast<py::dict>(one));
    for (const py::handle one : values) values_.push_back(py::cast<Value>(one));
    lines_.add(types_.data(), 8 * static_cast<int64_t>(types_.size()));
    lines_.add(questions_.data(), 8 * static_cast<int64_t>(questions_.size()));
    lines_.add(values_.data(), static_cast<int64_t>(sizeof(Value) * values_.size()));
    for (const py::object& one : questions_) lines_.add(one.ptr(), 64);
    for (const py::dict& one : empty_) lines_.add(one.ptr(), sizeof(PyDictObject));
    for (const Value& one : values_) {
      lines_.add(std::get<0>(one).ptr(), sizeof(PyDictObject));
      lines_.add(std::get<1>(one).ptr(), sizeof(PyASCIIObject));
    }
  }

  bool holds(PyObject* const* inputs, Py_ssize_t count) const {
    lines_.fetch();
    for (const py::dict& one : empty_)
      if (PyDict_Size(one.ptr()) != 0) return false;
    for (const auto& [dict, name, value] : values_)
      if (PyDict_GetItemWithError(dict.ptr(), name.ptr()) != value.ptr()) return false;
    for (const py::object& one : questions_)
      if (!is_no(owned(PyObject_CallNoArgs(one.ptr())).ptr())) return false;
    for (Py_ssize_t i = 0; i < count; ++i)
      if (inputs[i] != Py_None && !is_plain(inputs[i])) return false;
    return true;
  }

 private:
  using Value = std::tuple<py::dict, py::object, py::object>;

  static bool is_no(PyObject* answer) {
    const int said = answer == Py_None ? 0 : PyObject_IsTrue(answer);
    if (said < 0) throw py::error_already_set();
    return said == 0;
  }

  // As runtime.native.is_readable says of tensors on the CPU; what it does not know is not plain.
  bool is_plain(PyObject* input) const {
    bool known = false;
    for (const py::object& type : types_)
      known = known || type.ptr() == reinterpret_cast<PyObject*>(Py_TYPE(input));
    if (!known) return false;
    Tensor t{};
    if (!describe(input, t)) {
      PyErr_Clear();
      return false;
    }
    constexpr int32_t kCpu = 1;
    if (t.device != kCpu || t.data == nullptr || t.lanes != 1 || !is_number(t.code, t.bits))
      return false;
    return is_no(owned(PyObject_CallOneArg(is_negated_.ptr(), input)).ptr());
  }

  static bool is_number(uint8_t code, uint8_t bits) {
    switch (code) {
      case 0:  // signed integers
        return true;
      case 1:  // unsigned ones
      case 6:  // bool
        return bits == 8;
      case 2:  // floating point
        return bits >= 16;
      case 4:  // bfloat
        return bits == 16;
      default: return false;
    }
  }

  std::vector<py::object> types_, questions_;
  py::object is_negated_;
  std::vector<py::dict> empty_;
  std::vector<Value> values_;
  Lines lines_;
};

PyObject* unwatched(PyObject* self, PyObject* const* inputs, Py_ssize_t count) {
  try {
    const auto* const asked = static_cast<const Unwatched*>(PyCapsule_GetPointer(self, nullptr));
    return PyBool_FromLong(asked->holds(inputs, count));
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

}  // namespace

void bind_unwatched(py::module_& m) {
  m.def(
      "unwatched",
      [](const py::tuple& types, const py::object& is_negated, const py::tuple& questions,
         const py::tuple& empty, const py::tuple& values) {
        // Called for each block: not by way of pybind11.
        static PyMethodDef method = {
            "unwatched", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(unwatched)),
            METH_FASTCALL,
            "Whether nobody watches, and these inputs are plain tensors on the CPU, or None."};
        const py::capsule self(new Unwatched(types, is_negated, questions, empty, values),
                               [](void* made) { delete static_cast<Unwatched*>(made); });
        return owned(PyCFunction_New(&method, self.ptr()));
      },
      "A function of inputs: whether all functions among `questions` answer no, all dictionaries in "
      "`empty` are so, each (dictionary, name, value) in `values` holds, and every input is None or a "
      "tensor of exactly one of these types, on the CPU, whose elements lie at its address as they are "
      "and of which is_negated says no. False is but a maybe.");
}

}  // namespace vitfast
