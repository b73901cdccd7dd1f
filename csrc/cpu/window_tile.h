// A window of at most kBlock tokens as one tile. Rows are read where they lie: no copies of k, nor of v
// in float32. The bias, the mask and the maximum go along with the scores.
#pragma once
#include "attention_block.h"
#include "window_rows.h"

namespace vitfast {
namespace VITFAST_ISA {
namespace {

// The panel of a product where it lies: acc[r][v] += sum_i panel.unit(i, r) * b[i * kBlock + v].
template <class M, int R, int NV, class Panel>
inline __attribute__((always_inline)) void multiply_by(const Panel& panel, const typename M::Elem* __restrict__ b,
                                                       int64_t units, vf (&acc)[R][NV]) {
  for (int64_t i = 0; i < units; ++i, b += kBlock) {
    vf row[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) row[v] = load_bits(b + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      typename M::Elem value;
      std::memcpy(&value, panel.template unit<R>(i, r), sizeof value);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) acc[r][v] = M::mac(acc[r][v], row[v], value);
    }
  }
}

// Packed by pack_rows.
template <class M>
struct PanelKeys {
  const typename M::Elem* panel;
  template <int R>
  const void* unit(int64_t i, int r) const {
    return panel + i * R + r;
  }
};
// One pointer for each key.
template <class M>
struct RowKeys {
  const typename M::Row* const* rows;
  template <int R>
  const void* unit(int64_t i, int r) const {
    return rows[r] + i * M::kPair;
  }
};
// One pointer for each unit of keys, and columns from d.
template <class M>
struct ValueColumns {
  const typename M::Elem* const* rows;
  int64_t d;
  template <int R>
  const void* unit(int64_t i, int r) const {
    return rows[i] + d + r;
  }
};

// scores[key][query] = q k * factor + bias + mask, and their maximum over keys.
template <class M, class Keys>
struct TermScores {
  Keys keys;
  const typename M::Elem* lanes;  // of the queries
  int64_t units;
  float factor;
  const float* bias;  // [key][ld] or null
  int64_t ld;
  const float *query_bands, *key_bands;  // or null
  float *s, *max;

  template <int R, int NV>
  inline void run() const {
    vf acc[R][NV] = {};
    multiply_by<M, R, NV>(keys, lanes, units, acc);
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      vf top = load(max + v * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        vf value = unfused(acc[r][v] * factor);  // the backward has to come to the same
        if (bias) value = value + load(bias + r * ld + v * kLanes);
        if (query_bands)
          value = value + select(load(query_bands + v * kLanes) == splat(key_bands[r]), zero(), splat(kHidden));
        store(s + r * kBlock + v * kLanes, value);
        top = vmax(top, value);
      }
      store(max + v * kLanes, top);
    }
  }
};

// O[d][query] = sum over keys of v[key][d] * p[key][query]
template <class M>
struct TileOutput {
  ValueColumns<M> values;
  const typename M::Elem* lanes;
  int64_t units;
  float* o;

  template <int R, int NV>
  inline void run() const {
    vf acc[R][NV] = {};
    multiply_by<M, R, NV>(values, lanes, units, acc);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) store(o + r * kBlock + v * kLanes, acc[r][v]);
    }
  }
};

// Query rows as B operand; lanes beyond `count` are zero.
template <class M>
inline void pack_lanes_of(const typename M::Row* const* rows, int64_t count, int64_t units,
                          typename M::Elem* dst) {
  for (int64_t m = 0; m < count; m += kLanes) {
    const int n = static_cast<int>(min64(kLanes, count - m));
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

// Rows of values as the units that products over keys take.
inline void pair_values(const float* const* rows, int64_t count, int64_t, float*, const float** units) {
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
