// Blocks of rows times panels of columns, shared out over threads; see gemm.h.
#include "gemm.h"

#include "../common/parallel.h"
#include "../common/scratch.h"
#include "activation.h"
#include "gemm_pack.h"
#include "gemm_rows.h"

namespace vitfast {
namespace VITFAST_ISA {
namespace {

// Rows that pass over a panel of B while it is in the cache.
constexpr int64_t kBlockRows = 16 * kTileRows;
constexpr int64_t kStagedBytes = 4 << 20;

// How the rows of A are cut into blocks. A block never spans two groups.
struct Plan {
  bool pairs, staged;
  int64_t steps, panels, group_rows, blocks_per_group, blocks, block_rows;
  // Sums of a tile are added to the totals after so many steps: few enough for exact sums (rounded
  // operands need no such care), and for a stretch of B to stay in the L1 cache.
  int64_t stretch;
};

Plan plan_of(const Gemm& g) {
  Plan p;
  p.pairs = in_pairs(g.compute);
  p.steps = steps_of(g.b.k, g.compute);
  p.panels = panels_of(g.b.n);
  const bool few_terms = g.a_transposed && p.steps <= kMostSteps;  // of a weight's gradient
  p.stretch = p.pairs ? kMostSteps : few_terms ? kMostSteps / 4 : kMostSteps / 2;
  const bool one_group = g.a.rows >= g.m || g.a.outer == g.a.rows * g.a.inner;
  // Rows that share the sets of the L1 cache push each other out of it.
  const bool shared_sets =
      g.a.inner * size_of(g.a.dtype) % 4096 == 0 && g.m >= kTileRows && p.panels > 4;
  p.staged = g.a_transposed || shared_sets ||
             (g.compute == DType::bf16 && (!p.pairs || g.b.k % 2 != 0)) ||
             (!one_group && g.a.rows < 4 * kTileRows);
  p.group_rows = one_group || p.staged ? g.m : g.a.rows;
  int64_t most = kBlockRows;
  if (p.staged) {
    const int64_t fit = kStagedBytes / (p.steps * kStepBytes);
    most = max(min(most, fit / kTileRows * kTileRows), kTileRows);
  }
  // Enough pieces for an even split over the threads, unless blocks became too low for it.
  const int64_t wanted = ceil_div(ceil_div(8 * g.threads, p.panels), g.m / p.group_rows);
  p.blocks_per_group =
      max(ceil_div(p.group_rows, most), min(wanted, ceil_div(p.group_rows, 4 * kTileRows)));
  p.blocks = p.blocks_per_group * (g.m / p.group_rows);
  p.block_rows = ceil_div(p.group_rows, p.blocks_per_group);
  return p;
}

// ---- A, where it cannot be read in place --------------------------------------------------------

// Rows [begin, end) as steps, `stride` words apart.
template <class T, bool InPairs>
void stage_rows(const Gemm& g, int64_t begin, int64_t end, uint32_t* to, int64_t stride) {
  for (int64_t i = begin; i < end; ++i, to += stride) {
    const T* const row = static_cast<const T*>(g.a.ptr) + offset(g.a, i);
    if constexpr (InPairs) {
      std::memcpy(to, row, static_cast<size_t>(g.b.k) * sizeof(T));
      if (g.b.k % 2 != 0) to[g.b.k / 2] = half_of(row[g.b.k - 1]);
    } else {
      for (int64_t j = 0; j < g.b.k; ++j) to[j] = word_of(to_float(row[j]));
    }
  }
}

template <class T, bool InPairs>
void stage_transposed(const Gemm& g, int64_t begin, int64_t end, uint32_t* to, int64_t stride) {
  constexpr int64_t kSquare = 16;
  const T* const a = static_cast<const T*>(g.a.ptr) + begin;
  const int64_t rows = end - begin, line = g.a.inner, whole = InPairs ? g.b.k / 2 : g.b.k;
  for (int64_t j0 = 0; j0 < whole; j0 += kSquare) {
    const int64_t j1 = min(j0 + kSquare, whole);
    for (int64_t i0 = 0; i0 < rows; i0 += kSquare) {
      const int64_t i1 = min(i0 + kSquare, rows);
      for (int64_t i = i0; i < i1; ++i) {
        for (int64_t j = j0; j < j1; ++j) {
          if constexpr (InPairs) {
            const T* const p = a + 2 * j * line + i;
            to[i * stride + j] = half_of(p[0]) | half_of(p[line]) << 16;
          } else {
            to[i * stride + j] = word_of(to_float(a[j * line + i]));
          }
        }
      }
    }
  }
  if (InPairs && g.b.k % 2 != 0)
    for (int64_t i = 0; i < rows; ++i) to[i * stride + whole] = half_of(a[(g.b.k - 1) * line + i]);
}

template <class T, bool InPairs>
void stage_as(const Gemm& g, int64_t begin, int64_t end, uint32_t* to, int64_t stride) {
  if (g.a_transposed)
    stage_transposed<T, InPairs>(g, begin, end, to, stride);
  else
    stage_rows<T, InPairs>(g, begin, end, to, stride);
}

void stage(const Gemm& g, bool pairs, int64_t begin, int64_t end, uint32_t* to, int64_t stride) {
  if (pairs)
    stage_as<bf16_t, kHasPairs>(g, begin, end, to, stride);
  else if (g.a.dtype == DType::bf16)
    stage_as<bf16_t, false>(g, begin, end, to, stride);
  else
    stage_as<float, false>(g, begin, end, to, stride);
}

// ---- what happens to the sums -------------------------------------------------------------------

struct Absent {};
constexpr bool is_absent(const Absent*) { return true; }
constexpr bool is_absent(const void*) { return false; }

struct Offsets {
  int64_t out[kBlockRows], residual[kBlockRows], z[kBlockRows], gate_z[kBlockRows];
};

void locate(const Gemm& g, int64_t begin, int64_t end, Offsets& o) {
  const auto fill = [&](const GemmRows& r, int64_t* to) {
    if (r.ptr != nullptr)
      for (int64_t i = begin; i < end; ++i) to[i - begin] = offset(r, i);
  };
  fill(g.out, o.out);
  fill(g.residual, o.residual);
  fill(g.z, o.z);
  fill(g.gate_z, o.gate_z);
}

// A panel's rows from their totals (and the totals of the other half) to the output.
template <Act A>
void finish(const Gemm& g, const Offsets& o, int64_t rows, int64_t column, const float* total,
            const float* gate_total) {
  for (int64_t c = column; c < min(column + kPanel, g.b.n);
       c += kLanes, total += kLanes, gate_total += kLanes) {
    const int n = static_cast<int>(min(kLanes, g.b.n - c));
    const vf bias = get(g.bias, c, n), gate_bias = get(g.gate_bias, c, n);
    const vf gamma = get(g.gamma, c, n);
    for (int64_t i = 0; i < rows; ++i) {
      const vf z = load(total + i * kPanel) + bias;
      if (g.z.ptr != nullptr) put(g.z, o.z[i] + c, z, n);
      vf y = activate<A>(z);
      if (g.b.gate != nullptr) {
        const vf gate = load(gate_total + i * kPanel) + gate_bias;
        if (g.gate_z.ptr != nullptr) put(g.gate_z, o.gate_z[i] + c, gate, n);
        y = y * gate;
      }
      if (g.gamma.ptr != nullptr) y = y * gamma;
      if (g.residual.ptr != nullptr)
        y = y + get(g.residual.ptr, g.residual.dtype, o.residual[i] + c, n);
      put(g.out, o.out[i] + c, y, n);
    }
  }
}

// The same for a whole panel of an ungated layer that stores no sums.
template <Act A, class Residual, class Out>
void finish_plain(const Gemm& g, const Offsets& o, int64_t rows, int64_t column, const float* total,
                  const float*) {
  const vf bias0 = get(g.bias, column, kLanes), bias1 = get(g.bias, column + kLanes, kLanes);
  const bool scaled = g.gamma.ptr != nullptr;
  const vf gamma0 = scaled ? get(g.gamma, column, kLanes) : splat(1.f);
  const vf gamma1 = scaled ? get(g.gamma, column + kLanes, kLanes) : splat(1.f);
  for (int64_t i = 0; i < rows; ++i, total += kPanel) {
    vf y0 = activate<A>(load(total) + bias0), y1 = activate<A>(load(total + kLanes) + bias1);
    if constexpr (!is_absent(static_cast<Residual*>(nullptr))) {
      const Residual* const r =
          static_cast<const Residual*>(g.residual.ptr) + o.residual[i] + column;
      y0 = y0 * gamma0 + load(r);
      y1 = y1 * gamma1 + load(r + kLanes);
    }
    Out* const out = static_cast<Out*>(g.out.ptr) + o.out[i] + column;
    store(out, y0);
    store(out + kLanes, y1);
  }
}

using Finish = void (*)(const Gemm&, const Offsets&, int64_t, int64_t, const float*, const float*);

template <Act A>
Finish finish_as(const Gemm& g, bool whole) {
  const bool floats = g.out.dtype == DType::f32, residual = g.residual.ptr != nullptr;
  if (!whole || g.b.gate != nullptr || g.z.ptr != nullptr) return finish<A>;
  if (!residual && g.gamma.ptr == nullptr)
    return floats ? finish_plain<A, Absent, float> : finish_plain<A, Absent, bf16_t>;
  if (residual && floats && g.residual.dtype == DType::f32) return finish_plain<A, float, float>;
  return finish<A>;
}

Finish finish_of(const Gemm& g, bool whole) {
  return with_act(g.act, [&](auto kind) { return finish_as<decltype(kind)::value>(g, whole); });
}

// ---- the product --------------------------------------------------------------------------------

struct Tiles {
  Tile of[kTileRows + 1];
  explicit Tiles(bool pairs) {
    for (int rows = 1; rows <= kTileRows; ++rows)
      of[rows] = pairs ? tile_of<Pairs, kTileRows>(rows) : tile_of<Floats, kTileRows>(rows);
  }
};

// Steps of a panel that are put in order at a time: long runs of each column, as the hardware's
// prefetching wants them, and still a part of the L2 cache only.
constexpr int64_t kSlabSteps = 4 * kMostSteps;

// One panel of one half of B, as the tiles read it.
class Panel {
 public:
  Panel(const Gemm& g, const Plan& p, const void* half, int64_t panel, const void* packed,
        uint32_t* room)
      : g_(g),
        p_(p),
        half_(half),
        panel_(panel),
        packed_(static_cast<const char*>(packed)),
        room_(room) {}

  // From this step on, in order. Steps come in order too.
  const char* from(int64_t step) const {
    if (packed_ != nullptr) return packed_ + step * kPanel * kStepBytes;
    const int64_t at = step % kSlabSteps;
    if (at == 0) {
      const int64_t end = min(step + kSlabSteps, p_.steps);
      pack_steps(g_.b, g_.compute, half_, panel_, step, end, room_);
    }
    return reinterpret_cast<const char*>(room_ + at * kPanel);
  }

  // What the caches should fetch from this step on, of which each has `tiles` tiles: the following
  // stretch where B is in order already, else the next slab, of this panel or of the one after it.
  void look_ahead(int64_t step, int64_t tiles, Ahead& to) const {
    if (packed_ != nullptr) {
      constexpr int64_t step_bytes = kPanel * kStepBytes;
      if (step == 0)
        to = {packed_ + kMostSteps * step_bytes, max(tiles * 64 / step_bytes, 1),
              p_.steps * step_bytes, 0, 0};
      return;
    }
    if (step % kSlabSteps != 0) return;
    to = {};
    const int64_t end = min(step + kSlabSteps, p_.steps);
    const bool last = end == p_.steps;
    const int64_t column = (last ? panel_ + 1 : panel_) * kPanel, next = last ? 0 : end;
    const int64_t columns = min(kPanel, g_.b.n - column);
    if (columns <= 0 || g_.b.k_stride != 1) return;
    const int64_t item = size_of(g_.b.dtype), per = p_.pairs ? 2 : 1;
    const int64_t stride = g_.b.n_stride * item;
    const int64_t run = ceil_div(min(kSlabSteps, p_.steps - next) * per * item, 64);
    to = {static_cast<const char*>(half_) + column * stride + next * per * item,
          max((end - step) * tiles / (columns * run), 1), run, run, stride - run * 64};
  }

 private:
  const Gemm& g_;
  const Plan& p_;
  const void* half_;
  int64_t panel_;
  const char* packed_;
  uint32_t* room_;
};

// total[rows][kPanel] = A B for one panel.
void panel_product(const Tiles& tiles, const Plan& p, int64_t rows, const char* a, int64_t a_stride,
                   const Panel& b, float* total) {
  const int64_t count = ceil_div(rows, kTileRows), stretch = p.stretch, steps = p.steps;
  Ahead ahead;
  for (int64_t s = 0; s < steps; s += stretch) {
    const char* const in_order = b.from(s);
    b.look_ahead(s, count, ahead);
    for (int64_t t = 0; t < count; ++t) {
      const int64_t first = rows * t / count, last = rows * (t + 1) / count;
      tiles.of[last - first](min(stretch, steps - s), a + first * a_stride + s * kStepBytes,
                             a_stride, in_order, total + first * kPanel, s == 0, ahead);
    }
  }
}

}  // namespace

void gemm(const Gemm& g) {
  if (g.m == 0 || g.b.n == 0) return;
  const Plan p = plan_of(g);
  const Tiles tiles(p.pairs);
  const Finish finish_whole = finish_of(g, true), finish_part = finish_of(g, false);
  const bool gated = g.b.gate != nullptr;
  const int64_t halves = gated ? 2 : 1;
  const int64_t panel_bytes = p.steps * kPanel * kStepBytes;
  // Rows a little apart from a power of two, so that they do not share cache sets.
  const int64_t staged_words = p.staged ? align64(p.steps * kStepBytes) / kStepBytes + 16 : 0;
  const int64_t total_bytes = align64(halves * p.block_rows * kPanel * 4);
  const int64_t offset_bytes = align64(sizeof(Offsets));
  const int64_t room_bytes =
      g.packed == nullptr ? align64(min(kSlabSteps, p.steps) * kPanel * kStepBytes) : 0;
  const int64_t thread_bytes =
      total_bytes + offset_bytes + room_bytes + align64(p.block_rows * staged_words * kStepBytes);
  const int64_t tasks = p.blocks * p.panels;
  const int threads = static_cast<int>(min(g.threads, tasks));
  const Scratch scratch(thread_bytes * threads);

  parallel_for(tasks, threads, [&](int64_t begin, int64_t end, int thread) {
    float* const total = scratch.as<float>(thread * thread_bytes);
    Offsets& offsets = *scratch.as<Offsets>(thread * thread_bytes + total_bytes);
    uint32_t* const room = scratch.as<uint32_t>(thread * thread_bytes + total_bytes + offset_bytes);
    uint32_t* const staged = room + room_bytes / kStepBytes;
    const char* a = nullptr;
    int64_t a_stride = 0, block = -1, rows = 0;
    for (int64_t task = begin; task < end; ++task) {
      if (task / p.panels != block) {
        block = task / p.panels;
        const int64_t group = block / p.blocks_per_group, part = block % p.blocks_per_group;
        const int64_t first = group * p.group_rows + p.group_rows * part / p.blocks_per_group;
        const int64_t last = group * p.group_rows + p.group_rows * (part + 1) / p.blocks_per_group;
        rows = last - first;
        locate(g, first, last, offsets);
        if (p.staged) {
          stage(g, p.pairs, first, last, staged, staged_words);
          a = reinterpret_cast<const char*>(staged);
          a_stride = staged_words * kStepBytes;
        } else {
          a = static_cast<const char*>(g.a.ptr) + offset(g.a, first) * size_of(g.a.dtype);
          a_stride = g.a.inner * size_of(g.a.dtype);
        }
      }
      const int64_t panel = task % p.panels;
      const char* const packed =
          g.packed != nullptr ? static_cast<const char*>(g.packed) + panel * halves * panel_bytes
                              : nullptr;
      float* const gate_total = total + (halves - 1) * p.block_rows * kPanel;
      panel_product(tiles, p, rows, a, a_stride, Panel(g, p, g.b.ptr, panel, packed, room), total);
      if (gated)
        panel_product(
            tiles, p, rows, a, a_stride,
            Panel(g, p, g.b.gate, panel, packed != nullptr ? packed + panel_bytes : nullptr, room),
            gate_total);
      const bool whole = (panel + 1) * kPanel <= g.b.n;
      (whole ? finish_whole : finish_part)(g, offsets, rows, panel * kPanel, total, gate_total);
    }
  });
}

}  // namespace VITFAST_ISA
}  // namespace vitfast
