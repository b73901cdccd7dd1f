// Packing B for gemm: panels of kPanel columns, in each the steps in order, in each the columns.
#include "../common/parallel.h"
#include "gemm.h"
#include "gemm_tile.h"

namespace vitfast {
namespace VITFAST_ISA {
namespace {

// Steps packed together: a cache line of each column.
constexpr int kTogether = 16;

inline int64_t panels_of(int64_t n) { return (n + kPanel - 1) / kPanel; }
inline bool in_pairs(DType compute) { return kHasPairs && compute == DType::bf16; }
inline int64_t steps_of(int64_t k, DType compute) { return in_pairs(compute) ? (k + 1) / 2 : k; }

inline uint32_t bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}
// The number in the working dtype: bfloat16 products take rounded operands, also widened ones.
template <class T, bool Round>
inline uint32_t word(T x) {
  if constexpr (Round && sizeof(T) == 4) {
    bf16_t rounded;
    from_float(x, &rounded);
    return bits(to_float(rounded));
  }
  return bits(to_float(x));
}
template <class T>
inline uint32_t half(T x) {
  bf16_t rounded;
  if constexpr (sizeof(T) == 2) {
    rounded = x;
  } else {
    from_float(x, &rounded);
  }
  return rounded.bits;
}

// `count` <= kTogether steps of one column, from step j.
template <class T, bool InPairs, bool Round>
inline void column(const T* b, int64_t stride, int64_t j, int64_t count, int64_t k, uint32_t* to) {
  if constexpr (InPairs) {
    const T* p = b + 2 * j * stride;
    const int64_t whole = 2 * (j + count) <= k ? count : count - 1;
    if (stride == 1) {
      for (int64_t i = 0; i < whole; ++i) to[i] = half(p[2 * i]) | half(p[2 * i + 1]) << 16;
    } else {
      for (int64_t i = 0; i < whole; ++i)
        to[i] = half(p[2 * i * stride]) | half(p[(2 * i + 1) * stride]) << 16;
    }
    if (whole < count) to[whole] = half(p[2 * whole * stride]);
  } else {
    const T* p = b + j * stride;
    if (stride == 1) {
      for (int64_t i = 0; i < count; ++i) to[i] = word<T, Round>(p[i]);
    } else {
      for (int64_t i = 0; i < count; ++i) to[i] = word<T, Round>(p[i * stride]);
    }
  }
}

// One panel of columns that lie side by side: every step is a row of B.
template <class T, bool InPairs, bool Round>
void panel_of_rows(const T* b, int64_t width, int64_t k, int64_t k_stride, uint32_t* to) {
  const int64_t steps = InPairs ? (k + 1) / 2 : k;
  for (int64_t j = 0; j < steps; ++j, to += kPanel) {
    if constexpr (InPairs) {
      const T* const even = b + 2 * j * k_stride;
      if (2 * j + 1 < k) {
        const T* const odd = even + k_stride;
        for (int64_t c = 0; c < width; ++c) to[c] = half(even[c]) | half(odd[c]) << 16;
      } else {
        for (int64_t c = 0; c < width; ++c) to[c] = half(even[c]);
      }
    } else {
      const T* const row = b + j * k_stride;
      for (int64_t c = 0; c < width; ++c) to[c] = word<T, Round>(row[c]);
    }
    for (int64_t c = width; c < kPanel; ++c) to[c] = 0;
  }
}

template <class T, bool InPairs, bool Round>
void panel(const T* b, int64_t width, const GemmPack& p, uint32_t* to) {
  if (p.n_stride == 1 && p.k_stride != 1) {
    panel_of_rows<T, InPairs, Round>(b, width, p.k, p.k_stride, to);
    return;
  }
  const int64_t steps = InPairs ? (p.k + 1) / 2 : p.k;
  uint32_t block[kPanel][kTogether] = {};
  for (int64_t j = 0; j < steps; j += kTogether) {
    const int64_t count = steps - j < kTogether ? steps - j : kTogether;
    for (int64_t c = 0; c < width; ++c)
      column<T, InPairs, Round>(b + c * p.n_stride, p.k_stride, j, count, p.k, block[c]);
    for (int64_t i = 0; i < count; ++i, to += kPanel)
      for (int64_t c = 0; c < kPanel; ++c) to[c] = block[c][i];
  }
}

template <class T, bool InPairs, bool Round>
void pack(const GemmPack& p) {
  const int64_t halves = p.gate_b != nullptr ? 2 : 1, panels = panels_of(p.n);
  const int64_t words = steps_of(p.k, p.compute) * kPanel;
  uint32_t* const packed = static_cast<uint32_t*>(p.packed);
  parallel_for(panels * halves, p.threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i / halves * kPanel;
      const int64_t width = p.n - first < kPanel ? p.n - first : kPanel;
      const T* const b = static_cast<const T*>(i % halves != 0 ? p.gate_b : p.b);
      panel<T, InPairs, Round>(b + first * p.n_stride, width, p, packed + i * words);
    }
  });
}

}  // namespace

void gemm_pack(const GemmPack& p) {
  const bool bf16 = p.compute == DType::bf16, from_bf16 = p.dtype == DType::bf16;
  if (in_pairs(p.compute)) {
    from_bf16 ? pack<bf16_t, true, false>(p) : pack<float, true, false>(p);
  } else if (from_bf16) {
    pack<bf16_t, false, false>(p);
  } else {
    bf16 ? pack<float, false, true>(p) : pack<float, false, false>(p);
  }
}

int64_t gemm_packed_bytes(int64_t n, int64_t k, DType compute, bool gated) {
  return (gated ? 2 : 1) * panels_of(n) * steps_of(k, compute) * kPanel * kStepBytes;
}

int gemm_format() { return kHasPairs ? -kPanel : kPanel; }

}  // namespace VITFAST_ISA
}  // namespace vitfast
