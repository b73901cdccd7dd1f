#include "weights.h"

#include <cstring>

#ifndef VITFAST_ISA
#error "kernel bodies are compiled through CMake, once per instruction set"
#endif

namespace vitfast {
namespace VITFAST_ISA {
namespace {

// Every element is a cache miss of its own: as many are kept on the way as a core can track.
constexpr int64_t kAhead = 24;
constexpr int kChains = 4;

template <class T>
uint64_t hash(const Fingerprint& f) {
  const int64_t n = f.rows > f.columns ? f.rows : f.columns;
  const T* const weight = static_cast<const T*>(f.weight);
  uint64_t chain[kChains] = {1, 2, 3, 4};
  // (row, column) now, and kAhead elements later.
  int64_t row = 0, column = 0, next_row = kAhead % f.rows, next_column = kAhead % f.columns;
  for (int64_t i = 0; i < n; ++i) {
    __builtin_prefetch(weight + next_row * f.row_stride + next_column * f.column_stride);
    T bits;
    std::memcpy(&bits, weight + row * f.row_stride + column * f.column_stride, sizeof bits);
    uint64_t& h = chain[i % kChains];
    h = (h ^ bits) * 0x9e3779b97f4a7c15u;
    h ^= h >> 29;
    if (++row == f.rows) row = 0;
    if (++column == f.columns) column = 0;
    if (++next_row == f.rows) next_row = 0;
    if (++next_column == f.columns) next_column = 0;
  }
  uint64_t h = 0;
  for (const uint64_t c : chain) h = (h ^ c) * 0x9e3779b97f4a7c15u + (h >> 31);
  return h;
}

}  // namespace

uint64_t fingerprint(const Fingerprint& f) {
  if (f.rows == 0 || f.columns == 0) return 0;
  return f.item_bytes == 2 ? hash<uint16_t>(f) : hash<uint32_t>(f);
}

}  // namespace VITFAST_ISA
}  // namespace vitfast
