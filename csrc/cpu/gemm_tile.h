// The inner loop of gemm: one tile of the product, its sums in registers.
#pragma once
#include "../common/math.h"
#include "simd.h"

namespace vitfast {
namespace VITFAST_ISA {
namespace {

// A tile is kTileRows x kPanel: as many sums as registers hold beside two vectors of B and one of
// A.
#if defined(__AVX512F__)
constexpr int kTileRows = 14;
#else
constexpr int kTileRows = 6;
#endif
constexpr int kPanel = 2 * kLanes;

// One step of the loop takes 4 bytes of a row of A and 4 of each column of B: a float, or a pair of
// bfloat16 where the CPU multiplies those. Elsewhere bfloat16 is widened to float beforehand.
constexpr int64_t kStepBytes = 4;
// Steps of the longest stretch of a panel that goes through the tiles at once.
constexpr int64_t kMostSteps = 256;

#if defined(__AVX512BF16__) && defined(__AVX512F__)
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

struct Floats {
  static vf multiply_add(const char* a, const char* b, vf sum) {
    float value;
    std::memcpy(&value, a, sizeof value);
    return fma(splat(value), load(reinterpret_cast<const float*>(b)), sum);
  }
};
#if defined(__AVX512BF16__) && defined(__AVX512F__)
struct Pairs {
  static vf multiply_add(const char* a, const char* b, vf sum) {
    int32_t pair;
    std::memcpy(&pair, a, sizeof pair);
    return reinterpret_cast<vf>(_mm512_dpbf16_ps(
        reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair)),
        reinterpret_cast<__m512bh>(_mm512_loadu_si512(b))));
  }
};
#else
using Pairs = Floats;  // never chosen
#endif

// What the caches should fetch while tiles are computed: runs of `run` lines, `jump` bytes from the
// end of one to the next, a line every so many steps. In bursts the fetches would wait for each
// other, and the tile for them.
struct Ahead {
  const char* line = nullptr;  // the next cache line
  int64_t every = 0;           // 0: nothing
  int64_t left = 0, run = 0, jump = 0;

  void fetch() {
    __builtin_prefetch(line, 0, 2);
    line += 64;
    if (--left == 0) {
      left = run;
      line += jump;
    }
  }
};

// total = (first ? 0 : total) + A B over `steps`. a: [Rows] of [steps] steps, a_stride bytes apart;
// b: [steps][kPanel] steps; total: [Rows][kPanel].
template <class Multiply, int Rows>
void tile(int64_t steps, const char* a, int64_t a_stride, const char* b, float* total, bool first,
          Ahead& shared_ahead) {
  vf sum[Rows][2];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) sum[i][0] = sum[i][1] = zero();
  Ahead ahead = shared_ahead;
  const int64_t every = ahead.every > 0 ? ahead.every : steps;
  for (int64_t done = 0; done < steps;) {
    const int64_t until = min(done + every, steps);
    if (ahead.every > 0) ahead.fetch();
    for (; done < until; ++done) {
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i) {
        sum[i][0] = Multiply::multiply_add(a + i * a_stride, b, sum[i][0]);
        sum[i][1] = Multiply::multiply_add(a + i * a_stride, b + kLanes * kStepBytes, sum[i][1]);
      }
      a += kStepBytes;
      b += kPanel * kStepBytes;
    }
  }
  shared_ahead = ahead;
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
    for (int j = 0; j < 2; ++j) {
      float* const t = total + i * kPanel + j * kLanes;
      store(t, first ? sum[i][j] : load(t) + sum[i][j]);
    }
  }
}

using Tile = void (*)(int64_t, const char*, int64_t, const char*, float*, bool, Ahead&);

template <class Multiply, int Rows>
Tile tile_of(int64_t rows) {
  if constexpr (Rows == 1) {
    return tile<Multiply, 1>;
  } else {
    return rows == Rows ? tile<Multiply, Rows> : tile_of<Multiply, Rows - 1>(rows);
  }
}

}  // namespace
}  // namespace VITFAST_ISA
}  // namespace vitfast
