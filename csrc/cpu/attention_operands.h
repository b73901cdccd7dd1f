// What the backward kernels pack for their products, on tiles [key][query] of kBlock x kBlock.
#pragma once
#include "../common/scratch.h"
#include "attention_tile.h"

namespace vitfast {
namespace VITFAST_ISA {
namespace {

// A tile [kBlock keys][kBlock queries] as B operand of products over keys, [unit of keys][kBlock],
// and transposed, over queries, [unit of queries][kBlock].
inline const float* pair_keys(F32, const float* tile, int64_t, float*) { return tile; }
inline const float* pair_queries(F32, const float* tile, float* buffer) {
  for (int i = 0; i < kBlock; i += kLanes)
    for (int j = 0; j < kBlock; j += kLanes)
      transpose_square(tile + i * kBlock + j, static_cast<int64_t>(kBlock), buffer + j * kBlock + i,
                       static_cast<int64_t>(kBlock));
  return buffer;
}
#if defined(VITFAST_HAS_BF16_DOT)
inline const uint32_t* pair_keys(Bf16, const float* tile, int64_t keys, uint32_t* buffer) {
  for (int64_t k = 0; k < keys; k += 2)
    for (int m = 0; m < kBlock; m += kLanes)
      _mm512_storeu_si512(
          buffer + k / 2 * kBlock + m,
          pair_bf16(load(tile + k * kBlock + m), load(tile + (k + 1) * kBlock + m)));
  return buffer;
}
// Neighbouring queries of a row are the pairs already: round, then transpose 32-bit units.
inline const uint32_t* pair_queries(Bf16, const float* tile, uint32_t* buffer) {
  alignas(64) uint32_t square[kLanes * kLanes];
  for (int k = 0; k < kBlock; k += kLanes)
    for (int m = 0; m < kBlock; m += 2 * kLanes) {
      for (int i = 0; i < kLanes; ++i) {
        const float* at = tile + (k + i) * kBlock + m;
        _mm512_store_si512(square + i * kLanes,
                           (__m512i)_mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(load(at + kLanes)),
                                                        reinterpret_cast<__m512>(load(at))));
      }
      transpose_square(square, static_cast<int64_t>(kLanes), buffer + m / 2 * kBlock + k,
                       static_cast<int64_t>(kBlock));
    }
  return buffer;
}
#endif

// What a backward packs: the keys and values of some tiles, and one block of queries.
template <class M>
struct Operands {
  typedef typename M::Elem Elem;
  Elem *k_rows, *v_rows;           // panels of a tile's keys by units of D, [tile]
  Elem* k_columns;                 // panels of D by units of a tile's keys, [tile]
  Elem *q_lanes, *g_lanes;         // [unit of D][kBlock]; g is dout
  Elem *q_columns, *g_columns;     // panels of D by units of queries
  Elem *over_keys, *over_queries;  // a tile as operand of a product: [unit][kBlock]

  static constexpr int64_t block_units = kBlock / M::kPair;

  int64_t carve(char* base, int64_t tiles, int64_t D) {
    const int64_t units = ceil_div(D, M::kPair);
    int64_t used = 0;
    used = take(base, used, k_rows, tiles * kBlock * units);
    used = take(base, used, v_rows, tiles * kBlock * units);
    used = take(base, used, k_columns, tiles * block_units * D);
    used = take(base, used, q_lanes, units * kBlock);
    used = take(base, used, g_lanes, units * kBlock);
    used = take(base, used, q_columns, block_units * D);
    used = take(base, used, g_columns, block_units * D);
    used = take(base, used, over_keys, block_units * kBlock);
    return take(base, used, over_queries, block_units * kBlock);
  }

  // What a tile adds to the gradients: dq += k^T dS, dv += dout^T P and dk += q^T dS, [D][kBlock]
  // each.
  void add_gradients(int64_t tile, int64_t keys, int64_t queries, int64_t D, const float* p,
                     const float* ds, float* dq, float* dk, float* dv) const {
    const int q_vecs = static_cast<int>(ceil_div(queries, kLanes));
    const int k_vecs = static_cast<int>(ceil_div(keys, kLanes));
    const int64_t key_units = ceil_div(keys, M::kPair), query_units = ceil_div(queries, M::kPair);
    product<M>(Panels<M>{k_columns + tile * block_units * D}, D,
               pair_keys(M{}, ds, keys, over_keys), q_vecs, key_units, Accumulate{dq});
    product<M>(Panels<M>{g_columns}, D, pair_queries(M{}, p, over_queries), k_vecs, query_units,
               Accumulate{dv});
    product<M>(Panels<M>{q_columns}, D, pair_queries(M{}, ds, over_queries), k_vecs, query_units,
               Accumulate{dk});
  }
};

inline vf probability(F32, vf x) { return exp2_nonpositive(x); }
#if defined(VITFAST_HAS_BF16_DOT)
inline vf probability(Bf16, vf x) { return exp2_bf16(x); }
#endif

}  // namespace
}  // namespace VITFAST_ISA
}  // namespace vitfast
