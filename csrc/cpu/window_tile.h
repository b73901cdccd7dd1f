// A window of at most kBlock tokens as one tile. Rows are read where they lie: no copies of k, nor
// of v in float32. The bias, the mask and the maximum go along with the scores.
#pragma once
#include "attention_block.h"
#include "window_rows.h"

namespace vitfast {
namespace VITFAST_ISA {
namespace {

// Keys where they lie, one pointer for each: [key] rows of [D].
template <class M>
struct RowKeys {
  const typename M::Row* const* rows;
  RowKeys from(int64_t key, int64_t) const { return {rows + key}; }
  template <int R>
  const void* unit(int64_t k, int r) const {
    return rows[r] + k * M::kPair;
  }
};
// Values transposed, one pointer for each unit of keys: [unit] rows of [D], of which columns from
// d.
template <class M>
struct ValueColumns {
  const typename M::Elem* const* rows;
  int64_t d = 0;
  ValueColumns from(int64_t column, int64_t) const { return {rows, column}; }
  template <int R>
  const void* unit(int64_t k, int r) const {
    return rows[k] + d + r;
  }
};

// q k * factor + bias + mask.
struct Terms {
  float factor;
  const float* bias;  // [key][ld], or null
  int64_t ld;
  const float *query_bands, *key_bands;  // [query] and [key], or null
  inline vf operator()(int64_t key, int lane, vf product) const {
    vf value = unfused(product * factor);  // the backward has to come to the same
    if (bias) value = value + load(bias + key * ld + lane);
    if (query_bands)
      value =
          value + select(load(query_bands + lane) == splat(key_bands[key]), zero(), splat(kHidden));
    return value;
  }
};

// Query rows, [count] of [D], as B operand, [units][kBlock]; lanes beyond `count` are zero.
template <class M>
inline void pack_lanes_of(const typename M::Row* const* rows, int64_t count, int64_t units,
                          typename M::Elem* dst) {
  for (int64_t m = 0; m < count; m += kLanes) {
    const int n = static_cast<int>(min(kLanes, count - m));
    int64_t c = 0;
    for (; c + kLanes <= units; c += kLanes) {
      vf r[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        r[i] = zero();
        if (i < n) std::memcpy(&r[i], rows[m + i] + c * M::kPair, sizeof(vf));
      }
      transpose(r);
      for (int i = 0; i < kLanes; ++i) std::memcpy(dst + (c + i) * kBlock + m, &r[i], sizeof(vf));
    }
    for (; c < units; ++c)
      for (int i = 0; i < kLanes; ++i) {
        typename M::Elem value(0);
        if (i < n) std::memcpy(&value, rows[m + i] + c * M::kPair, sizeof value);
        dst[c * kBlock + m + i] = value;
      }
  }
}

// Rows of values, [count] of [D], as the units that products over keys take: units, [count / kPair]
// of [D], which lie in `pairs`, or are the rows.
inline void pair_values(const float* const* rows, int64_t count, int64_t, float*,
                        const float** units) {
  for (int64_t k = 0; k < count; ++k) units[k] = rows[k];
}
#if defined(VITFAST_HAS_BF16_DOT)
inline void pair_values(const bf16_t* const* rows, int64_t count, int64_t D, uint32_t* pairs,
                        const uint32_t** units) {
  for (int64_t k = 0; k < count; k += 2, pairs += D) {
    units[k / 2] = pairs;
    const bf16_t *a = rows[k], *b = k + 1 < count ? rows[k + 1] : nullptr;
    int64_t d = 0;
    for (; d + kLanes <= D; d += kLanes) {
      vh low, high = {};
      std::memcpy(&low, a + d, sizeof low);
      if (b) std::memcpy(&high, b + d, sizeof high);
      const vu pair = widen(low) | (widen(high) << 16);
      std::memcpy(pairs + d, &pair, sizeof pair);
    }
    for (; d < D; ++d) pairs[d] = a[d].bits | (b ? static_cast<uint32_t>(b[d].bits) << 16 : 0u);
  }
}
#endif

}  // namespace
}  // namespace VITFAST_ISA
}  // namespace vitfast
