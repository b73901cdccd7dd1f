// The one micro-kernel that all matrix products of the attention kernels run on.
//
// Every product is C[r, m] += sum_k A[k, r] * B[k, m] with m across lanes: A is a panel of kRows
// scalars per k (broadcast), B a row of kMaxVec vectors per k. With AVX512-BF16 one k holds a pair
// of bfloat16 and one instruction multiplies both. A tile of C is loaded, computed and finished in
// registers; what becomes of it is up to a functor, `finish`.
#pragma once
#include "../common/math.h"
#include "simd.h"

namespace vitfast {
namespace VITFAST_ISA {
namespace {

constexpr int kRows = 6;
constexpr int kMaxVec = kLanes == 16 ? 4 : 2;  // 24 or 12 accumulators
constexpr int kBlock = kMaxVec * kLanes;       // queries (or keys) across lanes
constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;
constexpr float kInf = __builtin_inff();

// Products of float32 values.
struct F32 {
  typedef float Elem;  // one k of a panel
  typedef float Row;   // element of a tile of rows
  static constexpr int kPair = 1;
  static inline vf mac(vf acc, vf b, float a) { return fma(b, splat(a), acc); }
};

#if defined(__AVX512BF16__) && defined(__AVX512F__)
#define VITFAST_HAS_BF16_DOT 1
// Products of bfloat16 values, two at a time, accumulated in float32.
struct Bf16 {
  typedef uint32_t Elem;
  typedef bf16_t Row;
  static constexpr int kPair = 2;
  static inline vf mac(vf acc, vf b, uint32_t a) {
    return reinterpret_cast<vf>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(acc),
                                                 reinterpret_cast<__m512bh>(b),
                                                 (__m512bh)_mm512_set1_epi32(static_cast<int>(a))));
  }
};
#endif

// f(M{}) for the products that a problem's dtype asks for.
template <class F>
inline void with_products([[maybe_unused]] DType dtype, const F& f) {
#if defined(VITFAST_HAS_BF16_DOT)
  if (dtype == DType::bf16) return f(Bf16{});
#endif
  f(F32{});
}

#if defined(VITFAST_HAS_BF16_DOT)
// Lane i of `low` and of `high`, rounded to bfloat16, as one 32-bit pair.
inline __m512i pair_bf16(vf low, vf high) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(
      order,
      (__m512i)_mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(high), reinterpret_cast<__m512>(low)));
}
#endif

inline vf load_bits(const float* p) { return load(p); }
inline vf load_bits(const uint32_t* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// A of a product says where its k-th unit of row r of a group of R rows lies, `unit<R>(k, r)`, and
// what the group from a row on is, `from(row, units)`. Here it lies in packed panels, see
// for_groups.
template <class M>
struct Panels {
  const typename M::Elem* first;  // [row][unit], in groups of rows
  Panels from(int64_t row, int64_t units) const { return {first + row * units}; }
  template <int R>
  const typename M::Elem* unit(int64_t k, int r) const {
    return first + k * R + r;
  }
};

// acc[r][v] += sum_k A[k, r] * b[k][v], b: [units][kBlock].
template <class M, class A, int R, int NV>
inline VITFAST_INLINE void multiply(const A& a, const typename M::Elem* __restrict__ b,
                                    int64_t units, vf (&acc)[R][NV]) {
  for (int64_t k = 0; k < units; ++k, b += kBlock) {
    vf row[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) row[v] = load_bits(b + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      typename M::Elem value;
      std::memcpy(&value, a.template unit<R>(k, r), sizeof value);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) acc[r][v] = M::mac(acc[r][v], row[v], value);
    }
  }
}

// Calls f with compile-time constants: f.template run<R, NV>().
template <int NV, class F>
inline void with_rows(int rows, const F& f) {
  switch (rows) {
    case 6: f.template run<6, NV>(); break;
    case 5: f.template run<5, NV>(); break;
    case 4: f.template run<4, NV>(); break;
    case 3: f.template run<3, NV>(); break;
    case 2: f.template run<2, NV>(); break;
    default: f.template run<1, NV>(); break;
  }
}
template <class F>
inline void with_tile(int rows, int vecs, const F& f) {
  switch (vecs) {
    case 1: with_rows<1>(rows, f); break;
#if defined(__AVX512F__)
    case 4: with_rows<4>(rows, f); break;
    case 3: with_rows<3>(rows, f); break;
#endif
    default: with_rows<2>(rows, f); break;
  }
}

// Panels of `rows` rows: group g starts at element g * kRows * k; the last group is narrower.
template <class F>
inline void for_groups(int64_t rows, const F& f) {
  for (int64_t r = 0; r < rows; r += kRows) f(r, static_cast<int>(min(kRows, rows - r)));
}

// One tile of A B, and what `finish` makes of it.
template <class M, class A, class Finish>
struct Tile {
  A a;
  const typename M::Elem* b;  // [units][kBlock]
  int64_t units, row;
  const Finish& finish;
  template <int R, int NV>
  inline void run() const {
    vf acc[R][NV] = {};
    multiply<M>(a, b, units, acc);
    const Finish own = finish;  // which no store can change
    own(row, acc);
  }
};

// A B for `rows` rows of A and `vecs` vectors of b, [units][kBlock]: finish(row, acc) takes rows
// from `row` on.
template <class M, class A, class Finish>
inline void product(const A& a, int64_t rows, const typename M::Elem* b, int vecs, int64_t units,
                    const Finish& finish) {
  for_groups(rows, [&](int64_t row, int n) {
    with_tile(n, vecs, Tile<M, A, Finish>{a.from(row, units), b, units, row, finish});
  });
}

// C = A B
struct Store {
  float* c;  // [row][kBlock]
  template <int R, int NV>
  inline VITFAST_INLINE void operator()(int64_t row, const vf (&acc)[R][NV]) const {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) store(c + (row + r) * kBlock + v * kLanes, acc[r][v]);
    }
  }
};

// C += A B. A tile is summed on its own: fewer roundings in a chain than on top of all tiles
// before.
struct Accumulate {
  float* c;  // [row][kBlock]
  template <int R, int NV>
  inline VITFAST_INLINE void operator()(int64_t row, const vf (&acc)[R][NV]) const {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        float* at = c + (row + r) * kBlock + v * kLanes;
        store(at, load(at) + acc[r][v]);
      }
    }
  }
};

}  // namespace
}  // namespace VITFAST_ISA
}  // namespace vitfast
