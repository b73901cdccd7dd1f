// Addressing of GemmRows, and loads and stores of one vector in either dtype, for kernel bodies.
#pragma once
#include "../common/math.h"
#include "gemm.h"
#include "simd.h"

namespace vitfast {
namespace VITFAST_ISA {
namespace {

inline int64_t offset(const GemmRows& r, int64_t i) {
  return i / r.rows * r.outer + i % r.rows * r.inner;
}

// n <= kLanes elements of a row or vector, from element i.
inline vf get(const void* p, DType t, int64_t i, int n) {
  if (t == DType::f32) {
    const float* const q = static_cast<const float*>(p) + i;
    return n == kLanes ? load(q) : load_n(q, n);
  }
  const bf16_t* const q = static_cast<const bf16_t*>(p) + i;
  return n == kLanes ? load(q) : load_n(q, n);
}
inline void put(const GemmRows& r, int64_t i, vf v, int n) {
  if (r.dtype == DType::f32) {
    float* const q = static_cast<float*>(r.ptr) + i;
    n == kLanes ? store(q, v) : store_n(q, v, n);
  } else {
    bf16_t* const q = static_cast<bf16_t*>(r.ptr) + i;
    n == kLanes ? store(q, v) : store_n(q, v, n);
  }
}
inline vf get(const GemmVector& v, int64_t i, int n) {
  return v.ptr != nullptr ? get(v.ptr, v.dtype, i, n) : zero();
}

}  // namespace
}  // namespace VITFAST_ISA
}  // namespace vitfast
