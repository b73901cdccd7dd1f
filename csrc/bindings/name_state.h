// Whether names of classes and modules still stand for what they did.
#pragma once
#include <pybind11/pybind11.h>

#include <utility>
#include <vector>

#include "collectable.h"
#include "lines.h"

namespace vitfast {

class NameState {
 public:
  // Owners, each with names that are attributes of it.
  explicit NameState(const std::vector<std::pair<pybind11::object, std::vector<pybind11::str>>>&);

  void fetch() const { lines_.fetch(); }
  bool same();
  int visit(const Visitor& visitor) const;
  void clear();  // afterwards nothing is the same

 private:
  struct Name {
    pybind11::object name, value;
    Py_ssize_t position;  // of the entry in a module's dictionary, for PyDict_Next; -1: not known
  };
  struct Owner {
    pybind11::object owner;
    pybind11::object dict;  // of a module
    std::vector<Name> names;
    unsigned tag;  // the version that Python gave to a class, its bases included; 0: none
  };

  bool is_same(Owner&);

  std::vector<Owner> owners_;
  bool cleared_ = false;
  Lines lines_;
};

}  // namespace vitfast
