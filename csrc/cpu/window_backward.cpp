// Windowed attention, backward: five products per window and head, the scores recomputed from the
// saved maximum and sum. Floor: 10 B heads windows N^2 D flops, or 7 reads and writes of
// [B, H, W, heads, D] (qkv, dout in; dqkv out), whichever takes longer.
//
// One task is a head and a range of (batch, window)s, which depends on the shape alone. What
// windows share (table, padding, scale) is summed within a task in order, then over tasks in order:
// the same bits at any thread count. A token lies in one window, so no two tasks write the same
// gradient.
#include "../common/parallel.h"
#include "../common/scratch.h"
#include "attention_operands.h"
#include "window_rows.h"

namespace vitfast {
namespace VITFAST_ISA {
namespace {

constexpr int64_t kMostRanges = 16;
constexpr int64_t kMostBytes = 64 << 20;  // of all tasks' sums for the table
constexpr int64_t kSummed = 8;            // keys

template <class M>
struct Workspace : Operands<M> {
  float *p, *ds, *raw;  // [key][query], all keys; ds is dP at first, raw q k where wanted
  float *dq, *dk, *dv;  // [d][query]; [tile][d][key]
  float *row, *x;       // [D]
  float *shift, *inverse, *delta, *weight, *scale, *rest, *mean;  // [kBlock], of each query
  float* grads;           // [kBlock][D rounded up to whole vectors]
  typename M::Row* rows;  // [kBlock][width]

  static int64_t bytes(int64_t N, int64_t D, bool cosine) {
    return Workspace().carve(nullptr, N, D, cosine);
  }
  int64_t carve(char* base, int64_t N, int64_t D, bool cosine) {
    const int64_t tiles = ceil_div(N, kBlock), ld = tiles * kBlock;
    int64_t used = Operands<M>::carve(base, tiles, D);
    used = take(base, used, p, ld * kBlock);
    used = take(base, used, ds, ld * kBlock);
    used = take(base, used, raw, cosine ? ld * kBlock : 0);
    used = take(base, used, dq, D * kBlock);
    used = take(base, used, dk, ld * D);
    used = take(base, used, dv, ld * D);
    used = take(base, used, row, D);
    used = take(base, used, x, D);
    used = take(base, used, shift, static_cast<int64_t>(kBlock));
    used = take(base, used, inverse, static_cast<int64_t>(kBlock));
    used = take(base, used, delta, static_cast<int64_t>(kBlock));
    used = take(base, used, weight, static_cast<int64_t>(kBlock));
    used = take(base, used, scale, static_cast<int64_t>(kBlock));
    used = take(base, used, rest, static_cast<int64_t>(kBlock));
    used = take(base, used, mean, static_cast<int64_t>(kBlock));
    used = take(base, used, grads, kBlock * ceil_div(D, kLanes) * kLanes);
    return take(base, used, rows, kBlock * ceil_div(D, M::kPair) * M::kPair);
  }
};

// What a task sums over its windows; null where nobody asked.
struct Sums {
  float* table;   // [N][ld], as bias
  double* pad;    // [3][D]
  double* scale;  // one number
};

template <class M>
struct Backward {
  typedef typename M::Row Row;
  const WindowArgs& a;
  const WindowGrads& g;
  int64_t N, D, units, width, tiles, ld, windows;

  Backward(const WindowArgs& args, const WindowGrads& grads)
      : a(args),
        g(grads),
        N(grid(args).tokens),
        D(args.D),
        units(ceil_div(args.D, M::kPair)),
        width(units * M::kPair),
        tiles(ceil_div(N, kBlock)),
        ld(tiles * kBlock),
        windows(grid(args).high * grid(args).wide) {}

  // A row of dout as floats; zeros in the padding, which leaves the window unseen.
  void read_gradient(int64_t batch, int64_t head, int64_t token, float* row) const {
    const int64_t at = ((batch * a.H * a.W + token) * a.heads + head) * D;
    for (int64_t d = 0; d < D; ++d)
      row[d] = token < 0               ? 0.f
               : a.dtype == DType::f32 ? static_cast<const float*>(g.dout)[at + d]
                                       : to_float(static_cast<const bf16_t*>(g.dout)[at + d]);
  }

  void run(int64_t batch, int64_t head, const WindowMap& map, const Sums& sums,
           const Workspace<M>& w) const {
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t first = t * kBlock, count = min(kBlock, N - first);
      gather(a, batch, head, 1, map.token + first, count, width, w.row, w.rows);
      pack_rows<M>(w.rows, width, count, units, w.k_rows + first * units);
      pack_columns(w.rows, width, count, D, w.k_columns + t * w.block_units * D);
      gather(a, batch, head, 2, map.token + first, count, width, w.row, w.rows);
      pack_rows<M>(w.rows, width, count, units, w.v_rows + first * units);
    }
    std::memset(w.dk, 0, static_cast<size_t>(ld * D) * 4);
    std::memset(w.dv, 0, static_cast<size_t>(ld * D) * 4);
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t q0 = i * kBlock, count = min(kBlock, N - q0);
      load_queries(batch, head, q0, count, map, w);
      std::memset(w.dq, 0, static_cast<size_t>(D * kBlock) * 4);
      for (int64_t t = 0; t < tiles; ++t)
        scores(head, q0, static_cast<int>(ceil_div(count, kLanes)), t, sums.scale, map, w);
      for (int64_t m = 0; m < count; ++m) w.delta[m] /= w.weight[m];
      for (int64_t t = 0; t < tiles; ++t) tile(q0, count, t, sums, w);
      if (sums.scale)
        // dS sums to zero but for rounding, which times the mean of raw would be felt.
        for (int64_t m = 0; m < count; ++m)
          *sums.scale += w.scale[m] - static_cast<double>(w.rest[m]) * w.mean[m];
      write(batch, head, 0, q0, count, w.dq, a.scale[head], map, sums, w);
    }
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t first = t * kBlock, count = min(kBlock, N - first);
      write(batch, head, 1, first, count, w.dk + first * D, a.scale[head], map, sums, w);
      write(batch, head, 2, first, count, w.dv + first * D, 1.f, map, sums, w);
    }
  }

  void load_queries(int64_t batch, int64_t head, int64_t q0, int64_t count, const WindowMap& map,
                    const Workspace<M>& w) const {
    gather(a, batch, head, 0, map.token + q0, count, width, w.row, w.rows);
    pack_lanes<M>(w.rows, width, count, units, w.q_lanes);
    pack_columns(w.rows, width, count, D, w.q_columns);
    const float* shift = a.stats + ((batch * windows + map.index) * a.heads + head) * N + q0;
    const float* sum_of = shift + a.B * windows * a.heads * N;
    for (int64_t m = 0; m < kBlock; ++m) {
      w.delta[m] = w.weight[m] = w.scale[m] = w.rest[m] = w.mean[m] = 0.f;
      w.shift[m] = 0.f;
      w.inverse[m] = 0.f;  // no query: P = 0
      if (m >= count) continue;
      read_gradient(batch, head, map.token[q0 + m], w.row);
      for (int64_t d = 0; d < D; ++d) from_float(w.row[d], w.rows + m * width + d);
      for (int64_t d = D; d < width; ++d) from_float(0.f, w.rows + m * width + d);
      w.shift[m] = shift[m];
      w.inverse[m] = 1.f / sum_of[m];
    }
    pack_lanes<M>(w.rows, width, count, units, w.g_lanes);
    pack_columns(w.rows, width, count, D, w.g_columns);
  }

  // P and dP of a tile, and what its keys add to the sums of P dP and of P. Their quotient is
  // delta, the mean of dP by the weights P: only where it comes from the very same P does dS sum to
  // zero over the keys, and only as a mean is it free of what P's rounding makes of all dP have in
  // common. The table's gradient lives on that.
  void scores(int64_t head, int64_t q0, int vecs, int64_t t, bool cosine, const WindowMap& map,
              const Workspace<M>& w) const {
    const int64_t k0 = t * kBlock, keys = min(kBlock, N - k0);
    float *p = w.p + k0 * kBlock, *dp = w.ds + k0 * kBlock;
    product<M>(Panels<M>{w.k_rows + k0 * units}, keys, w.q_lanes, vecs, units, Store{p});
    product<M>(Panels<M>{w.v_rows + k0 * units}, keys, w.g_lanes, vecs, units, Store{dp});
    const vf factor = splat(a.scale[head] * kLog2e);
    // A few keys are summed on their own: those of padding are all alike, and one long chain of
    // like terms rounds them all the same way.
    for (int64_t first = 0; first < keys; first += kSummed)
      for (int m = 0; m < vecs * kLanes; m += kLanes) {
        vf delta = zero(), weight = zero();
        for (int64_t k = first; k < min(first + kSummed, keys); ++k) {
          float* at = p + k * kBlock + m;
          const vf raw = load(at);
          // As the forward: of large scores the rounding exceeds all else.
          vf s = unfused(raw * factor);
          if (a.table) s = s + load(map.bias + (k0 + k) * ld + q0 + m);
          if (map.several)
            s = s + select(load(map.bands + q0 + m) == splat(map.bands[k0 + k]), zero(),
                           splat(kHidden));
          const vf value = probability(M{}, s - load(w.shift + m)) * load(w.inverse + m);
          store(at, value);
          delta = fma(value, load(dp + k * kBlock + m), delta);
          weight = weight + value;
          if (cosine) store(w.raw + (k0 + k) * kBlock + m, raw);
        }
        store(w.delta + m, load(w.delta + m) + delta);
        store(w.weight + m, load(w.weight + m) + weight);
      }
  }

  // dS from P, dP and delta, and what follows from it.
  void tile(int64_t q0, int64_t queries, int64_t t, const Sums& sums, const Workspace<M>& w) const {
    const int64_t k0 = t * kBlock, keys = min(kBlock, N - k0);
    const int q_vecs = static_cast<int>(ceil_div(queries, kLanes));
    float *p = w.p + k0 * kBlock, *ds = w.ds + k0 * kBlock;
    for (int64_t k = 0; k < kBlock; ++k)
      for (int m = 0; m < kBlock; m += kLanes) {
        float *at_p = p + k * kBlock + m, *at_ds = ds + k * kBlock + m;
        if (k >= keys || m >= q_vecs * kLanes) {
          store(at_p, zero());
          store(at_ds, zero());
          continue;
        }
        const vf gradient = load(at_p) * (load(at_ds) - load(w.delta + m));
        store(at_ds, gradient);
        if (sums.scale) {
          const vf raw = load(w.raw + (k0 + k) * kBlock + m);
          store(w.scale + m, fma(gradient, raw, load(w.scale + m)));
          store(w.rest + m, load(w.rest + m) + gradient);
          store(w.mean + m, fma(load(at_p), raw, load(w.mean + m)));
        }
        if (!sums.table) continue;
        float* sum = sums.table + (k0 + k) * ld + q0 + m;
        store(sum, load(sum) + gradient);
      }
    w.add_gradients(t, keys, queries, D, p, ds, w.dq, w.dk + k0 * D, w.dv + k0 * D);
  }

  // factor * acc[d][i] through the normalisation, to tokens first + i of part 0, 1 or 2 of dqkv.
  void write(int64_t batch, int64_t head, int part, int64_t first, int64_t count, const float* acc,
             float factor, const WindowMap& map, const Sums& sums, const Workspace<M>& w) const {
    const int64_t across = ceil_div(D, kLanes) * kLanes;
    for (int64_t d = 0; d < D; d += kLanes)
      transpose_rows(acc + d * kBlock, static_cast<int64_t>(kBlock),
                     static_cast<int>(min(kLanes, D - d)), count, w.grads + d, across);
    for (int64_t i = 0; i < count; ++i) {
      float* row = w.grads + i * across;
      const int64_t token = map.token[first + i];
      if (a.cosine && part < 2) {
        read_token(a, batch, head, part, token, w.x);
        const float inverse = inverse_length(w.x, D);
        const bool clamped = inverse >= 1e12f;  // a length below the smallest is a constant
        double dot = 0;
        for (int64_t d = 0; d < D; ++d) {
          w.x[d] *= inverse;
          dot += static_cast<double>(w.x[d]) * row[d];
        }
        const float along = clamped ? 0.f : static_cast<float>(dot);
        for (int64_t d = 0; d < D; ++d) row[d] = (row[d] - w.x[d] * along) * (inverse * factor);
      } else if (part < 2) {
        for (int64_t d = 0; d < D; ++d) row[d] *= factor;
      }
      if (token < 0) {
        if (sums.pad)
          for (int64_t d = 0; d < D; ++d) sums.pad[part * D + d] += row[d];
        continue;
      }
      const int64_t at = (((batch * a.H * a.W + token) * 3 + part) * a.heads + head) * D;
      if (a.dtype == DType::f32) {
        std::memcpy(static_cast<float*>(g.dqkv) + at, row, static_cast<size_t>(D) * 4);
        continue;
      }
      bf16_t* out = static_cast<bf16_t*>(g.dqkv) + at;
      int64_t d = 0;
      for (; d + kLanes <= D; d += kLanes) store(out + d, load(row + d));
      for (; d < D; ++d) from_float(row[d], out + d);
    }
  }

  // The table's gradient of one head: every pair of tokens of the same relative position.
  void fold(int64_t head, const float* pairs, int64_t ranges, int64_t stride) const {
    const int64_t across = 2 * a.ww - 1;
    float* out = g.dtable + head * (2 * a.wh - 1) * across;
    for (int64_t dy = 1 - a.wh; dy < a.wh; ++dy)
      for (int64_t dx = 1 - a.ww; dx < a.ww; ++dx) {
        double sum = 0;
        for (int64_t yk = dy < 0 ? -dy : 0; yk < a.wh && yk + dy < a.wh; ++yk)
          for (int64_t xk = dx < 0 ? -dx : 0; xk < a.ww && xk + dx < a.ww; ++xk) {
            const float* at = pairs + (yk * a.ww + xk) * ld + (yk + dy) * a.ww + xk + dx;
            for (int64_t r = 0; r < ranges; ++r) sum += at[r * stride];
          }
        out[(dy + a.wh - 1) * across + dx + a.ww - 1] = static_cast<float>(sum);
      }
  }
};

template <class M>
void backward(const WindowArgs& a, const WindowGrads& g) {
  const Backward<M> op(a, g);
  const int threads = a.threads;
  const int64_t D = a.D, all = a.B * op.windows;
  const int64_t pairs = g.dtable ? op.N * op.ld : 0, small = 3 * D + 1;
  // Functions of the shape only.
  int64_t ranges = min(kMostRanges, all);
  while (ranges > 1 && a.heads * ranges * pairs * 4 > kMostBytes) ranges /= 2;
  const int64_t tasks = a.heads * ranges, work = Workspace<M>::bytes(op.N, D, g.dscale);
  const int64_t biases = a.table ? op.N * op.ld : 0, bytes = work + WindowMap::bytes(op.N, biases);
  Scratch scratch(threads * bytes), tables(tasks * pairs * 4), others(tasks * small * 8);
  std::memset(tables.ptr, 0, static_cast<size_t>(tasks * pairs) * 4);
  std::memset(others.ptr, 0, static_cast<size_t>(tasks * small) * 8);
  parallel_for(tasks, threads, [&](int64_t begin, int64_t end, int thread) {
    Workspace<M> w;
    w.carve(scratch.as<char>(thread * bytes), op.N, D, g.dscale);
    WindowMap map;
    map.carve(scratch.as<char>(thread * bytes + work), op.N, biases);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / ranges, range = task % ranges;
      map.go_to_head(a, head);
      double* mine = others.as<double>() + task * small;
      const Sums sums{pairs ? tables.as<float>() + task * pairs : nullptr, g.dpad ? mine : nullptr,
                      g.dscale ? mine + 3 * D : nullptr};
      for (int64_t i = all * range / ranges; i < all * (range + 1) / ranges; ++i) {
        map.go_to_window(a, i % op.windows);
        op.run(i / op.windows, head, map, sums, w);
      }
    }
  });
  if (g.dtable)
    parallel_for(a.heads, threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t head = begin; head < end; ++head)
        op.fold(head, tables.as<float>() + head * ranges * pairs, ranges, pairs);
    });
  for (int64_t head = 0; head < a.heads; ++head) {
    const double* first = others.as<double>() + head * ranges * small;
    auto total = [&](int64_t at) {
      double sum = 0;
      for (int64_t r = 0; r < ranges; ++r) sum += first[r * small + at];
      return static_cast<float>(sum);
    };
    if (g.dscale) g.dscale[head] = total(3 * D);
    if (!g.dpad) continue;
    for (int64_t part = 0; part < 3; ++part)
      for (int64_t d = 0; d < D; ++d) g.dpad[(part * a.heads + head) * D + d] = total(part * D + d);
  }
}

}  // namespace

void window_backward(const WindowArgs& a, const WindowGrads& g) {
  if (a.B == 0 || a.H == 0 || a.W == 0 || a.heads == 0) return;
  with_products(a.dtype, [&](auto m) { backward<decltype(m)>(a, g); });
}

}  // namespace VITFAST_ISA
}  // namespace vitfast
