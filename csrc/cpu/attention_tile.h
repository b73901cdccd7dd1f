// Tiles shared by the attention kernels: loading rows through the prologue, packing panels, and the
// one micro-kernel that all matrix products here run on.
//
// Every product is C[r, m] += sum_k A[k, r] * B[k, m] with m across lanes: A is a panel of kRows
// scalars per k (packed, broadcast), B a row of kMaxVec vectors per k. With AVX512-BF16 one k holds
// a pair of bfloat16 and one instruction multiplies both.
#pragma once
#include "../common/dtype.h"
#include "attention.h"
#include "simd.h"

namespace vitfast {
namespace VITFAST_ISA {
namespace {

constexpr int kRows = 6;
constexpr int kMaxVec = kLanes == 16 ? 4 : 2;       // 24 or 12 accumulators
constexpr int kBlock = kMaxVec * kLanes;            // queries (or keys) across lanes
constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;
constexpr float kInf = __builtin_inff();

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

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

#if defined(VITFAST_HAS_BF16_DOT)
// Lane i of `low` and of `high`, rounded to bfloat16, as one 32-bit pair.
inline __m512i pair_bf16(vf low, vf high) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                                         22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(high),
                                                                      reinterpret_cast<__m512>(low)));
}
#endif

inline vf load_bits(const float* p) { return load(p); }
inline vf load_bits(const uint32_t* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// acc[r][v] += sum_k A[k * R + r] * B[k * kBlock + v]
template <class M, int R, int NV>
inline __attribute__((always_inline)) void multiply(const typename M::Elem* __restrict__ a,
                                                    const typename M::Elem* __restrict__ b,
                                                    int64_t k, vf (&acc)[R][NV]) {
  for (int64_t i = 0; i < k; ++i, a += R, b += kBlock) {
    vf row[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) row[v] = load_bits(b + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) acc[r][v] = M::mac(acc[r][v], row[v], a[r]);
    }
  }
}

// Calls f with compile-time constants: f.template operator()<R, NV>().
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
  for (int64_t r = 0; r < rows; r += kRows) f(r, static_cast<int>(min64(kRows, rows - r)));
}

// ---- transposition ------------------------------------------------------------------------------

// In registers: row i, lane j becomes row j, lane i.
inline void transpose(vf (&r)[kLanes]) {
#pragma GCC unroll 8
  for (int s = 1; s < kLanes; s *= 2) {
    vi low, high;
#pragma GCC unroll 16
    for (int j = 0; j < kLanes; ++j) {
      low[j] = (j & s) ? kLanes + j - s : j;
      high[j] = (j & s) ? kLanes + j : j + s;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i & s) continue;
      const vf a = r[i], b = r[i + s];
      r[i] = __builtin_shuffle(a, b, low);
      r[i + s] = __builtin_shuffle(a, b, high);
    }
  }
}

// A square of kLanes x kLanes 32-bit units.
template <class T>
inline void transpose_square(const T* src, int64_t lds, T* dst, int64_t ldd) {
  static_assert(sizeof(T) == 4, "moves 32-bit units");
  vf r[kLanes];
  for (int i = 0; i < kLanes; ++i) r[i] = load_bits(src + i * lds);
  transpose(r);
  for (int i = 0; i < kLanes; ++i) std::memcpy(dst + i * ldd, &r[i], sizeof(vf));
}

// dst[c * ldd + r] = src[r * lds + c] for r < rows <= kLanes, c < cols; lanes from `rows` up to
// kLanes of dst are zero. Reads nothing outside src.
template <class T>
inline void transpose_rows(const T* src, int64_t lds, int rows, int64_t cols, T* dst, int64_t ldd) {
  int64_t c = 0;
  if (rows == kLanes)
    for (; c + kLanes <= cols; c += kLanes) transpose_square(src + c, lds, dst + c * ldd, ldd);
  for (; c < cols; ++c) {
    for (int i = 0; i < rows; ++i) dst[c * ldd + i] = src[i * lds + c];
    for (int i = rows; i < kLanes; ++i) dst[c * ldd + i] = T(0);
  }
}

// ---- rows through the prologue -------------------------------------------------------------------

// One side (q or k) of one (batch, head).
struct Source {
  const void* ptr;
  DType dtype;
  int64_t sn, sd, D;
  int norm;
  float eps;
  const float *weight, *bias;
  const float* rope;  // row of token `prefix`
  int64_t rope_sn, prefix;
  int half;
};

inline Source source(const AttnArgs& a, const AttnTensor& t, int64_t b, int64_t h) {
  const int64_t offset = b * t.sb + h * t.sh;
  const void* p = a.dtype == DType::f32 ? static_cast<const void*>(static_cast<const float*>(t.ptr) + offset)
                                        : static_cast<const void*>(static_cast<const bf16_t*>(t.ptr) + offset);
  return Source{p, a.dtype, t.sn, t.sd, a.D, 0, 0.f, nullptr, nullptr, nullptr, 0, 0, 0};
}
inline Source with_prologue(Source s, const AttnPrologue& p, int64_t b, int64_t h, const float* weight,
                            const float* bias) {
  s.norm = p.norm;
  s.eps = p.eps;
  s.weight = weight;
  s.bias = bias;
  s.rope = p.rope ? p.rope + b * p.rope_sb + h * p.rope_sh : nullptr;
  s.rope_sn = p.rope_sn;
  s.prefix = p.rope_prefix;
  s.half = p.rope_half;
  return s;
}

inline float rounded(float x, DType dtype) {
  if (dtype == DType::f32) return x;
  bf16_t h;
  from_float(x, &h);
  return to_float(h);
}

inline void read_row(const Source& s, int64_t n, float* out) {
  if (s.dtype == DType::f32) {
    const float* p = static_cast<const float*>(s.ptr) + n * s.sn;
    if (s.sd == 1) {
      std::memcpy(out, p, static_cast<size_t>(s.D) * 4);
    } else {
      for (int64_t d = 0; d < s.D; ++d) out[d] = p[d * s.sd];
    }
  } else {
    const bf16_t* p = static_cast<const bf16_t*>(s.ptr) + n * s.sn;
    int64_t d = 0;
    if (s.sd == 1)
      for (; d + kLanes <= s.D; d += kLanes) store(out + d, load(p + d));
    for (; d < s.D; ++d) out[d] = to_float(p[d * s.sd]);
  }
}

struct Moments {
  float mean, rstd;
};
inline Moments moments(const Source& s, const float* x) {
  double sum = 0, sq = 0;
  if (s.norm == 1) {
    for (int64_t d = 0; d < s.D; ++d) sum += x[d];
    sum /= static_cast<double>(s.D);
  }
  for (int64_t d = 0; d < s.D; ++d) sq += (x[d] - sum) * (x[d] - sum);
  return {static_cast<float>(sum),
          static_cast<float>(1.0 / __builtin_sqrt(sq / static_cast<double>(s.D) + s.eps))};
}

// x * cos + rotate(x) * sin in place; `sign` -1 applies the transposed rotation.
inline void rotate(const Source& s, int64_t n, float* x, float sign) {
  const float* sine = s.rope + (n - s.prefix) * s.rope_sn;
  const float* cosine = sine + s.D;
  const int64_t pairs = s.D / 2;
  const int64_t step = s.half ? 1 : 2, other = s.half ? pairs : 1;
  for (int64_t i = 0; i < pairs; ++i) {
    const int64_t p = i * step, q = p + other;
    const float a = x[p], b = x[q];
    if (sign > 0) {
      x[p] = a * cosine[p] - b * sine[p];
      x[q] = b * cosine[q] + a * sine[q];
    } else {
      x[p] = a * cosine[p] + b * sine[q];
      x[q] = b * cosine[q] - a * sine[p];
    }
  }
}

// Row n as the products see it, rounded where timm rounds (after the norm, after the rotation).
inline void fetch_row(const Source& s, int64_t n, float* x) {
  read_row(s, n, x);
  if (s.norm) {
    const Moments m = moments(s, x);
    for (int64_t d = 0; d < s.D; ++d) {
      const float y = (x[d] - m.mean) * m.rstd;
      x[d] = rounded((s.weight ? y * s.weight[d] : y) + (s.bias ? s.bias[d] : 0.f), s.dtype);
    }
  }
  if (s.rope && n >= s.prefix) {
    rotate(s, n, x, 1.f);
    if (s.dtype != DType::f32)
      for (int64_t d = 0; d < s.D; ++d) x[d] = rounded(x[d], s.dtype);
  }
}

// Rows [begin, begin + count) with unit stride: in place where the source allows it, else in
// `buffer` ([count][width], zero beyond D). Returns the first row and sets its leading dimension.
template <class Row>
inline const Row* fetch_rows(const Source& s, int64_t begin, int64_t count, int64_t width, Row* buffer,
                             float* row, int64_t* ld) {
  const bool same = sizeof(Row) == (s.dtype == DType::f32 ? 4 : 2);
  if (same && !s.norm && !s.rope && s.sd == 1 && width == s.D) {
    *ld = s.sn;
    return static_cast<const Row*>(s.ptr) + begin * s.sn;
  }
  *ld = width;
  for (int64_t i = 0; i < count; ++i) {
    fetch_row(s, begin + i, row);
    Row* out = buffer + i * width;
    int64_t d = 0;
    for (; d + kLanes <= s.D; d += kLanes) store(out + d, load(row + d));
    for (; d < s.D; ++d) from_float(row[d], out + d);
    for (; d < width; ++d) from_float(0.f, out + d);
  }
  return buffer;
}

// ---- panels ---------------------------------------------------------------------------------------

// A panels whose k runs along the row: group of rows r0.., element [k][r] = row r, k-th unit.
// `units` = width / kPair; rows are read as 32-bit units.
template <class M>
inline void pack_rows(const typename M::Row* rows, int64_t ld, int64_t count, int64_t units,
                      typename M::Elem* panels) {
  typedef typename M::Elem Elem;
  for_groups(count, [&](int64_t r0, int n) {
    Elem* out = panels + r0 * units;
    for (int r = 0; r < n; ++r) {
      const typename M::Row* p = rows + (r0 + r) * ld;
      for (int64_t k = 0; k < units; ++k) std::memcpy(out + k * n + r, p + k * M::kPair, sizeof(Elem));
    }
  });
}

// A panels whose k runs across rows: group of columns d0.., element [k][c] = column d0 + c of row k
// (of the row pair 2k, 2k + 1). A missing second row counts as zero.
inline void pack_columns(const float* rows, int64_t ld, int64_t count, int64_t D, float* panels) {
  for_groups(D, [&](int64_t d0, int n) {
    float* out = panels + d0 * count;
    if (n == kRows) {
      for (int64_t k = 0; k < count; ++k)
        std::memcpy(out + k * kRows, rows + k * ld + d0, kRows * sizeof(float));
    } else {
      for (int64_t k = 0; k < count; ++k)
        for (int c = 0; c < n; ++c) out[k * n + c] = rows[k * ld + d0 + c];
    }
  });
}
inline void pack_columns(const bf16_t* rows, int64_t ld, int64_t count, int64_t D, uint32_t* panels) {
  const int64_t units = ceil_div(count, 2);
  for_groups(D, [&](int64_t d0, int n) {
    uint32_t* out = panels + d0 * units;
    for (int64_t k = 0; k < units; ++k) {
      const bf16_t* a = rows + 2 * k * ld + d0;
      const bool both = 2 * k + 1 < count;
      for (int c = 0; c < n; ++c)
        out[k * n + c] = a[c].bits | (both ? static_cast<uint32_t>(a[ld + c].bits) << 16 : 0u);
    }
  });
}

// B rows: dst[unit * kBlock + m] = unit of row m, for m < count <= kBlock; zero lanes beyond.
template <class M>
inline void pack_lanes(const typename M::Row* rows, int64_t ld, int64_t count, int64_t units,
                       typename M::Elem* dst) {
  typedef typename M::Elem Elem;
  for (int64_t m = 0; m < count; m += kLanes) {
    const int n = static_cast<int>(min64(kLanes, count - m));
    if (ld % M::kPair == 0 && reinterpret_cast<uintptr_t>(rows) % sizeof(Elem) == 0) {
      transpose_rows(reinterpret_cast<const Elem*>(rows + m * ld), ld / M::kPair, n, units, dst + m,
                     static_cast<int64_t>(kBlock));
    } else {
      for (int64_t k = 0; k < units; ++k) {
        Elem* out = dst + k * kBlock + m;
        for (int i = 0; i < n; ++i) std::memcpy(out + i, rows + (m + i) * ld + k * M::kPair, sizeof(Elem));
        for (int i = n; i < kLanes; ++i) out[i] = Elem(0);
      }
    }
  }
}

// ---- scores --------------------------------------------------------------------------------------

// Whether one of some shifts (maxima of scores, in powers of two) is so large that what its rounding left
// would matter by itself: a product of score and factor that is subtracted unrounded keeps it, and 2 to
// that power may be infinite. Below 2^16 it is 1/256 at most.
inline bool is_large(const float* shift, int vecs) {
  for (int m = 0; m < vecs * kLanes; ++m)
    if (!(__builtin_fabsf(shift[m]) < 65536.f)) return true;  // or it is NaN
  return false;
}

// S *= factor, for keys x vecs.
inline void scale_scores(float* s, int64_t keys, int vecs, float factor) {
  for (int64_t k = 0; k < keys; ++k)
    for (int m = 0; m < vecs * kLanes; m += kLanes) {
      float* const at = s + k * kBlock + m;
      store(at, load(at) * splat(factor));
    }
}

// ---- additive terms --------------------------------------------------------------------------------

inline float add_at(const AttnAdd& t, int64_t offset) {
  switch (t.dtype) {
    case 0: return static_cast<const float*>(t.ptr)[offset];
    case 1: return to_float(static_cast<const bf16_t*>(t.ptr)[offset]);
    default: return static_cast<const uint8_t*>(t.ptr)[offset] ? 0.f : -kInf;
  }
}

// A term in powers of two. float32's lowest number stays finite: it drowns a score, -inf hides it.
inline vf log2_term(vf x) {
  return select(x == splat(-kInf), x, vmax(splat(-3.402823466e38f), x * splat(kLog2e)));
}
inline float log2_term(float x) {
  const float y = x * kLog2e;
  return y < -3.402823466e38f && x != -kInf ? -3.402823466e38f : y;
}

// S[k][m] += term(q0 + m, k0 + k) * log2(e) for a tile of keys x count queries.
inline void add_term(const AttnAdd& t, int64_t base, int64_t q0, int64_t count, int64_t k0, int64_t keys,
                     float* s) {
  for (int64_t k = 0; k < keys; ++k) {
    float* row = s + k * kBlock;
    const int64_t offset = base + (k0 + k) * t.sk;
    if (t.sq == 0) {
      const vf value = splat(log2_term(add_at(t, offset)));
      for (int64_t m = 0; m < count; m += kLanes) store(row + m, load(row + m) + value);
      continue;
    }
    if (t.dtype == 0 && t.sk == 1 && k + kLanes <= keys) {
      // A square of the term, rows are queries: transposed in registers.
      for (int64_t m = 0; m < count; m += kLanes) {
        vf r[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          const int64_t q = q0 + min64(m + i, count - 1);
          r[i] = load(static_cast<const float*>(t.ptr) + offset + q * t.sq);
        }
        transpose(r);
        for (int i = 0; i < kLanes; ++i) {
          float* out = row + i * kBlock + m;
          store(out, load(out) + log2_term(r[i]));
        }
      }
      k += kLanes - 1;
      continue;
    }
    for (int64_t m = 0; m < count; ++m) row[m] += log2_term(add_at(t, offset + (q0 + m) * t.sq));
  }
}

// Keys after the query become -inf.
inline void add_causal(int64_t q0, int64_t count, int64_t k0, int64_t keys, float* s) {
  for (int64_t k = 0; k < keys; ++k) {
    const int64_t hidden = min64(count, k0 + k - q0);
    for (int64_t m = 0; m < hidden; ++m) s[k * kBlock + m] = -kInf;
  }
}

}  // namespace
}  // namespace VITFAST_ISA
}  // namespace vitfast
