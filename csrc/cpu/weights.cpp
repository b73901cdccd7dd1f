// Floor: one cache miss an element, as many of them at a time as the cores can track.
#include "weights.h"

#include <cstring>

#include "../common/parallel.h"

namespace vitfast {
namespace VITFAST_ISA {
namespace {

constexpr int64_t kAhead = 24;
constexpr int64_t kParts = 4;  // hashed apart, whatever the threads

inline uint64_t mixed(uint64_t h, uint64_t bits) {
  h = (h ^ bits) * 0x9e3779b97f4a7c15u;
  return h ^ (h >> 29);
}

// Walks the diagonal of a matrix, wrapping round at its edges.
struct Walk {
  const Fingerprint& f;
  int64_t row, column;
  Walk(const Fingerprint& matrix, int64_t i) : f(matrix), row(i % matrix.rows), column(i % matrix.columns) {}
  int64_t offset() const { return row * f.row_stride + column * f.column_stride; }
  void step() {
    if (++row == f.rows) row = 0;
    if (++column == f.columns) column = 0;
  }
};

template <class T>
uint64_t hash(const Fingerprint& f, int64_t begin, int64_t end) {
  const T* const weight = static_cast<const T*>(f.weight);
  uint64_t h = 1;
  Walk now(f, begin), later(f, begin + kAhead);
  for (int64_t i = begin; i < end; ++i) {
    __builtin_prefetch(weight + later.offset());
    T bits;
    std::memcpy(&bits, weight + now.offset(), sizeof bits);
    h = mixed(h, bits);
    now.step();
    later.step();
  }
  return h;
}

}  // namespace

uint64_t fingerprint(const Fingerprint& f) {
  if (f.rows == 0 || f.columns == 0) return 0;
  const int64_t n = f.rows > f.columns ? f.rows : f.columns;
  uint64_t parts[kParts];
  parallel_for(kParts, f.threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t first = n * p / kParts, last = n * (p + 1) / kParts;
      parts[p] = f.item_bytes == 2 ? hash<uint16_t>(f, first, last) : hash<uint32_t>(f, first, last);
    }
  });
  uint64_t h = 0;
  for (const uint64_t part : parts) h = mixed(h, part);
  return h;
}

}  // namespace VITFAST_ISA
}  // namespace vitfast
