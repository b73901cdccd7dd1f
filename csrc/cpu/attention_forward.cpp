// Flash attention, forward. Floor: 4 B H Nq Nk D flops at the machine's product rate; memory traffic
// is q, k, v, out once plus K and V once per superblock of queries, far below it.
#include "../common/parallel.h"
#include "../common/scratch.h"
#include "attention.h"
#include "attention_tile.h"

namespace vitfast {
namespace VITFAST_ISA {
namespace {

constexpr int64_t kTileKeys = 96;  // S (24 KiB) and one panel of V stay in L1

// Scores of one block of queries against a tile of keys: S[key][query], and the running maximum.
template <class M>
struct Scores {
  const typename M::Elem *panel, *lanes;
  int64_t units;
  float *s, *max;
  template <int R, int NV>
  inline void run() const {
    vf acc[R][NV] = {};
    multiply<M, R, NV>(panel, lanes, units, acc);
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      vf top = load(max + v * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        store(s + r * kBlock + v * kLanes, acc[r][v]);
        top = vmax(top, acc[r][v]);
      }
      store(max + v * kLanes, top);
    }
  }
};

// O[d][query] = O * alpha + V^T P for a group of d.
template <class M>
struct Output {
  const typename M::Elem *panel, *lanes;
  int64_t units;
  float* o;
  const float* alpha;
  template <int R, int NV>
  inline void run() const {
    // A tile is summed on its own: fewer roundings in a chain than on top of all tiles before.
    vf acc[R][NV] = {};
    multiply<M, R, NV>(panel, lanes, units, acc);
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      const vf scale = load(alpha + v * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        float* at = o + r * kBlock + v * kLanes;
        store(at, fma(load(at), scale, acc[r][v]));
      }
    }
  }
};

// P = 2^(S * c - max * c), in place or as bfloat16 pairs; returns the sums over keys.
template <int NV>
inline void exponentials(F32, float* s, int64_t keys, float c, const float* shift, float* sum, float*) {
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
  Elem *q, *k, *v, *pairs;  // q: [block][unit][kBlock]; k, v: panels
  float *o, *s, *row;       // o: [block][d][kBlock]
  float *max, *sum;         // [block][kBlock]
  Row* rows;

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
    used = take(base, used, sum, blocks * kBlock);
    return take(base, used, rows, (kTileKeys > kBlock ? kTileKeys : kBlock) * width);
  }
};

inline const float* probabilities(const Workspace<F32>& w, F32) { return w.s; }
#if defined(VITFAST_HAS_BF16_DOT)
inline const uint32_t* probabilities(const Workspace<Bf16>& w, Bf16) { return w.pairs; }
#endif

// O[d][query] / sum -> out[query][d].
template <class T>
inline void write_output(const AttnArgs& a, const float* o, const float* sum, T* out, int64_t count) {
  for (int64_t m = 0; m < count; m += kLanes) {
    const int n = static_cast<int>(min64(kLanes, count - m));
    const vf total = load(sum + m);
    const vf inverse = select(total == 0.f, zero(), splat(1.f) / total);
    int64_t d = 0;
    if (a.out.sd == 1)
      for (; d + kLanes <= a.D; d += kLanes) {
        vf r[kLanes];
        for (int i = 0; i < kLanes; ++i) r[i] = load(o + (d + i) * kBlock + m) * inverse;
        transpose(r);
        for (int i = 0; i < n; ++i) store(out + (m + i) * a.out.sn + d, r[i]);
      }
    for (; d < a.D; ++d) {
      const vf value = load(o + d * kBlock + m) * inverse;
      for (int i = 0; i < n; ++i) from_float(value[i], out + (m + i) * a.out.sn + d * a.out.sd);
    }
  }
}

inline void flip_signs(float* p, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = -p[i];
}
inline void flip_signs(uint32_t* p, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] ^= 0x80008000u;
}

// Queries [q0, q1) of one (batch, head).
template <class M>
void superblock(const AttnArgs& a, int64_t b, int64_t h, int64_t q0, int64_t q1, const Workspace<M>& w) {
  typedef typename M::Row Row;
  const int64_t D = a.D, units = ceil_div(D, M::kPair), width = units * M::kPair;
  const int64_t blocks = ceil_div(q1 - q0, kBlock);
  const Source query =
      with_prologue(source(a, a.q, b, h), a.pro, b, h, a.pro.q_weight, a.pro.q_bias);
  const Source key = with_prologue(source(a, a.k, b, h), a.pro, b, h, a.pro.k_weight, a.pro.k_bias);
  const Source value = source(a, a.v, b, h);
  // A scale of 0 would turn a maximum of -inf into NaN; as a product of its own it does not.
  const bool terms = a.mask.ptr || a.bias.ptr || a.causal || a.scale == 0.f;
  const int64_t mask_base = b * a.mask.sb + h * a.mask.sh, bias_base = b * a.bias.sb + h * a.bias.sh;
  // The maximum runs over raw scores, so a negative scale goes into q as a change of sign.
  const bool negate = a.scale < 0;
  const float factor = (negate ? -a.scale : a.scale) * kLog2e;
  int64_t ld;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t first = q0 + i * kBlock, count = min64(kBlock, q1 - first);
    const Row* rows = fetch_rows<Row>(query, first, count, width, w.rows, w.row, &ld);
    pack_lanes<M>(rows, ld, count, units, w.q + i * units * kBlock);
    if (negate) flip_signs(w.q + i * units * kBlock, units * kBlock);
  }
  for (int64_t i = 0; i < blocks * kBlock; i += kLanes) {
    store(w.max + i, splat(-kInf));
    store(w.sum + i, zero());
  }
  std::memset(w.o, 0, static_cast<size_t>(blocks * D * kBlock) * 4);

  const int64_t last_key = a.causal ? min64(a.Nk, q1) : a.Nk;
  for (int64_t k0 = 0; k0 < last_key; k0 += kTileKeys) {
    const int64_t keys = min64(kTileKeys, last_key - k0);
    const Row* rows = fetch_rows<Row>(key, k0, keys, width, w.rows, w.row, &ld);
    pack_rows<M>(rows, ld, keys, units, w.k);
    rows = fetch_rows<Row>(value, k0, keys, D, w.rows, w.row, &ld);
    pack_columns(rows, ld, keys, D, w.v);
    const int64_t key_units = ceil_div(keys, M::kPair);
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t first = q0 + i * kBlock, count = min64(kBlock, q1 - first);
      if (a.causal && k0 > first + count - 1) continue;
      const int vecs = static_cast<int>(ceil_div(count, kLanes));
      alignas(64) float top[kBlock], alpha[kBlock], shift[kBlock], sum[kBlock];
      float* max = w.max + i * kBlock;
      float* total = w.sum + i * kBlock;
      for (int m = 0; m < kBlock; m += kLanes) store(top + m, load(max + m));
      const typename M::Elem* lanes = w.q + i * units * kBlock;
      if (terms) {
        alignas(64) float unused[kBlock];
        for (int m = 0; m < kBlock; m += kLanes) store(unused + m, zero());
        for_groups(keys, [&](int64_t r, int n) {
          with_tile(n, vecs, Scores<M>{w.k + r * units, lanes, units, w.s + r * kBlock, unused});
        });
        for (int64_t j = 0; j < keys * kBlock; j += kLanes) store(w.s + j, load(w.s + j) * splat(factor));
        if (a.mask.ptr) add_term(a.mask, mask_base, first, count, k0, keys, w.s);
        if (a.bias.ptr) add_term(a.bias, bias_base, first, count, k0, keys, w.s);
        if (a.causal) add_causal(first, count, k0, keys, w.s);
        for (int64_t k = 0; k < keys; ++k)
          for (int m = 0; m < vecs * kLanes; m += kLanes)
            store(top + m, vmax(load(top + m), load(w.s + k * kBlock + m)));
      } else {
        for_groups(keys, [&](int64_t r, int n) {
          with_tile(n, vecs, Scores<M>{w.k + r * units, lanes, units, w.s + r * kBlock, top});
        });
      }
      const float c = terms ? 1.f : factor;
      for (int m = 0; m < vecs * kLanes; m += kLanes) {
        const vf now = load(top + m);
        // All keys so far masked: any finite shift keeps exp2(-inf) = 0 and avoids inf - inf.
        const vf safe = select(now == -kInf, zero(), now) * splat(c);
        store(shift + m, safe);
        store(alpha + m, exp2_nonpositive(load(max + m) * splat(c) - safe));
        store(max + m, now);
      }
      exponentials<M>(vecs, w.s, keys, c, shift, sum, w.pairs);
      for (int m = 0; m < vecs * kLanes; m += kLanes)
        store(total + m, load(total + m) * load(alpha + m) + load(sum + m));
      const typename M::Elem* p = probabilities(w, M{});
      for_groups(D, [&](int64_t d, int n) {
        with_tile(n, vecs,
                  Output<M>{w.v + d * key_units, p, key_units, w.o + (i * D + d) * kBlock, alpha});
      });
    }
  }

  const float c = terms ? 1.f : factor;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t first = q0 + i * kBlock, count = min64(kBlock, q1 - first);
    const float* o = w.o + i * D * kBlock;
    const float* total = w.sum + i * kBlock;
    const int64_t offset = b * a.out.sb + first * a.out.sn + h * a.out.sh;
    if (a.dtype == DType::f32)
      write_output(a, o, total, static_cast<float*>(a.out.ptr) + offset, count);
    else
      write_output(a, o, total, static_cast<bf16_t*>(a.out.ptr) + offset, count);
    if (a.stats) {
      float* shift = a.stats + (b * a.H + h) * a.Nq + first;
      float* sum = shift + a.B * a.H * a.Nq;
      for (int64_t m = 0; m < count; ++m) {
        const float top = w.max[i * kBlock + m];
        shift[m] = (top == -kInf ? 0.f : top) * c;
        sum[m] = total[m];
      }
    }
  }
}

// How many superblocks to cut the queries of a (batch, head) into: whole waves of tasks for the
// threads, against packing K and V once more for each.
inline int64_t superblocks(int64_t heads, int64_t blocks, int64_t D, int threads) {
  const int64_t most = D <= 64 ? 8 : D <= 128 ? 4 : 2;  // Q and O of a superblock stay in L2
  int64_t best = 0;
  double best_cost = 0;
  for (int64_t n = ceil_div(blocks, most); n <= blocks; ++n) {
    const double packing = 0.5;  // of one block's products, measured at D = 64
    const double cost = static_cast<double>(ceil_div(heads * n, threads)) *
                        (static_cast<double>(ceil_div(blocks, n)) + packing);
    if (best == 0 || cost < best_cost) {
      best = n;
      best_cost = cost;
    }
    if (heads * n >= 16 * static_cast<int64_t>(threads)) break;
  }
  return best;
}

template <class M>
void forward(const AttnArgs& a) {
  const int threads = a.threads < 1 ? 1 : a.threads;
  const int64_t blocks = ceil_div(a.Nq, kBlock);
  const int64_t parts = superblocks(a.B * a.H, blocks, a.D, threads);
  const int64_t each = ceil_div(blocks, parts);
  const int64_t bytes = Workspace<M>::bytes(each, a.D);
  Scratch scratch(bytes * threads);
  parallel_for(a.B * a.H * parts, threads, [&](int64_t begin, int64_t end, int thread) {
    Workspace<M> w;
    w.carve(scratch.as<char>(thread * bytes), each, a.D);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task % parts, head = task / parts % a.H, batch = task / parts / a.H;
      const int64_t q0 = part * each * kBlock, q1 = min64(a.Nq, q0 + each * kBlock);
      if (q0 < q1) superblock<M>(a, batch, head, q0, q1, w);
    }
  });
}

}  // namespace

void attention_forward(const AttnArgs& a) {
  if (a.B == 0 || a.H == 0 || a.Nq == 0) return;
#if defined(VITFAST_HAS_BF16_DOT)
  if (a.dtype == DType::bf16) return forward<Bf16>(a);
#endif
  forward<F32>(a);
}

}  // namespace VITFAST_ISA
}  // namespace vitfast
