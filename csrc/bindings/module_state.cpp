// Floor: one cache miss a line of the modules' dictionaries, some twenty a module, as many of them
// at a time as the core can track: by the time a block runs again, its modules and those of all
// others have passed through the caches.
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "collectable.h"
#include "lines.h"
#include "module.h"
#include "name_state.h"
#include "python.h"

namespace py = pybind11;

namespace vitfast {
namespace {

bool is_tensor(PyObject* object) {
  static PyObject* const type =
      py::object(py::module_::import("torch").attr("Tensor")).release().ptr();
  return PyType_IsSubtype(Py_TYPE(object), reinterpret_cast<PyTypeObject*>(type)) != 0;
}

// An object, known again by its identity without being kept alive where it allows that. A tensor is
// kept, since torch.utils.swap_tensors refuses one with a weak reference, and known by its class as
// well, which that exchanges.
class Identity {
 public:
  explicit Identity(PyObject* object) : object_(object) {
    const auto type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    if (is_tensor(object)) type_ = py::reinterpret_borrow<py::object>(type);
    weak_ = !type_ && PyType_SUPPORTS_WEAKREFS(Py_TYPE(object));
    held_ = weak_ ? owned(PyWeakref_NewRef(object, nullptr))
                  : py::reinterpret_borrow<py::object>(object);
  }
  void add_to(Lines& lines) const {
    if (weak_) lines.add(held_.ptr(), sizeof(PyWeakReference));
    if (weak_ || type_) lines.add(object_, sizeof(PyObject));
  }
  bool is(PyObject* other) const {
    if (other != object_) return false;
    if (type_) return reinterpret_cast<PyObject*>(Py_TYPE(other)) == type_.ptr();
    return !weak_ || alive();
  }
  int visit(const Visitor& visitor) const {
    const int rc = visitor(held_);
    return rc != 0 ? rc : visitor(type_);
  }

 private:
  // Another object may have come to lie where one that died did.
  bool alive() const {
#if PY_VERSION_HEX >= 0x030D0000
    PyObject* found = nullptr;
    const int rc = PyWeakref_GetRef(held_.ptr(), &found);
    Py_XDECREF(found);
    if (rc < 0) throw py::error_already_set();
    return rc != 0;
#else
    return PyWeakref_GetObject(held_.ptr()) == object_;
#endif
  }

  PyObject* object_;
  py::object held_, type_;
  bool weak_;
};

// Of what no forward depends on, though it is in every module.
bool is_ignored(PyObject* key) {
  static const char* const names[] = {"_vitfast_memos",  // of vitfast/layers/_memo.py
                                      "_state_dict_hooks",
                                      "_state_dict_pre_hooks",
                                      "_load_state_dict_pre_hooks",
                                      "_load_state_dict_post_hooks",
                                      "_non_persistent_buffers_set",
                                      "_forward_hooks_with_kwargs",
                                      "_forward_hooks_always_called",
                                      "_forward_pre_hooks_with_kwargs"};
  if (!PyUnicode_Check(key)) return false;
  for (const char* name : names) {
    if (PyUnicode_CompareWithASCIIString(key, name) == 0) return true;
  }
  return false;
}

// The keys of a dictionary and the identities of its values; of dictionaries in it what they hold.
class DictState {
 public:
  DictState(PyObject* dict, bool nested) : size_(PyDict_Size(dict)) {
    PyObject *key, *value;
    Py_ssize_t position = 0;
    items_.reserve(size_);
    while (PyDict_Next(dict, &position, &key, &value)) {
      Item item;
      item.key = py::reinterpret_borrow<py::object>(key);
      if (is_ignored(key)) {
      } else if (!nested && PyDict_Check(value)) {
        item.dict = std::make_unique<DictState>(value, true);
      } else {
        item.value = std::make_unique<Identity>(value);
      }
      items_.push_back(std::move(item));
    }
  }

  void add_to(Lines& lines, PyObject* dict) const {
    const auto* const head = reinterpret_cast<PyDictObject*>(dict);
    lines.add(head, sizeof *head);
    if (size_ == 0) return;
    const auto n = static_cast<int64_t>(size_);
    if (head->ma_values != nullptr) lines.add(head->ma_values, 8 * n);
    lines.add(head->ma_keys, 64 + 2 * n + 24 * n);
    PyObject *key, *value;
    Py_ssize_t position = 0;
    for (const Item& item : items_) {
      if (!PyDict_Next(dict, &position, &key, &value)) return;
      if (item.value) item.value->add_to(lines);
      if (item.dict) item.dict->add_to(lines, value);
    }
  }

  bool same(PyObject* dict) const {
    if (PyDict_Size(dict) != size_) return false;
    PyObject *key, *value;
    Py_ssize_t position = 0;
    for (const Item& item : items_) {
      if (!PyDict_Next(dict, &position, &key, &value) || key != item.key.ptr()) return false;
      if (item.dict) {
        if (!PyDict_Check(value) || !item.dict->same(value)) return false;
      } else if (item.value && !item.value->is(value)) {
        return false;
      }
    }
    return true;
  }

  int visit(const Visitor& visitor) const {
    int rc = 0;
    for (const Item& item : items_) {
      if (rc == 0) rc = visitor(item.key);
      if (rc == 0 && item.value) rc = item.value->visit(visitor);
      if (rc == 0 && item.dict) rc = item.dict->visit(visitor);
    }
    return rc;
  }

 private:
  struct Item {
    py::object key;
    std::unique_ptr<Identity> value;
    std::unique_ptr<DictState> dict;
  };
  Py_ssize_t size_;
  std::vector<Item> items_;
};

class ModuleState {
 public:
  ModuleState(const py::list& modules, const py::object& names)
      : names_object_(names), names_(&names.cast<NameState&>()) {
    for (const py::handle module : modules) {
      const py::object dict = owned(PyObject_GenericGetDict(module.ptr(), nullptr));
      const auto type = reinterpret_cast<PyObject*>(Py_TYPE(module.ptr()));
      modules_.push_back({module.ptr(), py::reinterpret_borrow<py::object>(type),
                          std::make_unique<DictState>(dict.ptr(), false)});
      lines_.add(module.ptr(), sizeof(PyObject));
      modules_.back().dict->add_to(lines_, dict.ptr());
    }
  }

  // Parents come before their children, so that a module is alive when its turn comes.
  bool same(const py::object& root) const {
    if (modules_.empty() || root.ptr() != modules_.front().module) return false;
    names_->fetch();
    lines_.fetch();
    if (!names_->same()) return false;
    for (const One& one : modules_) {
      if (reinterpret_cast<PyObject*>(Py_TYPE(one.module)) != one.type.ptr()) return false;
      const py::object dict = owned(PyObject_GenericGetDict(one.module, nullptr));
      if (!one.dict->same(dict.ptr())) return false;
    }
    return true;
  }

  int visit(const Visitor& visitor) const {
    int rc = visitor(names_object_);
    for (const One& one : modules_) {
      if (rc == 0) rc = visitor(one.type);
      if (rc == 0) rc = one.dict->visit(visitor);
    }
    return rc;
  }

  // Afterwards nothing is the same. What is let go may come back here.
  void clear() {
    const std::vector<One> gone = std::move(modules_);
    modules_.clear();
  }

 private:
  struct One {
    PyObject* module;
    py::object type;
    std::unique_ptr<DictState> dict;
  };
  std::vector<One> modules_;
  py::object names_object_;  // shared by all modules of the same classes
  NameState* names_;
  Lines lines_;
};

}  // namespace

void bind_module_state(py::module_& m) {
  py::class_<ModuleState>(m, "ModuleState", collectable<ModuleState>())
      .def(
          py::init<const py::list&, const py::object&>(),
          "Of modules, parents first: their classes and what their dictionaries hold. And a NameState "
          "of what their forwards call.")
      .def("same", &ModuleState::same, "Whether nothing has changed, of the first module.");
}

}  // namespace vitfast
