// Element types that cross the native boundary. The numbers are part of the Python contract
// (vitfast/runtime/native.py holds the same table).
#pragma once
#include <cstdint>

namespace vitfast {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2, u8 = 3 };

// Storage-only type: arithmetic happens in float.
struct bf16_t {
  uint16_t bits;
};

}  // namespace vitfast
