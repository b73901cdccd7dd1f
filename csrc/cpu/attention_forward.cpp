// Flash attention, forward. Floor: 4 B H Nq Nk D flops at the machine's product rate; memory
// traffic is q, k, v, out once plus K and V once per superblock of queries, far below it.
#include "../common/parallel.h"
#include "../common/scratch.h"
#include "attention.h"
#include "attention_block.h"

namespace vitfast {
namespace VITFAST_ISA {
namespace {

// One (batch, head) of a dense problem.
template <class M>
struct Dense {
  typedef typename M::Row Row;
  const AttnArgs& a;
  int64_t b, h, D, mask_base, bias_base;
  float scale;
  bool terms;
  Source query, key, value;

  Dense(const AttnArgs& args, int64_t batch, int64_t head)
      : a(args),
        b(batch),
        h(head),
        D(args.D),
        mask_base(batch * args.mask.sb + head * args.mask.sh),
        bias_base(batch * args.bias.sb + head * args.bias.sh),
        scale(args.scale),
        terms(args.mask.ptr || args.bias.ptr || args.causal),
        query(with_prologue(source(args, args.q, batch, head), args.pro, batch, head,
                            args.pro.q_weight, args.pro.q_bias)),
        key(with_prologue(source(args, args.k, batch, head), args.pro, batch, head,
                          args.pro.k_weight, args.pro.k_bias)),
        value(source(args, args.v, batch, head)) {}

  int64_t last_key(int64_t q1) const { return a.causal ? min(a.Nk, q1) : a.Nk; }
  bool hidden(int64_t first, int64_t count, int64_t k0) const {
    return a.causal && k0 > first + count - 1;
  }
  const Row* queries(int64_t begin, int64_t count, int64_t width, const Workspace<M>& w,
                     int64_t* ld) const {
    return fetch_rows<Row>(query, begin, count, width, w.rows, w.row, ld);
  }
  const Row* keys(int64_t begin, int64_t count, int64_t width, const Workspace<M>& w,
                  int64_t* ld) const {
    return fetch_rows<Row>(key, begin, count, width, w.rows, w.row, ld);
  }
  const Row* values(int64_t begin, int64_t count, int64_t width, const Workspace<M>& w,
                    int64_t* ld) const {
    return fetch_rows<Row>(value, begin, count, width, w.rows, w.row, ld);
  }
  VITFAST_INLINE void prefetch(int64_t begin, int64_t end) const {
    for (int64_t n = begin; n < end; ++n) {
      prefetch_row(key, n);
      prefetch_row(value, n);
    }
  }
  void add_scores(const Workspace<M>& w, const typename M::Elem* lanes, int64_t units, float factor,
                  int64_t first, int64_t count, int64_t k0, int64_t keys, float* top) const {
    const int vecs = static_cast<int>(ceil_div(count, kLanes));
    product<M>(Panels<M>{w.k}, keys, lanes, vecs, units, Store{w.s});
    scale_scores(w.s, keys, vecs, factor);
    if (a.mask.ptr) add_term(a.mask, mask_base, first, count, k0, keys, w.s);
    if (a.bias.ptr) add_term(a.bias, bias_base, first, count, k0, keys, w.s);
    if (a.causal) add_causal(first, count, k0, keys, w.s);
    for (int64_t k = 0; k < keys; ++k)
      for (int m = 0; m < vecs * kLanes; m += kLanes)
        store(top + m, vmax(load(top + m), load(w.s + k * kBlock + m)));
  }
  template <class T>
  void write_as(int64_t first, int64_t count, const float* o, const float* sum) const {
    T* out = static_cast<T*>(a.out.ptr) + b * a.out.sb + first * a.out.sn + h * a.out.sh;
    write_output<T>(o, sum, count, D, a.out.sd, [&](int64_t m) { return out + m * a.out.sn; });
  }
  void write(int64_t first, int64_t count, const float* o, const float* sum,
             const float* shift) const {
    if (a.dtype == DType::f32)
      write_as<float>(first, count, o, sum);
    else
      write_as<bf16_t>(first, count, o, sum);
    if (!a.stats) return;
    float* to = a.stats + (b * a.H + h) * a.Nq + first;
    float* total = to + a.B * a.H * a.Nq;
    for (int64_t m = 0; m < count; ++m) {
      to[m] = shift[m];
      total[m] = sum[m];
    }
  }
};

// How many superblocks to cut the queries of a (batch, head) into: whole waves of tasks for the
// threads, against packing K and V once more for each.
inline int64_t superblocks(int64_t heads, int64_t blocks, int64_t D, int threads) {
  // Blocks: Q and O of a superblock are read once a tile of keys, in a stream that caches keep up
  // with; to fetch and pack K and V once more costs as much as several blocks.
  const int64_t most = (D <= 64 ? 2048 : D <= 128 ? 1024 : 512) / kBlock;
  int64_t best = 0;
  double best_cost = 0;
  for (int64_t n = ceil_div(blocks, most); n <= blocks; ++n) {
    const double packing = 32.0 / kBlock;  // of one block's products, measured at D = 64
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
  const int threads = a.threads;
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
      const int64_t q0 = part * each * kBlock, q1 = min(a.Nq, q0 + each * kBlock);
      if (q0 < q1) attend<M>(Dense<M>(a, batch, head), q0, q1, w);
    }
  });
}

}  // namespace

void attention_forward(const AttnArgs& a) {
  if (a.B == 0 || a.H == 0 || a.Nq == 0) return;
  with_products(a.dtype, [&](auto m) { forward<decltype(m)>(a); });
}

}  // namespace VITFAST_ISA
}  // namespace vitfast
