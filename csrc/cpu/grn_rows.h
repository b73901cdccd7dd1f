// What the forward and the backward of grn share: blocks of positions, the order of the passes.
#pragma once
#include "grn.h"
#include "norm_rows.h"

namespace vitfast {
namespace VITFAST_ISA {
namespace {

// How an image is cut: into blocks of rows with a partial sum each; planar into channels, which
// have one sum together.
struct Cut {
  bool planar;
  int64_t N, rows, units, partials;
  Cut(bool planar, int64_t N, int64_t C)
      : planar(planar),
        N(N),
        rows(block_of(N)),
        units(planar ? C : ceil_div(N, rows)),
        partials(planar ? 1 : units) {}
  int64_t begin(int64_t unit) const { return unit * rows; }
  int64_t end(int64_t unit) const { return min((unit + 1) * rows, N); }
};

// first(b, unit, slot) over an image, middle(b, slot), then second(b, unit, slot) in reverse, so
// that it begins with what is still in cache. Images that fit a core's share of the caches have a
// thread each; there are as many slots as threads. `past`: second stores past the caches.
template <class First, class Middle, class Second>
inline void each_image(int64_t B, int64_t units, int64_t image_bytes, int threads, bool past,
                       const First& first, const Middle& middle, const Second& second) {
  const int64_t alone = image_bytes <= (int64_t{4} << 20) ? B / threads * threads : 0;
  parallel_for(alone, threads, [&](int64_t begin, int64_t end, int slot) {
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t unit = 0; unit < units; ++unit) first(b, unit, slot);
      middle(b, slot);
      for (int64_t unit = units; unit-- > 0;) second(b, unit, slot);
    }
    if (past) stream_fence();
  });
  for (int64_t b = alone; b < B; ++b) {
    parallel_for(units, threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t unit = begin; unit < end; ++unit) first(b, unit, 0);
    });
    middle(b, 0);
    parallel_for(units, threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t unit = end; unit-- > begin;) second(b, unit, 0);
      if (past) stream_fence();
    });
  }
}

// sums[c] (+)= partials[i * step + c], in the order of i < count. sums: [C].
inline void add_up(const float* partials, int64_t count, int64_t step, double* sums, bool more,
                   int64_t C) {
  for (int64_t c = 0; !more && c < C; ++c) sums[c] = 0.;
  for (int64_t i = 0; i < count; ++i) {
    const float* partial = partials + i * step;
    for (int64_t c = 0; c < C; ++c) sums[c] += static_cast<double>(partial[c]);
  }
}

// 1 / (mean of the norms, [C], + eps).
inline double reciprocal_mean(const float* norms, float eps, int64_t C) {
  return 1. / (row_sum(norms, C, false) / static_cast<double>(C) + static_cast<double>(eps));
}

// How many elements a lane adds up as floats, planar.
constexpr int64_t kStretch = 64 * kLanes;

}  // namespace
}  // namespace VITFAST_ISA
}  // namespace vitfast
