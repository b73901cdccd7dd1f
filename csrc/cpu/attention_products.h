// The products of attention's backward, on tiles [key][query] of kBlock x kBlock.
#pragma once
#include "attention_tile.h"

namespace vitfast {
namespace VITFAST_ISA {
namespace {

// C = A B
template <class M>
struct Store {
  const typename M::Elem *panel, *lanes;
  int64_t units;
  float* c;
  template <int R, int NV>
  inline void run() const {
    vf acc[R][NV] = {};
    multiply<M, R, NV>(panel, lanes, units, acc);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) store(c + r * kBlock + v * kLanes, acc[r][v]);
    }
  }
};
// C += A B
template <class M>
struct Accumulate {
  const typename M::Elem *panel, *lanes;
  int64_t units;
  float* c;
  template <int R, int NV>
  inline void run() const {
    // A tile is summed on its own: fewer roundings in a chain than on top of all tiles before.
    vf acc[R][NV] = {};
    multiply<M, R, NV>(panel, lanes, units, acc);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        float* at = c + r * kBlock + v * kLanes;
        store(at, load(at) + acc[r][v]);
      }
    }
  }
};

template <template <class> class Op, class M>
inline void product(const typename M::Elem* panels, int64_t rows, const typename M::Elem* lanes, int vecs,
                    int64_t units, float* c) {
  for_groups(rows, [&](int64_t r, int n) {
    with_tile(n, vecs, Op<M>{panels + r * units, lanes, units, c + r * kBlock});
  });
}

// A tile [key][query] as B operand of products over keys, and transposed, over queries.
inline const float* over_keys(F32, const float* tile, int64_t, float*) { return tile; }
inline const float* over_queries(F32, const float* tile, float* buffer) {
  for (int i = 0; i < kBlock; i += kLanes)
    for (int j = 0; j < kBlock; j += kLanes)
      transpose_square(tile + i * kBlock + j, static_cast<int64_t>(kBlock), buffer + j * kBlock + i,
                       static_cast<int64_t>(kBlock));
  return buffer;
}
#if defined(VITFAST_HAS_BF16_DOT)
inline const uint32_t* over_keys(Bf16, const float* tile, int64_t keys, uint32_t* buffer) {
  for (int64_t k = 0; k < keys; k += 2)
    for (int m = 0; m < kBlock; m += kLanes)
      _mm512_storeu_si512(buffer + k / 2 * kBlock + m,
                          pair_bf16(load(tile + k * kBlock + m), load(tile + (k + 1) * kBlock + m)));
  return buffer;
}
// Neighbouring queries of a row are the pairs already: round, then transpose 32-bit units.
inline const uint32_t* over_queries(Bf16, const float* tile, uint32_t* buffer) {
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

inline vf probability(F32, vf x) { return exp2_nonpositive(x); }
#if defined(VITFAST_HAS_BF16_DOT)
inline vf probability(Bf16, vf x) { return exp2_bf16(x); }
#endif

}  // namespace
}  // namespace VITFAST_ISA
}  // namespace vitfast
