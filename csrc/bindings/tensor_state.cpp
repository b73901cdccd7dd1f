// Floor: one cache miss a line of the tensors' heads and of the fingerprints, as many of them at a
// time as the core can track: by the time a block runs again, its weights and those of all others
// have passed through the caches.
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "address.h"
#include "cpu/fingerprint.h"
#include "lines.h"
#include "module.h"
#include "place.h"
#include "python.h"

namespace py = pybind11;

namespace vitfast {
namespace {

// Version, and what its place is.
using Facts = std::vector<int64_t>;

class Reader {
 public:
  explicit Reader(PyObject* t) : place_(t) {
    static const auto* const name = new py::str("_version");  // outlives the interpreter
    const auto version = py::reinterpret_steal<py::object>(PyObject_GetAttr(t, name->ptr()));
    if (!version) PyErr_Clear();  // tensors of inference mode have none
    version_ = version ? version.cast<int64_t>() : -1;
  }

  Facts facts() const {
    Facts found;
    found.reserve(1 + place_.size());
    found.push_back(version_);
    place_.append_to(found);
    return found;
  }

  int64_t head() const { return place_.head(); }
  const int64_t* shape() const { return place_.shape(); }

 private:
  Place place_;
  int64_t version_;
};

using Matrix = std::array<int64_t, 6>;

// The same elements in an order in which neighbours follow one another, where there is one.
Fingerprint along_memory(Fingerprint f) {
  if (f.row_stride == 1 && f.column_stride != 1) {
    std::swap(f.rows, f.columns);
    std::swap(f.row_stride, f.column_stride);
  }
  if (f.column_stride == 1 && f.row_stride == f.columns) {
    f.columns *= f.rows;
    f.rows = 1;
  }
  return f;
}

class TensorState {
 public:
  // Of tensors, and for each item bytes, rows, columns and their strides as the fingerprint's, and
  // whether it is read whole every time.
  TensorState(const py::tuple& tensors, const std::vector<Matrix>& matrices, int threads) {
    if (tensors.size() != matrices.size()) throw std::invalid_argument("TensorState: lengths");
    for (size_t i = 0; i < matrices.size(); ++i) {
      const Matrix& m = matrices[i];
      if (m[0] != 2 && m[0] != 4) {
        throw std::invalid_argument("TensorState: items have 2 or 4 bytes");
      }
      PyObject* const t = PyTuple_GET_ITEM(tensors.ptr(), i);
      const Reader reader(t);
      facts_.push_back(reader.facts());
      matrices_.push_back(
          {reinterpret_cast<const void*>(reader.head()), m[0], m[1], m[2], m[3], m[4]});
      lines_.add(t, 64);
      if (reader.shape() != nullptr) lines_.add(reader.shape() - 16, 256);  // inside torch's own
      // No version tells of edits of a tensor of inference mode.
      const bool whole = m[5] != 0 || facts_.back()[0] < 0;
      add_sections(i, along_memory(matrices_.back()), whole);
      if (whole) matrices_.back().rows = 0;  // no fingerprint of what is read anyway
    }
    hashes_ = hashed(threads);
    contents_.resize(sections_.size());
    vitfast::contents(sections_.data(), size(sections_), contents_.data(), threads);
  }

  // Looks at all that the tensors hold if `fully`; else at their fingerprints and, of those that
  // are not to be read whole, at a section in turn.
  bool same(const py::tuple& tensors, int threads, bool fully) {
    edited_ = -1;
    if (tensors.size() != facts_.size()) return false;
    lines_.fetch();
    for (size_t i = 0; i < facts_.size(); ++i) {
      if (Reader(PyTuple_GET_ITEM(tensors.ptr(), i)).facts() != facts_[i]) return false;
    }
    return hashed(threads) == hashes_ && same_contents(threads, fully);
  }

  // If `same`, the storages of the tensors.
  std::optional<py::tuple> storages(const py::tuple& tensors, int threads, bool fully) {
    py::tuple found(tensors.size());  // taken first: of these the addresses are looked at
    for (size_t i = 0; i < tensors.size(); ++i)
      found[i] = storage_of(PyTuple_GET_ITEM(tensors.ptr(), i));
    if (!same(tensors, threads, fully)) return std::nullopt;
    return found;
  }

  // The tensor that the latest `same` found edited where only its turn could tell; -1 for none.
  int64_t edited() const { return edited_; }

 private:
  static constexpr int64_t kTurns = 32;

  template <class T>
  static int64_t size(const std::vector<T>& values) {
    return static_cast<int64_t>(values.size());
  }

  void add_sections(size_t tensor, const Fingerprint& f, bool whole) {
    const int64_t total = f.rows * f.columns;
    if (total == 0) return;
    for (int64_t i = 0, n = whole ? 1 : kTurns; i < n; ++i) {
      if (total * i / n == total * (i + 1) / n) continue;
      sections_.push_back({f, total * i / n, total * (i + 1) / n});
      turns_.push_back(whole ? -1 : i);
      owners_.push_back(static_cast<int64_t>(tensor));
    }
  }

  bool same_contents(int threads, bool fully) {
    std::vector<Section> due;
    std::vector<size_t> which;
    for (size_t i = 0; i < sections_.size(); ++i) {
      if (!fully && turns_[i] >= 0 && turns_[i] != turn_) continue;
      due.push_back(sections_[i]);
      which.push_back(i);
    }
    turn_ = (turn_ + 1) % kTurns;
    std::vector<uint64_t> found(due.size());
    vitfast::contents(due.data(), size(due), found.data(), threads);
    for (size_t i = 0; i < due.size(); ++i) {
      if (found[i] == contents_[which[i]]) continue;
      if (turns_[which[i]] >= 0) edited_ = owners_[which[i]];
      return false;
    }
    return true;
  }

  // With the GIL held, lest another thread gives a tensor other storage meanwhile.
  std::vector<uint64_t> hashed(int threads) const {
    std::vector<uint64_t> found(matrices_.size());
    fingerprints(matrices_.data(), size(found), found.data(), threads);
    return found;
  }

  std::vector<Facts> facts_;
  std::vector<Fingerprint> matrices_;
  std::vector<uint64_t> hashes_;
  std::vector<Section> sections_;
  std::vector<int64_t> turns_;   // of each section; -1 where it is read every time
  std::vector<int64_t> owners_;  // of each section, its tensor
  std::vector<uint64_t> contents_;
  int64_t turn_ = 0, edited_ = -1;
  Lines lines_;
};

}  // namespace

void bind_tensor_state(py::module_& m) {
  py::class_<TensorState>(m, "TensorState")
      .def(
          py::init<const py::tuple&, const std::vector<Matrix>&, int>(),
          "Of dense tensors on the CPU: address, version, dtype, shape, strides and content. Item "
          "bytes, rows, columns, their strides and whether it is always read whole of each; threads.")
      .def(
          "same", &TensorState::same, py::arg("tensors"), py::arg("threads") = 1,
          py::arg("fully") = false,
          "Whether nothing about these tensors has changed: by fingerprint and a 32nd of what they "
          "hold, another one each time; or by all of it.")
      .def("storages", &TensorState::storages, py::arg("tensors"), py::arg("threads") = 1,
           py::arg("fully") = false,
           "The storages of these tensors if `same`, else None. While they are kept, what is known "
           "about the tensors' addresses holds, whatever another thread assigns to their `data`.")
      .def_property_readonly(
          "edited", &TensorState::edited,
          "The tensor that only the latest `same` showed to be edited; -1: none.");
}

}  // namespace vitfast
