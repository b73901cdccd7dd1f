// The forward of flash attention over a block of queries, whatever the queries and keys are: rows
// of a dense problem (attention_forward.cpp) or of a window (window_forward.cpp).
#pragma once
#include "attention_tile.h"

namespace vitfast {
namespace VITFAST_ISA {
namespace {

constexpr int64_t kTileKeys = 96;  // S (24 KiB) and one panel of V stay in L1

// Scores of one block of queries against a tile of keys, and the running maximum. `value`(key,
// lane, product) is the score: the product itself, or what a problem makes of it.
struct Product {
  inline vf operator()(int64_t, int, vf product) const { return product; }
};
template <class Value>
struct Scores {
  Value value;
  float* s;    // [key][kBlock]
  float* max;  // [kBlock]
  template <int R, int NV>
  inline VITFAST_INLINE void operator()(int64_t key, const vf (&acc)[R][NV]) const {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      vf top = load(max + v * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const vf score = value(key + r, v * kLanes, acc[r][v]);
        store(s + (key + r) * kBlock + v * kLanes, score);
        top = vmax(top, score);
      }
      store(max + v * kLanes, top);
    }
  }
};

// O = O * alpha + V^T P. A tile is summed on its own: fewer roundings in a chain than on top of all
// tiles before.
struct Rescale {
  float* o;            // [d][kBlock]
  const float* alpha;  // [kBlock]
  template <int R, int NV>
  inline VITFAST_INLINE void operator()(int64_t d, const vf (&acc)[R][NV]) const {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      const vf scale = load(alpha + v * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        float* at = o + (d + r) * kBlock + v * kLanes;
        store(at, fma(load(at), scale, acc[r][v]));
      }
    }
  }
};

// P = 2^(S * c - shift), in place (s: [keys][kBlock]) or as bfloat16 pairs ([keys / 2][kBlock]),
// and its sums over keys; shift, sum: [kBlock].
template <int NV>
inline void exponentials(F32, float* s, int64_t keys, float c, const float* shift, float* sum,
                         float*) {
  vf offset[NV], total[NV];
  for (int v = 0; v < NV; ++v) {
    offset[v] = load(shift + v * kLanes);
    total[v] = zero();
  }
  const vf cc = splat(c);
  for (int64_t k = 0; k < keys; ++k) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      float* at = s + k * kBlock + v * kLanes;
      const vf p = exp2_nonpositive(load(at) * cc - offset[v]);
      total[v] = total[v] + p;
      store(at, p);
    }
  }
  for (int v = 0; v < NV; ++v) store(sum + v * kLanes, total[v]);
}

#if defined(VITFAST_HAS_BF16_DOT)
template <int NV>
inline void exponentials(Bf16, float* s, int64_t keys, float c, const float* shift, float* sum,
                         uint32_t* pairs) {
  vf offset[NV], total[NV];
  for (int v = 0; v < NV; ++v) {
    offset[v] = load(shift + v * kLanes);
    total[v] = zero();
  }
  const vf cc = splat(c);
  for (int64_t k = 0; k < keys; k += 2) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      const float* at = s + k * kBlock + v * kLanes;
      const vf p0 = exp2_bf16(load(at) * cc - offset[v]);
      const vf p1 = k + 1 < keys ? exp2_bf16(load(at + kBlock) * cc - offset[v]) : zero();
      total[v] = total[v] + (p0 + p1);
      _mm512_storeu_si512(pairs + (k / 2) * kBlock + v * kLanes, pair_bf16(p0, p1));
    }
  }
  for (int v = 0; v < NV; ++v) store(sum + v * kLanes, total[v]);
}
#endif

template <class M>
inline void exponentials(int vecs, float* s, int64_t keys, float c, const float* shift, float* sum,
                         typename M::Elem* pairs) {
  switch (vecs) {
    case 1: exponentials<1>(M{}, s, keys, c, shift, sum, pairs); break;
#if defined(__AVX512F__)
    case 4: exponentials<4>(M{}, s, keys, c, shift, sum, pairs); break;
    case 3: exponentials<3>(M{}, s, keys, c, shift, sum, pairs); break;
#endif
    default: exponentials<2>(M{}, s, keys, c, shift, sum, pairs); break;
  }
}

// Per-thread memory, carved from one allocation.
template <class M>
struct Workspace {
  typedef typename M::Elem Elem;
  typedef typename M::Row Row;
  Elem *q, *k, *v;           // q: [block][unit][kBlock]; k, v: panels of kTileKeys keys
  Elem* pairs;               // [kTileKeys / 2][kBlock]: bfloat16 probabilities
  float* o;                  // [block][D][kBlock]
  float* s;                  // [kTileKeys][kBlock]
  float* row;                // [D]
  float *max, *shift, *sum;  // [block][kBlock]
  Row* rows;                 // [kTileKeys or kBlock][width]

  static int64_t bytes(int64_t blocks, int64_t D) { return Workspace().carve(nullptr, blocks, D); }
  int64_t carve(char* base, int64_t blocks, int64_t D) {
    const int64_t units = ceil_div(D, M::kPair), width = units * M::kPair;
    int64_t used = 0;
    used = take(base, used, q, blocks * units * kBlock);
    used = take(base, used, k, kTileKeys * units);
    used = take(base, used, v, ceil_div(kTileKeys, M::kPair) * D);
    used = take(base, used, pairs, M::kPair == 1 ? 0 : kTileKeys / 2 * kBlock);
    used = take(base, used, o, blocks * D * kBlock);
    used = take(base, used, s, kTileKeys * kBlock);
    used = take(base, used, row, D);
    used = take(base, used, max, blocks * kBlock);
    used = take(base, used, shift, blocks * kBlock);
    used = take(base, used, sum, blocks * kBlock);
    return take(base, used, rows, (kTileKeys > kBlock ? kTileKeys : kBlock) * width);
  }
};

inline const float* probabilities(const Workspace<F32>& w, F32) { return w.s; }
#if defined(VITFAST_HAS_BF16_DOT)
inline const uint32_t* probabilities(const Workspace<Bf16>& w, Bf16) { return w.pairs; }
#endif

// o[d][query] / sum[query] -> out(query)[d] for queries [0, count); out gives null for one that
// nobody wants. o: [D][kBlock]; sum: [kBlock].
template <class T, class Out>
inline void write_output(const float* o, const float* sum, int64_t count, int64_t D, int64_t sd,
                         const Out& out) {
  for (int64_t m = 0; m < count; m += kLanes) {
    const int n = static_cast<int>(min(kLanes, count - m));
    const vf total = load(sum + m);
    const vf inverse = select(total == 0.f, zero(), splat(1.f) / total);
    T* rows[kLanes];
    for (int i = 0; i < n; ++i) rows[i] = out(m + i);
    int64_t d = 0;
    if (sd == 1)
      for (; d + kLanes <= D; d += kLanes) {
        vf r[kLanes];
        for (int i = 0; i < kLanes; ++i) r[i] = load(o + (d + i) * kBlock + m) * inverse;
        transpose(r);
        for (int i = 0; i < n; ++i)
          if (rows[i]) store(rows[i] + d, r[i]);
      }
    for (; d < D; ++d) {
      const vf value = load(o + d * kBlock + m) * inverse;
      for (int i = 0; i < n; ++i)
        if (rows[i]) from_float(value[i], rows[i] + d * sd);
    }
  }
}

// p: [n].
inline void flip_signs(float* p, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = -p[i];
}
inline void flip_signs(uint32_t* p, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] ^= 0x80008000u;
}

// Queries [q0, q1) of a problem P, which has
// - D, scale, and terms: whether something is added to the scores;
// - last_key(q1): past the keys they see;
// - hidden(first, count, k0): no query of a block sees a key from k0 on;
// - queries, keys, values (begin, count, width, w, &ld): rows of M::Row;
// - prefetch(begin, end): keys and values of these rows come next;
// - add_scores(w, lanes, units, factor, first, count, k0, keys, top): w.s = scores * factor with
//   what is added to them, in powers of two, and their maximum with `top`;
// - write(first, count, o, sum, shift): takes O, its sums, and what was taken off the scores.
template <class M, class P>
inline void attend(const P& p, int64_t q0, int64_t q1, const Workspace<M>& w) {
  typedef typename M::Row Row;
  const int64_t D = p.D, units = ceil_div(D, M::kPair), width = units * M::kPair;
  const int64_t blocks = ceil_div(q1 - q0, kBlock);
  // A scale of 0 would turn a maximum of -inf into NaN; as a product of its own it does not.
  const bool terms = p.terms || p.scale == 0.f;
  // The maximum runs over raw scores, so a negative scale goes into q as a change of sign.
  const bool negate = p.scale < 0;
  const float factor = (negate ? -p.scale : p.scale) * kLog2e;
  int64_t ld;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t first = q0 + i * kBlock, count = min(kBlock, q1 - first);
    const Row* rows = p.queries(first, count, width, w, &ld);
    pack_lanes<M>(rows, ld, count, units, w.q + i * units * kBlock);
    if (negate) flip_signs(w.q + i * units * kBlock, units * kBlock);
  }
  for (int64_t i = 0; i < blocks * kBlock; i += kLanes) {
    store(w.max + i, splat(-kInf));
    store(w.shift + i, zero());
    store(w.sum + i, zero());
  }
  std::memset(w.o, 0, static_cast<size_t>(blocks * D * kBlock) * 4);

  const int64_t last_key = p.last_key(q1);
  for (int64_t k0 = 0; k0 < last_key; k0 += kTileKeys) {
    const int64_t keys = min(kTileKeys, last_key - k0);
    const Row* rows = p.keys(k0, keys, width, w, &ld);
    pack_rows<M>(rows, ld, keys, units, w.k);
    rows = p.values(k0, keys, D, w, &ld);
    pack_columns(rows, ld, keys, D, w.v);
    const int64_t key_units = ceil_div(keys, M::kPair);
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t first = q0 + i * kBlock, count = min(kBlock, q1 - first);
      const int64_t next = k0 + kTileKeys;  // a share of the next tile, which the blocks divide
      p.prefetch(min(last_key, next + kTileKeys * i / blocks),
                 min(last_key, next + kTileKeys * (i + 1) / blocks));
      if (p.hidden(first, count, k0)) continue;
      const int vecs = static_cast<int>(ceil_div(count, kLanes));
      alignas(64) float top[kBlock], alpha[kBlock], sum[kBlock];
      float* max = w.max + i * kBlock;
      float* shift = w.shift + i * kBlock;
      float* total = w.sum + i * kBlock;
      for (int m = 0; m < kBlock; m += kLanes) store(top + m, load(max + m));
      const typename M::Elem* lanes = w.q + i * units * kBlock;
      if (terms) {
        p.add_scores(w, lanes, units, factor, first, count, k0, keys, top);
      } else {
        product<M>(Panels<M>{w.k}, keys, lanes, vecs, units, Scores<Product>{{}, w.s, top});
      }
      float c = terms ? 1.f : factor;
      for (int m = 0; m < vecs * kLanes; m += kLanes) {
        const vf now = load(top + m);
        // All keys so far masked: any finite shift keeps exp2(-inf) = 0 and avoids inf - inf.
        const vf safe = select(now == -kInf, zero(), now) * splat(c);
        // From one rounded shift to the next. The product max * c, fused into this difference,
        // would leave the rounding of the shift in alpha, and a tile's share off by it once per
        // later tile.
        const vf before = select(load(max + m) == -kInf, splat(-kInf), load(shift + m));
        store(alpha + m, exp2_nonpositive(before - safe));
        store(shift + m, safe);
        store(max + m, now);
      }
      if (!terms && is_large(shift, vecs)) {
        scale_scores(w.s, keys, vecs, factor);
        c = 1.f;
      }
      exponentials<M>(vecs, w.s, keys, c, shift, sum, w.pairs);
      for (int m = 0; m < vecs * kLanes; m += kLanes)
        store(total + m, load(total + m) * load(alpha + m) + load(sum + m));
      product<M>(Panels<M>{w.v}, D, probabilities(w, M{}), vecs, key_units,
                 Rescale{w.o + i * D * kBlock, alpha});
    }
  }

  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t first = q0 + i * kBlock, count = min(kBlock, q1 - first);
    p.write(first, count, w.o + i * D * kBlock, w.sum + i * kBlock, w.shift + i * kBlock);
  }
}

}  // namespace
}  // namespace VITFAST_ISA
}  // namespace vitfast
