// out = residual + gamma * act(A B + bias), with B packed beforehand, and its gated form.
//
// B is packed into panels of columns, so that the inner loop reads it in order; `gemm_format()` tells
// the packings of different instruction sets apart. Sums run over at most 128 products (bfloat16:
// 256) before they are added to the total: that keeps float32 results as exact as those of a blocked
// BLAS, and they depend neither on m nor on the threads.
#pragma once
#include <cstdint>

#include "../common/dtype.h"
#include "activation_kinds.h"
#include "isa.h"

namespace vitfast {

// Row i begins at element (i / rows) * outer + (i % rows) * inner. Null: absent.
struct GemmRows {
  void* ptr = nullptr;
  DType dtype = DType::f32;
  int64_t rows = 1, outer = 0, inner = 0;
};

// A vector over the columns. Null: absent.
struct GemmVector {
  const void* ptr = nullptr;
  DType dtype = DType::f32;
};

struct Gemm {
  int64_t m, n, k;
  DType compute;  // of products: f32, or bf16 with sums in float32
  // [m, k]: rows with contiguous k; transposed: element (i, j) at j * inner + i.
  GemmRows a;
  bool a_transposed;
  const void* b;  // from gemm_pack
  // Two layers in one: out = act(A B1 + bias) * (A B2 + gate_bias); both halves of B have n columns.
  bool gated;
  GemmVector bias, gate_bias;
  Act act;
  GemmRows z, gate_z;  // sums with bias, before the activation
  GemmVector gamma;
  GemmRows residual;  // may lie exactly over out
  GemmRows out;
  int threads;
};

// B[j, c] = source[j * k_stride + c * n_stride], j < k, c < n; gated: a second source of that shape.
struct GemmPack {
  int64_t n, k;
  DType compute;
  const void *b, *gate_b;
  DType dtype;
  int64_t n_stride, k_stride;
  void* packed;
  int threads;
};

VITFAST_DECLARE(void gemm(const Gemm&))
VITFAST_DECLARE(void gemm_pack(const GemmPack&))
VITFAST_DECLARE(int64_t gemm_packed_bytes(int64_t n, int64_t k, DType compute, bool gated))
VITFAST_DECLARE(int gemm_format())

inline void gemm(const Gemm& g) { VITFAST_DISPATCH(gemm(g)) }
inline void gemm_pack(const GemmPack& p) { VITFAST_DISPATCH(gemm_pack(p)) }
inline int64_t gemm_packed_bytes(int64_t n, int64_t k, DType compute, bool gated) {
  VITFAST_DISPATCH(gemm_packed_bytes(n, k, compute, gated))
}
inline int gemm_format() { VITFAST_DISPATCH(gemm_format()) }

}  // namespace vitfast
