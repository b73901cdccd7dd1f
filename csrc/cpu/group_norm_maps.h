// What the forward and the backward of group_norm share: blocks of pixels, and who works on them.
#pragma once
#include "group_norm.h"
#include "norm_rows.h"

namespace vitfast {
namespace VITFAST_ISA {
namespace {

// A sample's pixels in blocks, small enough for float sums to keep their accuracy within one; and
// how a sample is shared out. With contiguous channels a share is a block, of which there are some
// 32, of 16 to 128 pixels. With contiguous pixels it is a channel.
struct Blocks {
  int64_t pixels, size, count, shares;
  explicit Blocks(const GroupNormShape& s) : pixels(s.H * s.W) {
    size = s.channels_last ? clamp(ceil_div(pixels, 32), 16, 128) : 2048;
    count = ceil_div(pixels, size);
    shares = s.channels_last ? count : s.C;
  }
  int64_t begin(int64_t i) const { return i * size; }
  int64_t length(int64_t i) const { return min(size, pixels - i * size); }
};

// Stores past the caches pay where a call touches more than they hold, and need aligned vectors.
inline bool past_caches(const FeatureMap& out, const GroupNormShape& s, int64_t call_bytes) {
  const int64_t bytes = size_of(out.dtype), vector = kLanes * bytes;
  const int64_t step = s.channels_last ? out.pixel | out.line : out.channel;
  return out.ptr != nullptr && call_bytes >= (int64_t{32} << 20) &&
         reinterpret_cast<uintptr_t>(out.ptr) % vector == 0 &&
         (step | out.sample) * bytes % vector == 0;
}

inline int64_t map_bytes(const FeatureMap& m, const GroupNormShape& s) {
  return m.ptr != nullptr ? s.B * s.C * s.H * s.W * size_of(m.dtype) : 0;
}

// start(b, slot), first(b, i, slot) for every share of a sample, then middle(b, g0, g1, slot) over
// its groups, then last(b, i, slot). Whole samples go to threads of their own while there are
// enough of them, the others are shared out. A slot is scratch for one sample.
template <class Start, class First, class Middle, class Last>
inline void over_samples(const GroupNormShape& s, const Blocks& blocks, int threads,
                         const Start& start, const First& first, const Middle& middle,
                         const Last& last) {
  const int64_t whole = threads > 1 ? s.B / threads * threads : s.B;
  parallel_for(whole, threads, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t b = begin; b < end; ++b) {
      start(b, thread);
      for (int64_t i = 0; i < blocks.shares; ++i) first(b, i, thread);
      middle(b, 0, s.groups, thread);
      for (int64_t i = 0; i < blocks.shares; ++i) last(b, i, thread);
    }
  });
  for (int64_t b = whole; b < s.B; ++b) {
    start(b, 0);
    parallel_for(blocks.shares, threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) first(b, i, 0);
    });
    parallel_for(s.groups, threads,
                 [&](int64_t begin, int64_t end, int) { middle(b, begin, end, 0); });
    parallel_for(blocks.shares, threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) last(b, i, 0);
    });
  }
}

}  // namespace
}  // namespace VITFAST_ISA
}  // namespace vitfast
