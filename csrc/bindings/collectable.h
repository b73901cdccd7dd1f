// Classes whose objects Python's garbage collector can see into.
#pragma once
#include <pybind11/pybind11.h>

namespace vitfast {

// What the garbage collector is told of.
struct Visitor {
  visitproc visit;
  void* argument;
  int operator()(const pybind11::object& held) const {
    return held ? visit(held.ptr(), argument) : 0;
  }
};

// For py::class_: T::visit(Visitor) shows all that an object holds, T::clear() lets go of it.
template <class T>
pybind11::custom_type_setup collectable() {
  struct Of {
    // nullptr while pybind11 makes or destroys it.
    static T* state(PyObject* self) {
      auto held = reinterpret_cast<pybind11::detail::instance*>(self)->get_value_and_holder();
      return held.holder_constructed() ? held.template value_ptr<T>() : nullptr;
    }
    static int traverse(PyObject* self, visitproc visit, void* arg) {
      Py_VISIT(Py_TYPE(self));
      const T* const found = state(self);
      return found == nullptr ? 0 : found->visit({visit, arg});
    }
    static int clear(PyObject* self) {
      if (T* const found = state(self)) found->clear();
      return 0;
    }
  };
  return pybind11::custom_type_setup([](PyHeapTypeObject* made) {
    PyTypeObject& type = made->ht_type;
    type.tp_flags |= Py_TPFLAGS_HAVE_GC;
    type.tp_traverse = Of::traverse;
    type.tp_clear = Of::clear;
  });
}

}  // namespace vitfast
