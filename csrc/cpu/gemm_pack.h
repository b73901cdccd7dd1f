// A stretch of one panel of B, from where it lies to the order that the tiles read it in.
#pragma once
#include "gemm.h"
#include "gemm_tile.h"
#include "transpose.h"

namespace vitfast {
namespace VITFAST_ISA {
namespace {

inline bool in_pairs(DType compute) { return kHasPairs && compute == DType::bf16; }
inline int64_t steps_of(int64_t k, DType compute) { return in_pairs(compute) ? ceil_div(k, 2) : k; }
inline int64_t panels_of(int64_t n) { return ceil_div(n, kPanel); }

inline uint32_t word_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}
inline uint32_t half_of(bf16_t x) { return x.bits; }
inline uint32_t half_of(float x) {
  bf16_t rounded;
  from_float(x, &rounded);
  return rounded.bits;
}

// How elements of type T become words: floats, floats rounded to bfloat16, or pairs of bfloat16.
enum class Words { floats, rounded, pairs };

template <class T, Words W>
inline uint32_t whole_word(const T* p, int64_t stride) {
  if constexpr (W == Words::pairs) return half_of(p[0]) | half_of(p[stride]) << 16;
  if constexpr (W == Words::rounded) return half_of(p[0]) << 16;
  return word_of(to_float(p[0]));
}

// kLanes words of one column whose elements lie side by side.
template <class T, Words W>
inline vu words(const T* p) {
  if constexpr (W == Words::floats) return reinterpret_cast<vu>(load(p));
  if constexpr (W == Words::rounded) return __builtin_convertvector(to_bf16(load(p)), vu) << 16;
  if constexpr (W == Words::pairs) {
    vu pairs;
    if constexpr (sizeof(T) == 2) {
      std::memcpy(&pairs, p, sizeof pairs);
    } else {
      const vh low = to_bf16(load(p)), high = to_bf16(load(p + kLanes));
      std::memcpy(&pairs, &low, sizeof low);
      std::memcpy(reinterpret_cast<char*>(&pairs) + sizeof low, &high, sizeof high);
    }
    return pairs;
  }
}

// Steps [begin, end) of `width` columns of b, [k, width], to [end - begin][kPanel] words; the other
// columns are 0.
template <class T, Words W>
void pack_columns(const T* b, int64_t n_stride, int64_t k_stride, int64_t width, int64_t k,
                  int64_t begin, int64_t end, uint32_t* to) {
  constexpr int64_t per = W == Words::pairs ? 2 : 1;
  const int64_t whole = k / per;  // steps that take all their elements
  const int64_t squares =
      k_stride == 1 ? begin + (min(end, whole) - begin) / kLanes * kLanes : begin;
  for (int64_t s = begin; s < squares; s += kLanes) {
    uint32_t* const row = to + (s - begin) * kPanel;
#pragma GCC unroll 2
    for (int64_t c0 = 0; c0 < kPanel; c0 += kLanes) {
      vu square[kLanes];
      for (int64_t c = 0; c < kLanes; ++c)
        square[c] = c0 + c < width ? words<T, W>(b + (c0 + c) * n_stride + s * per) : vu{};
      transpose(square);
      for (int64_t i = 0; i < kLanes; ++i)
        std::memcpy(row + i * kPanel + c0, &square[i], sizeof(vu));
    }
  }
  for (int64_t s = squares; s < end; ++s) {
    uint32_t* const row = to + (s - begin) * kPanel;
    const T* const p = b + s * per * k_stride;
    if (s >= whole) {  // the odd element of a pair
      for (int64_t c = 0; c < width; ++c) row[c] = half_of(p[c * n_stride]);
    } else if (n_stride == 1) {
      for (int64_t c = 0; c < width; ++c) row[c] = whole_word<T, W>(p + c, k_stride);
    } else {
      for (int64_t c = 0; c < width; ++c) row[c] = whole_word<T, W>(p + c * n_stride, k_stride);
    }
    for (int64_t c = width; c < kPanel; ++c) row[c] = 0;
  }
}

template <class T, Words W>
void pack_as(const GemmB& b, const void* half, int64_t panel, int64_t begin, int64_t end,
             uint32_t* to) {
  const int64_t first = panel * kPanel, left = b.n - first;
  pack_columns<T, W>(static_cast<const T*>(half) + first * b.n_stride, b.n_stride, b.k_stride,
                     min(left, kPanel), b.k, begin, end, to);
}

// Steps [begin, end) of a panel of one half of B, [k, n], to [end - begin][kPanel] words.
inline void pack_steps(const GemmB& b, DType compute, const void* half, int64_t panel,
                       int64_t begin, int64_t end, uint32_t* to) {
  const bool from_floats = b.dtype == DType::f32;
  if (in_pairs(compute)) {
    from_floats ? pack_as<float, Words::pairs>(b, half, panel, begin, end, to)
                : pack_as<bf16_t, Words::pairs>(b, half, panel, begin, end, to);
  } else if (!from_floats) {
    pack_as<bf16_t, Words::floats>(b, half, panel, begin, end, to);
  } else if (compute == DType::bf16) {
    pack_as<float, Words::rounded>(b, half, panel, begin, end, to);
  } else {
    pack_as<float, Words::floats>(b, half, panel, begin, end, to);
  }
}

}  // namespace
}  // namespace VITFAST_ISA
}  // namespace vitfast
