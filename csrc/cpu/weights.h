// A fingerprint of a weight, by which a cached packing of it notices edits that nobody announced.
#pragma once
#include <cstdint>

#include "isa.h"

namespace vitfast {

// Hash of the bits of max(rows, columns) elements along a wrapped diagonal: an edit of a whole row,
// a whole column or the whole matrix changes it; one of a few elements may not.
struct Fingerprint {
  const void* weight;
  int64_t item_bytes;  // 2 or 4
  int64_t rows, columns, row_stride, column_stride;
  int threads;
};

VITFAST_DECLARE(uint64_t fingerprint(const Fingerprint&))
inline uint64_t fingerprint(const Fingerprint& f) { VITFAST_DISPATCH(fingerprint(f)) }

}  // namespace vitfast
