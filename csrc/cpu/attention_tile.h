// What the attention kernels share about their operands: rows through the prologue, panels of them,
// and what is added to a tile of scores.
#pragma once
#include "../common/dtype.h"
#include "../common/math.h"
#include "attention.h"
#include "attention_product.h"
#include "transpose.h"

namespace vitfast {
namespace VITFAST_ISA {
namespace {

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

// ---- rows through the prologue ------------------------------------------------------------------

// One side (q or k) of one (batch, head).
struct Source {
  const void* ptr;  // [N, D]
  DType dtype;
  int64_t sn, sd, D;
  int norm;
  float eps;
  const float *weight, *bias;  // [D] or null
  const float* rope;           // [N - prefix, 2 D], sines before cosines; or null
  int64_t rope_sn, prefix;
  int half;
};

inline Source source(const AttnArgs& a, const AttnTensor& t, int64_t b, int64_t h) {
  const int64_t offset = b * t.sb + h * t.sh;
  const void* p = a.dtype == DType::f32
                      ? static_cast<const void*>(static_cast<const float*>(t.ptr) + offset)
                      : static_cast<const void*>(static_cast<const bf16_t*>(t.ptr) + offset);
  return Source{p, a.dtype, t.sn, t.sd, a.D, 0, 0.f, nullptr, nullptr, nullptr, 0, 0, 0};
}
inline Source with_prologue(Source s, const AttnPrologue& p, int64_t b, int64_t h,
                            const float* weight, const float* bias) {
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

// out: [D].
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

// Asks the caches for row n, if its elements lie side by side. Inlined, since GCC 12 drops calls of
// functions that do nothing but prefetch.
inline VITFAST_INLINE void prefetch_row(const Source& s, int64_t n) {
  if (s.sd != 1) return;
  const int64_t size = size_of(s.dtype);
  const char* row = static_cast<const char*>(s.ptr) + n * s.sn * size;
  for (int64_t byte = 0; byte < s.D * size; byte += 64) __builtin_prefetch(row + byte, 0, 2);
}

struct Moments {
  float mean, rstd;
};
// x: [D].
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

// x * cos + rotate(x) * sin in place, [D]; `sign` -1 applies the transposed rotation.
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

// x: [D], row n as the products see it, rounded where timm rounds (after the norm, after the
// rotation).
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
// `buffer` ([count][width], zero beyond D; row: scratch [D]). Returns the first row and sets its
// leading dimension.
template <class Row>
inline const Row* fetch_rows(const Source& s, int64_t begin, int64_t count, int64_t width,
                             Row* buffer, float* row, int64_t* ld) {
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

// ---- panels -------------------------------------------------------------------------------------

// A panels whose k runs along the row: group of rows r0.., element [k][r] = row r, k-th unit.
// rows: [count][ld]; panels: [count][units], where `units` = width / kPair.
template <class M>
inline void pack_rows(const typename M::Row* rows, int64_t ld, int64_t count, int64_t units,
                      typename M::Elem* panels) {
  typedef typename M::Elem Elem;
  for_groups(count, [&](int64_t r0, int n) {
    Elem* out = panels + r0 * units;
    for (int r = 0; r < n; ++r) {
      const typename M::Row* p = rows + (r0 + r) * ld;
      for (int64_t k = 0; k < units; ++k)
        std::memcpy(out + k * n + r, p + k * M::kPair, sizeof(Elem));
    }
  });
}

// A panels whose k runs across rows: group of columns d0.., element [k][c] = column d0 + c of row k
// (of the row pair 2k, 2k + 1). A missing second row counts as zero. rows: [count][ld]; panels:
// [D][units of count].
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
inline void pack_columns(const bf16_t* rows, int64_t ld, int64_t count, int64_t D,
                         uint32_t* panels) {
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
// rows: [count][ld]; dst: [units][kBlock].
template <class M>
inline void pack_lanes(const typename M::Row* rows, int64_t ld, int64_t count, int64_t units,
                       typename M::Elem* dst) {
  typedef typename M::Elem Elem;
  for (int64_t m = 0; m < count; m += kLanes) {
    const int n = static_cast<int>(min(kLanes, count - m));
    if (ld % M::kPair == 0 && reinterpret_cast<uintptr_t>(rows) % sizeof(Elem) == 0) {
      transpose_rows(reinterpret_cast<const Elem*>(rows + m * ld), ld / M::kPair, n, units, dst + m,
                     static_cast<int64_t>(kBlock));
    } else {
      for (int64_t k = 0; k < units; ++k) {
        Elem* out = dst + k * kBlock + m;
        for (int i = 0; i < n; ++i)
          std::memcpy(out + i, rows + (m + i) * ld + k * M::kPair, sizeof(Elem));
        for (int i = n; i < kLanes; ++i) out[i] = Elem(0);
      }
    }
  }
}

// ---- scores -------------------------------------------------------------------------------------

// Whether one of some shifts (maxima of scores, in powers of two) is so large that what its
// rounding left would matter by itself: a product of score and factor that is subtracted unrounded
// keeps it, and 2 to that power may be infinite. Below 2^16 it is 1/256 at most. shift: [vecs *
// kLanes].
inline bool is_large(const float* shift, int vecs) {
  for (int m = 0; m < vecs * kLanes; ++m)
    if (!(__builtin_fabsf(shift[m]) < 65536.f)) return true;  // or it is NaN
  return false;
}

// s *= factor, [keys][kBlock], for `vecs` vectors of queries.
inline void scale_scores(float* s, int64_t keys, int vecs, float factor) {
  for (int64_t k = 0; k < keys; ++k)
    for (int m = 0; m < vecs * kLanes; m += kLanes) {
      float* const at = s + k * kBlock + m;
      store(at, load(at) * splat(factor));
    }
}

// ---- additive terms -----------------------------------------------------------------------------

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

// s[k][m] += term(q0 + m, k0 + k) * log2(e) for a tile [keys][kBlock] of `count` queries.
inline void add_term(const AttnAdd& t, int64_t base, int64_t q0, int64_t count, int64_t k0,
                     int64_t keys, float* s) {
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
          const int64_t q = q0 + min(m + i, count - 1);
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

// Keys after the query become -inf in s, [keys][kBlock].
inline void add_causal(int64_t q0, int64_t count, int64_t k0, int64_t keys, float* s) {
  for (int64_t k = 0; k < keys; ++k) {
    const int64_t hidden = min(count, k0 + k - q0);
    for (int64_t m = 0; m < hidden; ++m) s[k * kBlock + m] = -kInf;
  }
}

}  // namespace
}  // namespace VITFAST_ISA
}  // namespace vitfast
