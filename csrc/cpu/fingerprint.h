// Fingerprints and hashes of weights, by which what is kept of them notices edits that nobody
// announced.
#pragma once
#include <cstdint>

#include "isa.h"

namespace vitfast {

// Hash of the bits of max(rows, columns) elements along a wrapped diagonal: an edit of a whole row,
// a whole column or the whole matrix changes it; one of a few elements may not.
struct Fingerprint {
  const void* weight;  // [rows, columns]
  int64_t item_bytes;  // 2 or 4
  int64_t rows, columns, row_stride, column_stride;
};

// Elements [first, last) of a matrix, counted along its rows.
struct Section {
  Fingerprint matrix;
  int64_t first, last;
};

// sections, out: [count]. A hash each, of all their bits: an edit of any element changes it.
VITFAST_DECLARE(void contents(const Section* sections, int64_t count, uint64_t* out, int threads))
inline void contents(const Section* sections, int64_t count, uint64_t* out, int threads) {
  VITFAST_DISPATCH(contents(sections, count, out, threads))
}

// matrices, out: [count]. A hash each, as above.
VITFAST_DECLARE(void fingerprints(const Fingerprint* matrices, int64_t count, uint64_t* out,
                                  int threads))
inline void fingerprints(const Fingerprint* matrices, int64_t count, uint64_t* out, int threads) {
  VITFAST_DISPATCH(fingerprints(matrices, count, out, threads))
}

}  // namespace vitfast
