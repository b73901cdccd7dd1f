// Floor: one cache miss for each class, and two for each name of a module.
#include "name_state.h"

#include <pybind11/stl.h>

#include <cstdint>

#include "module.h"
#include "python.h"

namespace py = pybind11;

namespace vitfast {
namespace {

// Changes with any attribute of a class or of its bases. A metaclass might add its own.
unsigned tag_of(PyObject* owner) {
  if (Py_TYPE(owner) != &PyType_Type) return 0;
  return reinterpret_cast<PyTypeObject*>(owner)->tp_version_tag;
}

// The object itself, or one that is equal: a class makes a method of it anew each time it is asked.
bool are_equal(PyObject* a, PyObject* b) {
  const int equal = PyObject_RichCompareBool(a, b, Py_EQ);
  if (equal < 0) throw py::error_already_set();
  return equal != 0;
}

// The position for PyDict_Next of the entry of a name; -1 for none.
Py_ssize_t position_of(PyObject* dict, PyObject* name) {
  PyObject *key, *value;
  for (Py_ssize_t next = 0, at = 0; PyDict_Next(dict, &next, &key, &value); at = next)
    if (key == name) return at;
  return -1;
}

}  // namespace

NameState::NameState(const std::vector<std::pair<py::object, std::vector<py::str>>>& places) {
  for (const auto& [owner, names] : places) {
    Owner one{owner, {}, {}, 0};
    if (PyModule_Check(owner.ptr()))
      one.dict = py::reinterpret_borrow<py::object>(PyModule_GetDict(owner.ptr()));
    for (const py::str& name : names) {
      PyObject* interned = py::object(name).release().ptr();
      PyUnicode_InternInPlace(&interned);
      py::object key = py::reinterpret_steal<py::object>(interned);
      py::object value = owned(PyObject_GetAttr(owner.ptr(), interned));
      const Py_ssize_t position = one.dict ? position_of(one.dict.ptr(), interned) : -1;
      one.names.push_back({std::move(key), std::move(value), position});
    }
    one.tag = tag_of(owner.ptr());  // known once names were looked up
    owners_.push_back(std::move(one));
  }
  lines_.add(owners_.data(), static_cast<int64_t>(sizeof(Owner) * owners_.size()));
  for (const Owner& one : owners_) {
    if (!one.dict) {
      if (one.tag != 0)
        lines_.add(&reinterpret_cast<PyTypeObject*>(one.owner.ptr())->tp_version_tag,
                   sizeof(unsigned));
      continue;
    }
    lines_.add(one.names.data(), static_cast<int64_t>(sizeof(Name) * one.names.size()));
    const auto* const head = reinterpret_cast<const PyDictObject*>(one.dict.ptr());
    lines_.add(head, sizeof *head);
    lines_.add(head->ma_keys, 64);
  }
}

bool NameState::same() {
  for (Owner& one : owners_)
    if (!is_same(one)) return false;
  return !cleared_;
}

bool NameState::is_same(Owner& one) {
  if (one.tag != 0 && one.tag == tag_of(one.owner.ptr())) return true;
  for (Name& name : one.names) {
    if (name.position >= 0) {
      PyObject *key, *value;
      Py_ssize_t next = name.position;
      if (PyDict_Next(one.dict.ptr(), &next, &key, &value) && key == name.name.ptr() &&
          value == name.value.ptr())
        continue;
    }
    PyObject* const found = PyObject_GetAttr(one.owner.ptr(), name.name.ptr());
    if (found == nullptr) {
      if (!PyErr_ExceptionMatches(PyExc_AttributeError)) throw py::error_already_set();
      PyErr_Clear();
      return false;
    }
    if (!are_equal(owned(found).ptr(), name.value.ptr())) return false;
    if (one.dict) name.position = position_of(one.dict.ptr(), name.name.ptr());
  }
  one.tag = tag_of(one.owner.ptr());
  return true;
}

int NameState::visit(const Visitor& visitor) const {
  int rc = 0;
  for (const Owner& one : owners_) {
    if (rc == 0) rc = visitor(one.owner);
    if (rc == 0) rc = visitor(one.dict);
    for (const Name& name : one.names) {
      if (rc == 0) rc = visitor(name.name);
      if (rc == 0) rc = visitor(name.value);
    }
  }
  return rc;
}

void NameState::clear() {
  cleared_ = true;
  const std::vector<Owner> gone = std::move(owners_);
  owners_.clear();
}

void bind_name_state(py::module_& m) {
  py::class_<NameState>(m, "NameState", collectable<NameState>())
      .def(
          py::init<const std::vector<std::pair<py::object, std::vector<py::str>>>&>(),
          "Of owners, classes and modules, each with names of its attributes: what they stand for.")
      .def("same", &NameState::same, "Whether each name still stands for what it did.");
}

}  // namespace vitfast
