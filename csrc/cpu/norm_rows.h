// What the forward and the backward of the norms share: loops over a row, statistics, layout.
#pragma once
#include <cstring>
#include <type_traits>

#include "../common/math.h"
#include "../common/parallel.h"
#include "../common/scratch.h"
#include "norm.h"
#include "simd.h"

namespace vitfast {
namespace VITFAST_ISA {
namespace {

// A whole vector, or the n lanes left at the end of a row.
struct Whole {};
struct Part {
  int n;
};
template <class T>
inline vf load(const T* p, Whole) {
  return load(p);
}
template <class T>
inline vf load(const T* p, Part s) {
  return load_n(p, s.n);
}
template <class T>
inline void store(T* p, vf v, Part s) {
  store_n(p, v, s.n);
}
inline void store(float* p, vf v, Whole) { store(p, v); }
// Stores, and gives back the value as it was rounded; `past` goes past the caches.
inline vf put(float* p, vf v, Whole, bool past) {
  if (past)
    stream(p, v);
  else
    store(p, v);
  return v;
}
inline vf put(bf16_t* p, vf v, Whole, bool past) {
  const vh h = to_bf16(v);
  if (past)
    stream(p, h);
  else
    store(p, h);
  return from_bf16(h);
}
inline vf put(float* p, vf v, Part s, bool) {
  store_n(p, v, s.n);
  return v;
}
inline vf put(bf16_t* p, vf v, Part s, bool) {
  store_n(p, v, s.n);
  return from_bf16(to_bf16(v));
}
inline vf keep(vf v, Whole) { return v; }
inline vf keep(vf v, Part s) {
  vi lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return select(lane < s.n, v, zero());
}

// f(c, slot, span) over a row; slots 0 to 3 let sums run in independent accumulators.
template <class F>
inline void over(int64_t C, const F& f) {
  int64_t c = 0;
  for (; c + 4 * kLanes <= C; c += 4 * kLanes) {
    f(c, 0, Whole{});
    f(c + kLanes, 1, Whole{});
    f(c + 2 * kLanes, 2, Whole{});
    f(c + 3 * kLanes, 3, Whole{});
  }
  for (; c + kLanes <= C; c += kLanes) f(c, 0, Whole{});
  if (c < C) f(c, 0, Part{static_cast<int>(C - c)});
}

// Sums of a row: float in 4 vectors of lanes, double where these come together, so that the error
// of a row's mean and deviation is that of one rounding.
struct Sums {
  vf v[4] = {};
  double total() const { return sum_lanes((v[0] + v[1]) + (v[2] + v[3])); }
};

inline char* at(const Rows& r, int64_t b, int64_t n) {
  return static_cast<char*>(r.ptr) + (b * r.outer + n * r.inner) * size_of(r.dtype);
}
template <class T>
inline T* at(const Rows& r, int64_t b, int64_t n) {
  return static_cast<T*>(r.ptr) + b * r.outer + n * r.inner;
}
inline void put(const Channels& out, int64_t c, float value) {
  if (out.dtype == DType::f32)
    from_float(value, static_cast<float*>(out.ptr) + c);
  else
    from_float(value, static_cast<bf16_t*>(out.ptr) + c);
}

// Floats that a [C] vector of scratch takes: whole cache lines.
inline int64_t padded(int64_t C) { return align64(C * 4) / 4; }

// f(address, c, length) for each stretch of a row in memory, from channel c on: the row, or the
// four pixels of a patch, null past the map's edges.
template <class F>
inline void stretches(const Rows& r, int64_t b, int64_t n, int64_t C, const F& f) {
  if (r.H == 0) return f(at(r, b, n), int64_t{0}, C);
  const int64_t across = ceil_div(r.W, 2), length = C / 4;
  const int64_t top = n / across * 2, left = n % across * 2;
  for (int k = 0; k < 4; ++k) {
    const int64_t h = top + k % 2, w = left + k / 2;
    const int64_t offset = b * r.outer + h * r.inner + w * r.column;
    f(h < r.H && w < r.W ? static_cast<char*>(r.ptr) + offset * size_of(r.dtype) : nullptr,
      k * length, length);
  }
}

// Bits as they are: conversions may lose denormals.
template <class T>
inline void copy(const T* from, T* to, Whole, bool past) {
  std::conditional_t<std::is_same_v<T, float>, vf, vh> bits;
  std::memcpy(&bits, from, sizeof bits);
  if (past)
    stream(to, bits);
  else
    store(to, bits);
}
template <class T>
inline void copy(const T* from, T* to, Part s, bool) {
  std::memcpy(to, from, s.n * sizeof(T));
}
// from, to: [C].
template <class From, class To>
void convert(const void* from_, void* to_, bool stream_out, int64_t C) {
  const From* from = static_cast<const From*>(from_);
  To* to = static_cast<To*>(to_);
  over(C, [&](int64_t c, int, auto span) VITFAST_INLINE {
    if constexpr (std::is_same_v<From, To>)
      copy(from + c, to + c, span, stream_out);
    else
      put(to + c, load(from + c, span), span, stream_out);
  });
}
using Convert = void (*)(const void*, void*, bool, int64_t);
inline Convert convert_for(DType from, DType to) {
  if (from == DType::f32) return to == DType::f32 ? convert<float, float> : convert<float, bf16_t>;
  return to == DType::f32 ? convert<bf16_t, float> : convert<bf16_t, bf16_t>;
}
// A row or [C] vector as floats: where it lies, or converted into `scratch`, [C].
inline const float* floats(const void* p, DType dtype, float* scratch, int64_t C) {
  if (dtype == DType::f32) return static_cast<const float*>(p);
  convert<bf16_t, float>(p, scratch, false, C);
  return scratch;
}
inline const float* floats(const Rows& r, int64_t b, int64_t n, float* scratch, int64_t C) {
  if (r.H == 0) return floats(at(r, b, n), r.dtype, scratch, C);
  const Convert gather = convert_for(r.dtype, DType::f32);
  stretches(r, b, n, C, [&](const void* pixel, int64_t c, int64_t length) {
    if (pixel != nullptr)
      gather(pixel, scratch + c, false, length);
    else
      std::memset(scratch + c, 0, length * sizeof(float));
  });
  return scratch;
}
inline const float* floats(const Channels& v, float* scratch, int64_t C, float absent) {
  if (v.ptr != nullptr) return floats(v.ptr, v.dtype, scratch, C);
  for (int64_t c = 0; c < C; ++c) scratch[c] = absent;
  return scratch;
}

// scale = drop * gamma, [C] each, the factor of the branch in one sample; gamma null: one.
inline const float* sample_scale(const float* gamma, float drop, float* scale, int64_t C) {
  over(C, [&](int64_t c, int, auto span) VITFAST_INLINE {
    store(scale + c, gamma != nullptr ? load(gamma + c, span) * drop : splat(drop), span);
  });
  return scale;
}

// The sum of a row, [C], or of its squares.
inline double row_sum(const float* row, int64_t C, bool square) {
  Sums sums;
  over(C, [&](int64_t c, int slot, auto span) VITFAST_INLINE {
    const vf v = load(row + c, span);
    sums.v[slot] = square ? fma(v, v, sums.v[slot]) : sums.v[slot] + v;
  });
  return sums.total();
}

// The sum of partials[block * step] in the order of the blocks, with Kahan's correction (which
// turns infinity into NaN: then the plain sum counts).
template <class Span>
inline vf sum_blocks(const float* partials, int64_t blocks, int64_t step, Span span) {
  vf sum = zero(), lost = zero(), plain = zero();
  for (int64_t i = 0; i < blocks; ++i) {
    const vf value = load(partials + i * step, span);
    const vf next = value - lost, longer = sum + next;
    lost = (longer - sum) - next;
    sum = longer;
    plain = plain + value;
  }
  return select(sum == sum, sum, plain);
}

struct Moments {
  float mean, rstd;
  float shift;  // -(true mean - mean) * rstd: what rounding took from the mean, for outputs
};

// Bit k: quarter k of row n is a pixel past the edge of the map.
inline int padded_quarters(const Rows& r, int64_t n) {
  if (r.H == 0) return 0;
  const int64_t across = ceil_div(r.W, 2);
  return (n / across * 2 + 1 == r.H ? 0b1010 : 0) | (n % across * 2 + 1 == r.W ? 0b1100 : 0);
}

// From the row, [C], and its sum (rms: its sum of squares). The second pass also sums the
// deviations: they are exact where the mean is far from zero, and correct both the mean and the
// variance. Deviations of padding are all the same, and would all be rounded the same way in a
// float sum.
inline Moments moments(const float* row, int64_t C, double sum, bool rms, double eps, int padded) {
  const double n = static_cast<double>(C);
  if (rms) return {0.f, static_cast<float>(1. / __builtin_sqrt(sum / n + eps)), 0.f};
  const vf mean = splat(static_cast<float>(sum / n));
  Sums first, second;
  const auto add = [&](int64_t c, int slot, auto span) VITFAST_INLINE {
    const vf d = keep(load(row + c, span) - mean, span);
    first.v[slot] = first.v[slot] + d;
    second.v[slot] = fma(d, d, second.v[slot]);
  };
  double zeros = 0.;
  if (padded == 0) over(C, add);
  for (int k = 0; padded != 0 && k < 4; ++k) {
    if (padded >> k & 1)
      zeros += n / 4.;
    else
      over(C / 4, [&](int64_t c, int slot, auto span)
                      VITFAST_INLINE { add(k * (C / 4) + c, slot, span); });
  }
  const double m = mean[0];
  const double delta = (first.total() - zeros * m) / n;
  double var = (second.total() + zeros * m * m) / n - delta * delta;
  var = var < 0. ? 0. : var;  // a NaN stays
  const double rstd = 1. / __builtin_sqrt(var + eps);
  return {mean[0], static_cast<float>(rstd), static_cast<float>(-delta * rstd)};
}

// Rows of a block over which a sum goes as floats. It depends on the number of rows alone: blocks
// of 16 to 64 keep a float's accuracy; more than 1024 of them would cost memory.
inline int64_t block_of(int64_t rows) {
  return max(clamp(ceil_div(rows, 64), 16, 64), ceil_div(rows, 1024));
}

// Two threads pay from about 16k elements on.
inline int team_size(int64_t elements, int threads) {
  return static_cast<int>(min(1 + elements / 16384, threads));
}

// Stores past the caches pay where a call touches more than they hold, and need aligned rows.
inline bool past_cache(const Rows& out, int64_t call_bytes) {
  const int64_t vector = kLanes * size_of(out.dtype);
  const auto misaligned = [&](int64_t v) { return v % vector != 0; };
  return out.ptr != nullptr && call_bytes >= (int64_t{32} << 20) &&
         !misaligned(static_cast<int64_t>(reinterpret_cast<uintptr_t>(out.ptr))) &&
         !misaligned(out.outer * size_of(out.dtype)) &&
         !misaligned(out.inner * size_of(out.dtype)) &&
         !misaligned(out.column * size_of(out.dtype));
}

}  // namespace
}  // namespace VITFAST_ISA
}  // namespace vitfast
