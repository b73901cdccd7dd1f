// Floor: of a fingerprint one cache miss an element, as many of them at a time as the cores can
// track; of a section its bytes at the bandwidth of memory.
#include "fingerprint.h"

#include <cstring>

#include "../common/math.h"
#include "../common/parallel.h"
#include "../common/scratch.h"

namespace vitfast {
namespace VITFAST_ISA {
namespace {

constexpr int64_t kAhead = 24;
constexpr int64_t kParts = 4;        // of a matrix, hashed apart, whatever the threads
constexpr int64_t kFew = 1024;       // elements that one thread is done with sooner
constexpr int64_t kFewRead = 32768;  // the same where they lie side by side

inline uint64_t mixed(uint64_t h, uint64_t bits) {
  h = (h ^ bits) * 0x9e3779b97f4a7c15u;
  return h ^ (h >> 29);
}

// Walks the diagonal of a matrix, wrapping round at its edges.
struct Walk {
  const Fingerprint& f;
  int64_t row, column;
  Walk(const Fingerprint& matrix, int64_t i)
      : f(matrix), row(i % matrix.rows), column(i % matrix.columns) {}
  int64_t offset() const { return row * f.row_stride + column * f.column_stride; }
  void step() {
    if (++row == f.rows) row = 0;
    if (++column == f.columns) column = 0;
  }
};

int64_t length(const Fingerprint& f) {
  if (f.rows == 0 || f.columns == 0) return 0;
  return max(f.rows, f.columns);
}

template <class T>
uint64_t hash(const Fingerprint& f, int64_t begin, int64_t end) {
  const T* const weight = static_cast<const T*>(f.weight);
  uint64_t h = 1;
  if (begin == end) return h;
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

// Of a run of bytes. Each step is a bijection of its word: one changed word always changes the
// hash.
uint64_t hash_bytes(const char* bytes, int64_t n, uint64_t seed) {
  constexpr uint64_t kOdd = 0x9e3779b97f4a7c15u;
  uint64_t lanes[4] = {seed, seed + 1, seed + 2, seed + 3};
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    uint64_t words[4];
    std::memcpy(words, bytes + i, 32);
    for (int k = 0; k < 4; ++k) lanes[k] = (lanes[k] ^ words[k]) * kOdd;
  }
  uint64_t h = seed;
  for (const uint64_t lane : lanes) h = mixed(h, lane ^ (lane >> 32));
  for (; i < n; i += 8) {
    uint64_t word = 0;
    std::memcpy(&word, bytes + i, static_cast<size_t>(min(n - i, 8)));
    h = mixed(h, word);
  }
  return h;
}

uint64_t hash_section(const Section& s) {
  const Fingerprint& f = s.matrix;
  const char* const weight = static_cast<const char*>(f.weight);
  uint64_t h = 1;
  for (int64_t at = s.first; at < s.last;) {
    const int64_t row = at / f.columns, column = at % f.columns;
    const int64_t n = min(s.last - at, f.columns - column);
    const char* const from =
        weight + (row * f.row_stride + column * f.column_stride) * f.item_bytes;
    if (f.column_stride == 1) {
      h = hash_bytes(from, n * f.item_bytes, h);
    } else {
      for (int64_t i = 0; i < n; ++i)
        h = hash_bytes(from + i * f.column_stride * f.item_bytes, f.item_bytes, h);
    }
    at += n;
  }
  return h;
}

}  // namespace

void contents(const Section* sections, int64_t count, uint64_t* out, int threads) {
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += sections[i].last - sections[i].first;
  parallel_for(count, total < kFewRead ? 1 : threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) out[i] = hash_section(sections[i]);
  });
}

void fingerprints(const Fingerprint* matrices, int64_t count, uint64_t* out, int threads) {
  const Scratch scratch(count * kParts * static_cast<int64_t>(sizeof(uint64_t)));
  uint64_t* const parts = scratch.as<uint64_t>();
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += length(matrices[i]);
  parallel_for(count * kParts, total < kFew ? 1 : threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t p = begin; p < end; ++p) {
      const Fingerprint& f = matrices[p / kParts];
      const int64_t n = length(f), part = p % kParts;
      const int64_t first = n * part / kParts, last = n * (part + 1) / kParts;
      parts[p] =
          f.item_bytes == 2 ? hash<uint16_t>(f, first, last) : hash<uint32_t>(f, first, last);
    }
  });
  for (int64_t i = 0; i < count; ++i) {
    out[i] = 0;
    for (int64_t p = 0; p < kParts; ++p) out[i] = mixed(out[i], parts[i * kParts + p]);
  }
}

}  // namespace VITFAST_ISA
}  // namespace vitfast
