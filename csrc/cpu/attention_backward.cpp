// Flash attention, backward: five products per tile of keys x queries, the scores recomputed from
// the saved maximum and sum. Floor: 10 B H Nq Nk D flops at the machine's product rate.
//
// One task is a (batch, head) and a range of key superblocks. dK and dV of a superblock accumulate
// in its task; dQ accumulates over keys in order, one partial per range. The ranges depend on the
// shape alone and partials are added in order, so gradients are bit-identical at any thread count.
#include "../common/parallel.h"
#include "../common/scratch.h"
#include "attention.h"
#include "attention_operands.h"

namespace vitfast {
namespace VITFAST_ISA {
namespace {

constexpr int64_t kTilesPerSuper = 512 / kBlock;  // key tiles for which queries are packed once

template <class M>
struct Workspace : Operands<M> {
  float *p, *ds;           // [key][query] tiles
  float *dk, *dv;          // [tile][d][key]
  float *row, *x;          // [D]
  float *shift, *inverse;  // [kBlock], of each query of a block
  float* delta;            // [queries]: the sum of dout * out
  typename M::Row* rows;   // [kBlock][width]

  static int64_t bytes(int64_t D, int64_t queries) {
    return Workspace().carve(nullptr, D, queries);
  }
  int64_t carve(char* base, int64_t D, int64_t queries) {
    int64_t used = Operands<M>::carve(base, kTilesPerSuper, D);
    used = take(base, used, p, kBlock * kBlock);
    used = take(base, used, ds, kBlock * kBlock);
    used = take(base, used, dk, kTilesPerSuper * D * kBlock);
    used = take(base, used, dv, kTilesPerSuper * D * kBlock);
    used = take(base, used, row, D);
    used = take(base, used, x, D);
    used = take(base, used, shift, static_cast<int64_t>(kBlock));
    used = take(base, used, inverse, static_cast<int64_t>(kBlock));
    used = take(base, used, delta, queries);
    return take(base, used, rows, kBlock * ceil_div(D, M::kPair) * M::kPair);
  }
};

// The gradient of a transposed accumulator column through the prologue, into dx.
struct RowGradient {
  const Source& s;
  float factor;
  float *dweight, *dbias;  // accumulated, or null

  // g: gradient of row n after the prologue, [D]; overwritten. x: scratch [D].
  void apply(int64_t n, float* g, float* x) const {
    for (int64_t d = 0; d < s.D; ++d) g[d] *= factor;
    if (s.rope && n >= s.prefix) rotate(s, n, g, -1.f);
    if (!s.norm) return;
    read_row(s, n, x);
    const Moments m = moments(s, x);
    double sum = 0, dot = 0;
    for (int64_t d = 0; d < s.D; ++d) {
      const float hat = (x[d] - m.mean) * m.rstd;
      if (dweight) dweight[d] += g[d] * hat;
      if (dbias) dbias[d] += g[d];
      g[d] *= s.weight ? s.weight[d] : 1.f;
      x[d] = hat;
      sum += g[d];
      dot += static_cast<double>(g[d]) * hat;
    }
    const float a = s.norm == 1 ? static_cast<float>(sum / static_cast<double>(s.D)) : 0.f;
    const float c = static_cast<float>(dot / static_cast<double>(s.D));
    for (int64_t d = 0; d < s.D; ++d) g[d] = (g[d] - a - x[d] * c) * m.rstd;
  }
};

// acc[d][i] (plus further partials, in order) for i < count -> rows n0 + i of `out`.
inline void write_rows(const AttnArgs& a, const AttnTensor& out, int64_t b, int64_t h, int64_t n0,
                       int64_t count, const float* acc, int64_t partials, int64_t partial_stride,
                       const RowGradient& gradient, float* row, float* x) {
  const int64_t offset = b * out.sb + h * out.sh;
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t d = 0; d < a.D; ++d) {
      float sum = acc[d * kBlock + i];
      for (int64_t p = 1; p < partials; ++p) sum += acc[p * partial_stride + d * kBlock + i];
      row[d] = sum;
    }
    gradient.apply(n0 + i, row, x);
    const int64_t at = offset + (n0 + i) * out.sn;
    for (int64_t d = 0; d < a.D; ++d) {
      if (a.dtype == DType::f32)
        static_cast<float*>(out.ptr)[at + d * out.sd] = row[d];
      else
        from_float(row[d], static_cast<bf16_t*>(out.ptr) + at + d * out.sd);
    }
  }
}

template <class M>
struct Backward {
  typedef typename M::Elem Elem;
  typedef typename M::Row Row;
  const AttnArgs& a;
  const AttnGrads& g;
  int64_t D, units, width, query_blocks, supers;
  bool terms;
  float factor;  // scale * log2(e)

  Backward(const AttnArgs& args, const AttnGrads& grads)
      : a(args),
        g(grads),
        D(args.D),
        units(ceil_div(args.D, M::kPair)),
        width(units * M::kPair),
        query_blocks(ceil_div(args.Nq, kBlock)),
        supers(ceil_div(args.Nk, kBlock * kTilesPerSuper)),
        terms(args.mask.ptr || args.bias.ptr || args.causal),
        factor(args.scale * kLog2e) {}

  Source query(int64_t b, int64_t h) const {
    return with_prologue(source(a, a.q, b, h), a.pro, b, h, a.pro.q_weight, a.pro.q_bias);
  }
  Source key(int64_t b, int64_t h) const {
    return with_prologue(source(a, a.k, b, h), a.pro, b, h, a.pro.k_weight, a.pro.k_bias);
  }

  // dK, dV of key superblocks [s0, s1) of a (batch, head); dq [block][d][query] is overwritten.
  void run(int64_t b, int64_t h, int64_t s0, int64_t s1, float* dq, const Workspace<M>& w,
           const RowGradient& key_gradient) const {
    const Source k = key(b, h), v = source(a, a.v, b, h);
    sum_output(b, h, w);
    std::memset(dq, 0, static_cast<size_t>(query_blocks * D * kBlock) * 4);
    for (int64_t s = s0; s < s1; ++s) {
      const int64_t k0 = s * kTilesPerSuper * kBlock, k1 = min(a.Nk, k0 + kTilesPerSuper * kBlock);
      const int64_t tiles = ceil_div(k1 - k0, kBlock);
      std::memset(w.dk, 0, static_cast<size_t>(tiles * D * kBlock) * 4);
      std::memset(w.dv, 0, static_cast<size_t>(tiles * D * kBlock) * 4);
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t first = k0 + t * kBlock, count = min(kBlock, k1 - first);
        int64_t ld;
        const Row* rows = fetch_rows<Row>(k, first, count, width, w.rows, w.row, &ld);
        pack_rows<M>(rows, ld, count, units, w.k_rows + t * kBlock * units);
        pack_columns(rows, ld, count, D, w.k_columns + t * w.block_units * D);
        rows = fetch_rows<Row>(v, first, count, width, w.rows, w.row, &ld);
        pack_rows<M>(rows, ld, count, units, w.v_rows + t * kBlock * units);
      }
      for (int64_t i = 0; i < query_blocks; ++i) {
        const int64_t q0 = i * kBlock, count = min(kBlock, a.Nq - q0);
        if (a.causal && k0 > q0 + count - 1) continue;
        load_queries(b, h, q0, count, w);
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t first = k0 + t * kBlock;
          if (a.causal && first > q0 + count - 1) break;
          tile(b, h, q0, count, first, min(kBlock, k1 - first), t, dq + i * D * kBlock, w);
        }
      }
      const Source value = source(a, a.v, b, h);
      const RowGradient value_gradient{value, 1.f, nullptr, nullptr};
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t first = k0 + t * kBlock, count = min(kBlock, k1 - first);
        write_rows(a, g.dk, b, h, first, count, w.dk + t * D * kBlock, 1, 0, key_gradient, w.row,
                   w.x);
        write_rows(a, g.dv, b, h, first, count, w.dv + t * D * kBlock, 1, 0, value_gradient, w.row,
                   w.x);
      }
    }
  }

  void sum_output(int64_t b, int64_t h, const Workspace<M>& w) const {
    const Source dout = source(a, g.dout, b, h), out = source(a, a.out, b, h);
    for (int64_t n = 0; n < query_blocks * kBlock; ++n) {
      double sum = 0;
      if (n < a.Nq) {
        read_row(dout, n, w.row);
        read_row(out, n, w.x);
        for (int64_t d = 0; d < D; ++d) sum += static_cast<double>(w.row[d]) * w.x[d];
      }
      w.delta[n] = static_cast<float>(sum);
    }
  }

  void load_queries(int64_t b, int64_t h, int64_t q0, int64_t count, const Workspace<M>& w) const {
    const Source q = query(b, h), dout = source(a, g.dout, b, h);
    int64_t ld;
    const Row* rows = fetch_rows<Row>(q, q0, count, width, w.rows, w.row, &ld);
    pack_lanes<M>(rows, ld, count, units, w.q_lanes);
    pack_columns(rows, ld, count, D, w.q_columns);
    rows = fetch_rows<Row>(dout, q0, count, width, w.rows, w.row, &ld);
    pack_lanes<M>(rows, ld, count, units, w.g_lanes);
    pack_columns(rows, ld, count, D, w.g_columns);
    const float* shift = a.stats + (b * a.H + h) * a.Nq + q0;
    const float* sum_of = shift + a.B * a.H * a.Nq;
    for (int64_t m = 0; m < kBlock; ++m) {
      w.shift[m] = 0.f;
      w.inverse[m] = 0.f;  // no query, or one whose keys are all masked: P = 0
      if (m >= count) continue;
      w.shift[m] = shift[m];
      if (sum_of[m] != 0.f) w.inverse[m] = 1.f / sum_of[m];
    }
  }

  void tile(int64_t b, int64_t h, int64_t q0, int64_t queries, int64_t k0, int64_t keys, int64_t t,
            float* dq, const Workspace<M>& w) const {
    const int q_vecs = static_cast<int>(ceil_div(queries, kLanes));
    product<M>(Panels<M>{w.k_rows + t * kBlock * units}, keys, w.q_lanes, q_vecs, units,
               Store{w.p});
    product<M>(Panels<M>{w.v_rows + t * kBlock * units}, keys, w.g_lanes, q_vecs, units,
               Store{w.ds});
    float c = factor;
    if (terms || is_large(w.shift, q_vecs)) {
      scale_scores(w.p, keys, q_vecs, factor);
      if (a.mask.ptr) add_term(a.mask, b * a.mask.sb + h * a.mask.sh, q0, queries, k0, keys, w.p);
      if (a.bias.ptr) add_term(a.bias, b * a.bias.sb + h * a.bias.sh, q0, queries, k0, keys, w.p);
      if (a.causal) add_causal(q0, queries, k0, keys, w.p);
      c = 1.f;
    }
    for (int64_t k = 0; k < kBlock; ++k)
      for (int m = 0; m < kBlock; m += kLanes) {
        float* p = w.p + k * kBlock + m;
        float* ds = w.ds + k * kBlock + m;
        if (k >= keys || m >= q_vecs * kLanes) {
          store(p, zero());
          store(ds, zero());
          continue;
        }
        const vf value =
            probability(M{}, load(p) * splat(c) - load(w.shift + m)) * load(w.inverse + m);
        store(p, value);
        store(ds, value * (load(ds) - load(w.delta + q0 + m)));
      }
    if (g.dbias)
      for (int64_t m = 0; m < queries; ++m) {
        float* out = g.dbias + h * g.dbias_sh + (q0 + m) * g.dbias_sq + k0;
        for (int64_t k = 0; k < keys; ++k) out[k] += w.ds[k * kBlock + m];
      }
    w.add_gradients(t, keys, queries, D, w.p, w.ds, dq, w.dk + t * D * kBlock,
                    w.dv + t * D * kBlock);
  }
};

template <class M>
void backward(const AttnArgs& a, const AttnGrads& g) {
  const Backward<M> op(a, g);
  const int threads = a.threads;
  const int64_t heads = a.B * a.H, D = a.D;
  // Enough tasks for many threads at batch 1; a function of the shape only.
  const int64_t parts = min(max(op.supers, 1), ceil_div(32, heads));
  const int64_t dq_size = op.query_blocks * D * kBlock;
  const int64_t queries = op.query_blocks * kBlock;
  const int64_t bytes = align64(Workspace<M>::bytes(D, queries));
  // dQ partials live per task where they must outlive it, else per thread.
  const int64_t dq_buffers = parts > 1 ? heads * parts : threads;
  Scratch scratch(threads * bytes), partials(dq_buffers * dq_size * 4);
  // Gradients of the norm's weights: q_weight, q_bias per head, k_weight, k_bias per head and part.
  const bool affine = g.dq_weight || g.dq_bias || g.dk_weight || g.dk_bias;
  const int64_t affine_size = affine ? heads * (2 + 2 * parts) * D : 0;
  Scratch sums(affine_size * 4);
  if (affine) std::memset(sums.ptr, 0, static_cast<size_t>(affine_size) * 4);
  auto sum_of = [&](bool wanted, int64_t head, int64_t slot) {
    return wanted ? sums.as<float>() + (head * (2 + 2 * parts) + slot) * D : nullptr;
  };
  auto finish_dq = [&](int64_t b, int64_t h, const float* dq, int64_t count,
                       const Workspace<M>& w) {
    const int64_t head = b * a.H + h;
    const Source q = op.query(b, h);
    const RowGradient gradient{q, a.scale, sum_of(g.dq_weight, head, 0),
                               sum_of(g.dq_bias, head, 1)};
    for (int64_t i = 0; i < op.query_blocks; ++i)
      write_rows(a, g.dq, b, h, i * kBlock, min(kBlock, a.Nq - i * kBlock), dq + i * D * kBlock,
                 count, dq_size, gradient, w.row, w.x);
  };
  auto run = [&](int64_t b, int64_t h, int64_t part, int thread) {
    Workspace<M> w;
    w.carve(scratch.as<char>(thread * bytes), D, queries);
    const int64_t head = b * a.H + h;
    float* dq = partials.as<float>() + (parts > 1 ? head * parts + part : thread) * dq_size;
    const Source k = op.key(b, h);
    const RowGradient gradient{k, a.scale, sum_of(g.dk_weight, head, 2 + 2 * part),
                               sum_of(g.dk_bias, head, 3 + 2 * part)};
    op.run(b, h, op.supers * part / parts, op.supers * (part + 1) / parts, dq, w, gradient);
    if (parts == 1) finish_dq(b, h, dq, 1, w);
  };

  if (g.dbias) {
    // The batch is summed in order inside a task: no two tasks share an element of dbias.
    for (int64_t h = 0; h < a.H; ++h)
      for (int64_t q = 0; q < a.Nq; ++q)
        std::memset(g.dbias + h * g.dbias_sh + q * g.dbias_sq, 0, static_cast<size_t>(a.Nk) * 4);
    parallel_for(a.H * parts, threads, [&](int64_t begin, int64_t end, int thread) {
      for (int64_t task = begin; task < end; ++task)
        for (int64_t b = 0; b < a.B; ++b) run(b, task / parts, task % parts, thread);
    });
  } else {
    parallel_for(heads * parts, threads, [&](int64_t begin, int64_t end, int thread) {
      for (int64_t task = begin; task < end; ++task)
        run(task / parts / a.H, task / parts % a.H, task % parts, thread);
    });
  }
  if (parts > 1)
    parallel_for(heads, threads, [&](int64_t begin, int64_t end, int thread) {
      Workspace<M> w;
      w.carve(scratch.as<char>(thread * bytes), D, queries);
      for (int64_t head = begin; head < end; ++head)
        finish_dq(head / a.H, head % a.H, partials.as<float>() + head * parts * dq_size, parts, w);
    });
  auto total = [&](float* out, int64_t slot, int64_t count) {
    if (!out) return;
    for (int64_t d = 0; d < D; ++d) {
      double sum = 0;
      for (int64_t head = 0; head < heads; ++head)
        for (int64_t p = 0; p < count; ++p) sum += sum_of(true, head, slot + 2 * p)[d];
      out[d] = static_cast<float>(sum);
    }
  };
  total(g.dq_weight, 0, 1);
  total(g.dq_bias, 1, 1);
  total(g.dk_weight, 2, parts);
  total(g.dk_bias, 3, parts);
}

}  // namespace

void attention_backward(const AttnArgs& a, const AttnGrads& g) {
  if (a.B == 0 || a.H == 0) return;
  with_products(a.dtype, [&](auto m) { backward<decltype(m)>(a, g); });
}

}  // namespace VITFAST_ISA
}  // namespace vitfast
