// Sizes and counts, for kernels.
#pragma once
#include <cstdint>

#ifndef VITFAST_ISA
#define VITFAST_ISA common
#endif

namespace vitfast {
namespace VITFAST_ISA {
namespace {

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
// `value`, or the nearest that is at least `low` and at most `high`.
inline int64_t clamp(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace
}  // namespace VITFAST_ISA
}  // namespace vitfast
