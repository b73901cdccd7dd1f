// Blocks of rows times panels of columns, shared out over threads; see gemm.h.
#include "gemm.h"

#include "../common/parallel.h"
#include "../common/scratch.h"
#include "activation.h"
#include "gemm_rows.h"
#include "gemm_tile.h"

namespace vitfast {
namespace VITFAST_ISA {
namespace {

// Rows that pass over a panel of B while it is in the cache.
constexpr int64_t kBlockRows = 16 * kTileRows;
constexpr int64_t kStagedBytes = 1 << 20;


// How the rows of A are cut into blocks. A block never spans two groups.
struct Plan {
  bool pairs, staged;
  int64_t steps, panels, group_rows, blocks_per_group, blocks, block_rows;
};

Plan plan_of(const Gemm& g) {
  Plan p;
  p.pairs = kHasPairs && g.compute == DType::bf16;
  p.steps = p.pairs ? (g.k + 1) / 2 : g.k;
  p.panels = ceil_div(g.n, kPanel);
  const bool one_group = g.a.rows >= g.m || g.a.outer == g.a.rows * g.a.inner;
  p.staged = g.a_transposed || (g.compute == DType::bf16 && (!p.pairs || g.k % 2 != 0)) ||
             (!one_group && g.a.rows < 4 * kTileRows);
  p.group_rows = one_group || p.staged ? g.m : g.a.rows;
  int64_t most = kBlockRows;
  if (p.staged) {
    const int64_t fit = kStagedBytes / (p.steps * kStepBytes);
    most = larger(smaller(most, fit / kTileRows * kTileRows), kTileRows);
  }
  // Enough pieces for an even split over the threads, unless blocks became too low for it.
  const int64_t wanted = ceil_div(ceil_div(8 * g.threads, p.panels), g.m / p.group_rows);
  p.blocks_per_group = larger(ceil_div(p.group_rows, most),
                              smaller(wanted, ceil_div(p.group_rows, 4 * kTileRows)));
  p.blocks = p.blocks_per_group * (g.m / p.group_rows);
  p.block_rows = ceil_div(p.group_rows, p.blocks_per_group);
  return p;
}

// ---- A, where it cannot be read in place --------------------------------------------------------

template <class T>
inline uint32_t float_bits(T x) {
  const float f = to_float(x);
  uint32_t u;
  std::memcpy(&u, &f, sizeof u);
  return u;
}
inline uint32_t low_half(float x) {
  bf16_t h;
  from_float(x, &h);
  return h.bits;
}
inline uint32_t low_half(bf16_t x) { return x.bits; }

// Rows [begin, end) as steps, `stride` words apart.
template <class T, bool InPairs>
void stage_rows(const Gemm& g, int64_t begin, int64_t end, uint32_t* to, int64_t stride) {
  for (int64_t i = begin; i < end; ++i, to += stride) {
    const T* const row = static_cast<const T*>(g.a.ptr) + offset(g.a, i);
    if constexpr (InPairs) {
      std::memcpy(to, row, static_cast<size_t>(g.k) * sizeof(T));
      if (g.k % 2 != 0) to[g.k / 2] = low_half(row[g.k - 1]);
    } else {
      for (int64_t j = 0; j < g.k; ++j) to[j] = float_bits(row[j]);
    }
  }
}

template <class T, bool InPairs>
void stage_transposed(const Gemm& g, int64_t begin, int64_t end, uint32_t* to, int64_t stride) {
  constexpr int64_t kSquare = 16;
  const T* const a = static_cast<const T*>(g.a.ptr) + begin;
  const int64_t rows = end - begin, line = g.a.inner, whole = InPairs ? g.k / 2 : g.k;
  for (int64_t j0 = 0; j0 < whole; j0 += kSquare) {
    const int64_t j1 = smaller(j0 + kSquare, whole);
    for (int64_t i0 = 0; i0 < rows; i0 += kSquare) {
      const int64_t i1 = smaller(i0 + kSquare, rows);
      for (int64_t i = i0; i < i1; ++i) {
        for (int64_t j = j0; j < j1; ++j) {
          if constexpr (InPairs) {
            const T* const p = a + 2 * j * line + i;
            to[i * stride + j] = low_half(p[0]) | low_half(p[line]) << 16;
          } else {
            to[i * stride + j] = float_bits(a[j * line + i]);
          }
        }
      }
    }
  }
  if (InPairs && g.k % 2 != 0)
    for (int64_t i = 0; i < rows; ++i) to[i * stride + whole] = low_half(a[(g.k - 1) * line + i]);
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
  for (int64_t c = column; c < smaller(column + kPanel, g.n); c += kLanes, total += kLanes,
               gate_total += kLanes) {
    const int n = static_cast<int>(smaller(kLanes, g.n - c));
    const vf bias = get(g.bias, c, n), gate_bias = get(g.gate_bias, c, n);
    const vf gamma = get(g.gamma, c, n);
    for (int64_t i = 0; i < rows; ++i) {
      const vf z = load(total + i * kPanel) + bias;
      if (g.z.ptr != nullptr) put(g.z, o.z[i] + c, z, n);
      vf y = activate<A>(z);
      if (g.gated) {
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

using Finish = void (*)(const Gemm&, const Offsets&, int64_t, int64_t, const float*, const float*);

Finish finish_of(Act act) {
  switch (act) {
    case Act::relu: return finish<Act::relu>;
    case Act::gelu: return finish<Act::gelu>;
    case Act::gelu_tanh: return finish<Act::gelu_tanh>;
    case Act::quick_gelu: return finish<Act::quick_gelu>;
    case Act::silu: return finish<Act::silu>;
    case Act::sigmoid: return finish<Act::sigmoid>;
    default: return finish<Act::none>;
  }
}

// ---- the product --------------------------------------------------------------------------------

struct Tiles {
  Tile of[kTileRows + 1];
  explicit Tiles(bool pairs) {
    for (int rows = 1; rows <= kTileRows; ++rows)
      of[rows] = pairs ? tile_of<Pairs, kTileRows>(rows) : tile_of<Floats, kTileRows>(rows);
  }
};

// total[rows][kPanel] = A B for one panel.
void panel_product(const Tiles& tiles, int64_t rows, int64_t steps, const char* a, int64_t a_stride,
                   const char* b, float* total) {
  const int64_t count = ceil_div(rows, kTileRows);
  for (int64_t s = 0; s < steps; s += kBlockSteps) {
    const int64_t now = smaller(kBlockSteps, steps - s), bytes = now * kPanel * kStepBytes;
    const int64_t lines = ceil_div(bytes / 64, count);
    for (int64_t t = 0; t < count; ++t) {
      const int64_t first = rows * t / count, last = rows * (t + 1) / count;
      tiles.of[last - first](now, a + first * a_stride + s * kStepBytes, a_stride, b,
                             total + first * kPanel, s == 0, {b + bytes + t * lines * 64, lines});
    }
    b += bytes;
  }
}

}  // namespace

void gemm(const Gemm& g) {
  if (g.m == 0 || g.n == 0) return;
  const Plan p = plan_of(g);
  const Tiles tiles(p.pairs);
  const Finish finish = finish_of(g.act);
  const int64_t halves = g.gated ? 2 : 1;
  const int64_t panel_bytes = p.steps * kPanel * kStepBytes;
  // Rows a little apart from a power of two, so that they do not share cache sets.
  const int64_t staged_words = p.staged ? align64(p.steps * kStepBytes) / kStepBytes + 16 : 0;
  const int64_t total_bytes = align64(halves * p.block_rows * kPanel * 4);
  const int64_t offset_bytes = align64(sizeof(Offsets));
  const int64_t thread_bytes =
      total_bytes + offset_bytes + align64(p.block_rows * staged_words * kStepBytes);
  const int64_t tasks = p.blocks * p.panels;
  const int threads = static_cast<int>(smaller(g.threads, tasks));
  const Scratch scratch(thread_bytes * threads);

  parallel_for(tasks, threads, [&](int64_t begin, int64_t end, int thread) {
    float* const total = scratch.as<float>(thread * thread_bytes);
    Offsets& offsets = *scratch.as<Offsets>(thread * thread_bytes + total_bytes);
    uint32_t* const staged =
        scratch.as<uint32_t>(thread * thread_bytes + total_bytes + offset_bytes);
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
      const char* const b = static_cast<const char*>(g.b) + panel * halves * panel_bytes;
      float* const gate_total = total + (halves - 1) * p.block_rows * kPanel;
      panel_product(tiles, rows, p.steps, a, a_stride, b, total);
      if (g.gated) panel_product(tiles, rows, p.steps, a, a_stride, b + panel_bytes, gate_total);
      finish(g, offsets, rows, panel * kPanel, total, gate_total);
    }
  });
}

}  // namespace VITFAST_ISA
}  // namespace vitfast
