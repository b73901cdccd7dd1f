// out = residual + gamma * act(A B + bias), and its gated form.
//
// B is read where it lies, a stretch of a panel of columns at a time, and put in the order in which
// the tiles want it; products of many rows have that done once beforehand. So there is no second
// copy of a weight that could become stale. Sums run over at most 128 products (bfloat16: 256)
// before they are added to the total: that keeps float32 results as exact as those of a blocked
// BLAS, and they depend neither on m nor on the threads.
#pragma once
#include <cstdint>

#include "../common/dtype.h"
#include "activation_kinds.h"
#include "isa.h"

namespace vitfast {

// Row i begins at element (i / rows) * outer + (i % rows) * inner. Null: absent.
struct GemmRows {
  void* ptr = nullptr;  // [m, columns], contiguous columns
  DType dtype = DType::f32;
  int64_t rows = 1, outer = 0, inner = 0;
};

// A vector over the columns. Null: absent.
struct GemmVector {
  const void* ptr = nullptr;  // [n]
  DType dtype = DType::f32;
};

// B[j, c] = ptr[j * k_stride + c * n_stride], j < k, c < n.
struct GemmB {
  const void* ptr;   // [k, n]
  const void* gate;  // [k, n], a second B of the same kind, for the gated form; null: none
  DType dtype;
  int64_t n, k, n_stride, k_stride;
};

struct Gemm {
  int64_t m;
  DType compute;  // of products: f32, or bf16 with sums in float32
  // [m, k]: rows with contiguous k; transposed: element (i, j) at j * inner + i.
  GemmRows a;
  bool a_transposed;
  GemmB b;
  const void* packed;  // [gemm_packed_bytes], from gemm_pack for the same instruction set; or null
  // With a gate: out = act(A B + bias) * (A B_gate + gate_bias).
  GemmVector bias, gate_bias;  // [n]
  Act act;
  GemmRows z, gate_z;  // [m, n]: sums with bias, before the activation
  GemmVector gamma;    // [n]
  GemmRows residual;   // [m, n], may lie exactly over out
  GemmRows out;        // [m, n]
  int threads;
};

VITFAST_DECLARE(void gemm(const Gemm&))
// packed: [gemm_packed_bytes], overwritten.
VITFAST_DECLARE(void gemm_pack(const GemmB&, DType compute, void* packed, int threads))
VITFAST_DECLARE(int64_t gemm_packed_bytes(const GemmB&, DType compute))

inline void gemm(const Gemm& g) { VITFAST_DISPATCH(gemm(g)) }
inline void gemm_pack(const GemmB& b, DType compute, void* packed, int threads) {
  VITFAST_DISPATCH(gemm_pack(b, compute, packed, threads))
}
inline int64_t gemm_packed_bytes(const GemmB& b, DType compute) {
  VITFAST_DISPATCH(gemm_packed_bytes(b, compute))
}

}  // namespace vitfast
