// Windowed attention, forward. Floor: 4 B heads windows N^2 D flops at the machine's product rate
// and 4 reads and writes of [B, H, W, heads, D], whichever takes longer: at 7 x 7 windows, the
// traffic.
#include "../common/parallel.h"
#include "../common/scratch.h"
#include "window_tile.h"

namespace vitfast {
namespace VITFAST_ISA {
namespace {

// One (batch, window, head).
template <class M>
struct Window {
  typedef typename M::Row Row;
  const WindowArgs& a;
  int64_t batch, index, head, D;
  float scale;
  // Scores are stored rounded, as a tile's and the backward's are.
  static constexpr bool terms = true;
  const int64_t* token;  // [N]
  const float* bands;    // [N], or null where all are the same
  const float* bias;     // [N][ld], or null
  int64_t ld_bias, N;

  int64_t last_key(int64_t) const { return N; }
  bool hidden(int64_t, int64_t, int64_t) const { return false; }
  const Row* rows(int part, int64_t begin, int64_t count, int64_t width, const Workspace<M>& w,
                  int64_t* ld) const {
    gather(a, batch, head, part, token + begin, count, width, w.row, w.rows);
    *ld = width;
    return w.rows;
  }
  const Row* queries(int64_t begin, int64_t count, int64_t width, const Workspace<M>& w,
                     int64_t* ld) const {
    return rows(0, begin, count, width, w, ld);
  }
  const Row* keys(int64_t begin, int64_t count, int64_t width, const Workspace<M>& w,
                  int64_t* ld) const {
    return rows(1, begin, count, width, w, ld);
  }
  const Row* values(int64_t begin, int64_t count, int64_t width, const Workspace<M>& w,
                    int64_t* ld) const {
    return rows(2, begin, count, width, w, ld);
  }
  void prefetch(int64_t, int64_t) const {}  // most windows are one tile of keys
  // What makes scores of the products of queries from `first` on and keys from k on.
  Terms added(float factor, int64_t first, int64_t k) const {
    return {factor, bias ? bias + k * ld_bias + first : nullptr, ld_bias,
            bands ? bands + first : nullptr, bands ? bands + k : nullptr};
  }
  void add_scores(const Workspace<M>& w, const typename M::Elem* lanes, int64_t units, float factor,
                  int64_t first, int64_t count, int64_t k0, int64_t keys, float* top) const {
    const int vecs = static_cast<int>(ceil_div(count, kLanes));
    product<M>(Panels<M>{w.k}, keys, lanes, vecs, units,
               Scores<Terms>{added(factor, first, k0), w.s, top});
  }
  template <class T>
  void write_as(int64_t first, int64_t count, const float* o, const float* sum) const {
    T* out = static_cast<T*>(a.out) + (batch * a.H * a.W * a.heads + head) * D;
    write_output<T>(o, sum, count, D, 1, [&](int64_t m) -> T* {
      return token[first + m] < 0 ? nullptr : out + token[first + m] * a.heads * D;
    });
  }
  void write(int64_t first, int64_t count, const float* o, const float* sum,
             const float* shift) const {
    if (a.dtype == DType::f32)
      write_as<float>(first, count, o, sum);
    else
      write_as<bf16_t>(first, count, o, sum);
    if (!a.stats) return;
    const Grid g = grid(a);
    float* to = a.stats + ((batch * g.high * g.wide + index) * a.heads + head) * N + first;
    float* total = to + a.B * g.high * g.wide * a.heads * N;
    for (int64_t m = 0; m < count; ++m) {
      to[m] = shift[m];
      total[m] = sum[m];
    }
  }
};

// Windows of up to kBlock tokens whose rows hold whole units of a product.
template <class M>
inline bool is_tile(const WindowArgs& a) {
  return a.wh * a.ww <= kBlock && a.D % M::kPair == 0;
}

// Per-thread memory of a tile, beside that of all windows.
template <class M>
struct TileRows {
  typedef typename M::Elem Elem;
  typedef typename M::Row Row;
  const Row** rows;    // [3][kBlock]: q, k, v of each token
  const Elem** units;  // [kBlock]
  Row* copies;         // [3][kBlock][D]: of length 1 for attention by cosine; padding
  Elem *q, *values;    // [unit][kBlock]; [unit of keys][D]

  static int64_t bytes(int64_t D) { return TileRows().carve(nullptr, D); }
  int64_t carve(char* base, int64_t D) {
    int64_t used = 0;
    used = take(base, used, rows, 3 * static_cast<int64_t>(kBlock));
    used = take(base, used, units, static_cast<int64_t>(kBlock));
    used = take(base, used, copies, 3 * kBlock * D);
    used = take(base, used, q, D / M::kPair * kBlock);
    return take(base, used, values, M::kPair == 1 ? 0 : kBlock / 2 * D);
  }
};

constexpr int64_t kCached = 2 << 20;  // bytes of qkv that the caches hand out fast enough

template <class M>
inline void attend_tile(const Window<M>& p, const TileRows<M>& t, const Workspace<M>& w) {
  typedef typename M::Row Row;
  const WindowArgs& a = p.a;
  const int64_t N = p.N, D = p.D, units = D / M::kPair, key_units = ceil_div(N, M::kPair);
  const int vecs = static_cast<int>(ceil_div(N, kLanes));
  constexpr int64_t kLine = 64 / sizeof(Row);
  const int64_t right = (a.spread ? 1 : a.ww) * a.sx;
  const bool same = sizeof(Row) == (a.dtype == DType::f32 ? 4 : 2);
  const bool ahead =
      3 * a.B * a.H * a.W * a.heads * D * static_cast<int64_t>(sizeof(Row)) > kCached && !a.stripe;
  for (int part = 0; part < 3; ++part) {
    const int64_t offset = p.batch * a.sb + part * a.s3 + p.head * a.shead;
    const Row** rows = t.rows + part * kBlock;
    for (int64_t i = 0; i < N; ++i) {
      const int64_t token = p.token[i];
      Row* copy = t.copies + (part * kBlock + i) * D;
      if (same && token >= 0 && (part == 2 || !a.cosine)) {
        rows[i] = static_cast<const Row*>(a.qkv) + offset + token / a.W * a.sy + token % a.W * a.sx;
        // The same of the window to the right, which mostly is the next.
        if (ahead)
          for (int64_t d = 0; d < D; d += kLine) __builtin_prefetch(rows[i] + right + d);
      } else {
        gather(a, p.batch, p.head, part, p.token + i, 1, D, w.row, copy);
        rows[i] = copy;
      }
    }
  }
  pack_lanes_of<M>(t.rows, N, units, t.q);
  pair_values(t.rows + 2 * kBlock, N, D, t.values, t.units);
  alignas(64) float sum[kBlock];
  for (int m = 0; m < kBlock; m += kLanes) store(w.max + m, splat(-kInf));
  product<M>(RowKeys<M>{t.rows + kBlock}, N, t.q, vecs, units,
             Scores<Terms>{p.added(p.scale * kLog2e, 0, 0), w.s, w.max});
  for (int m = 0; m < vecs * kLanes; m += kLanes) {
    const vf top = load(w.max + m);  // a finite shift avoids inf - inf
    store(w.shift + m, select(top == -kInf, zero(), top));
  }
  exponentials<M>(vecs, w.s, N, 1.f, w.shift, sum, w.pairs);
  product<M>(ValueColumns<M>{t.units}, D, probabilities(w, M{}), vecs, key_units, Store{w.o});
  p.write(0, N, w.o, sum, w.shift);
}

constexpr int64_t kSharedBias = 1 << 17;  // floats: the bias of all heads that stays in cache

template <class M>
void forward(const WindowArgs& a) {
  const int threads = a.threads;
  const Grid g = grid(a);
  const int64_t N = g.tokens, blocks = ceil_div(N, kBlock), ld = blocks * kBlock;
  const int64_t windows = a.B * (a.last - a.first) * g.wide, pairs = a.table ? N * ld : 0;
  // A window's heads one after the other read memory in order; but a large bias is filled for one
  // head and used for all windows.
  const bool by_window = a.heads * pairs <= kSharedBias;
  const bool tile = is_tile<M>(a);
  const int64_t own_pairs = by_window ? 0 : pairs;
  const int64_t work = Workspace<M>::bytes(blocks, a.D), map_bytes = WindowMap::bytes(N, own_pairs);
  const int64_t bytes = work + map_bytes + (tile ? TileRows<M>::bytes(a.D) : 0);
  Scratch scratch(bytes * threads), shared(by_window ? a.heads * pairs * 4 : 0);
  if (by_window && pairs)
    parallel_for(a.heads, threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t head = begin; head < end; ++head)
        fill_bias(a, head, ld, shared.as<float>() + head * pairs);
    });
  parallel_for(a.heads * windows, threads, [&](int64_t begin, int64_t end, int thread) {
    char* base = scratch.as<char>(thread * bytes);
    Workspace<M> w;
    w.carve(base, blocks, a.D);
    WindowMap map;
    map.carve(base + work, N, own_pairs);
    TileRows<M> t{};
    if (tile) t.carve(base + work + map_bytes, a.D);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t window = by_window ? task / a.heads : task % windows;
      const int64_t head = by_window ? task % a.heads : task / windows;
      const int64_t batch = window / (windows / a.B);
      const int64_t index = a.first * g.wide + window % (windows / a.B);
      map.go_to_window(a, index);
      if (!by_window) map.go_to_head(a, head);
      const float* bias = by_window ? shared.as<float>() + head * pairs : map.bias;
      const Window<M> p{a,
                        batch,
                        index,
                        head,
                        a.D,
                        a.scale[head],
                        map.token,
                        map.several ? map.bands : nullptr,
                        a.table ? bias : nullptr,
                        ld,
                        N};
      if (tile)
        attend_tile<M>(p, t, w);
      else
        attend<M>(p, 0, N, w);
    }
  });
}

}  // namespace

void window_forward(const WindowArgs& a) {
  if (a.B == 0 || a.H == 0 || a.W == 0 || a.heads == 0) return;
  with_products(a.dtype, [&](auto m) { forward<decltype(m)>(a); });
}

}  // namespace VITFAST_ISA
}  // namespace vitfast
