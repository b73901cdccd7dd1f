// The inner loops of the convolution: some pixels of a line for one vector of channels.
#pragma once
#include "../common/math.h"
#include "simd.h"

namespace vitfast {
namespace VITFAST_ISA {
namespace {

constexpr int kWidestTile = kLanes == 16 ? 16 : 8;

// z[p] = bias + sum over taps, for P pixels from lines[ky] on; the sum's order does not depend on
// P. K is the width of the kernel, 0: `width` at run time. Pixels are kLanes floats apart, in z
// z_step. lines: [height], of a line's pixels under the taps; taps: [height][width][kLanes].
template <int K, int P>
void convolve(const float* const* lines, int64_t height, int64_t width, const float* taps, vf bias,
              float* z, int64_t z_step) {
  vf sum[P];
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p) sum[p] = bias;
  for (int64_t ky = 0; ky < height; ++ky) {
    const float* const in = lines[ky];
    if constexpr (K > 0) {
      vf tap[K];
#pragma GCC unroll 16
      for (int kx = 0; kx < K; ++kx) tap[kx] = load(taps + kx * kLanes);
#pragma GCC unroll 32
      for (int j = 0; j < P + K - 1; ++j) {
        const vf x = load(in + j * kLanes);
#pragma GCC unroll 16
        for (int p = 0; p < P; ++p)
          if (j - p >= 0 && j - p < K) sum[p] = fma(x, tap[j - p], sum[p]);
      }
    } else {
      for (int64_t kx = 0; kx < width; ++kx) {
        const vf tap = load(taps + kx * kLanes);
#pragma GCC unroll 16
        for (int p = 0; p < P; ++p) sum[p] = fma(load(in + (p + kx) * kLanes), tap, sum[p]);
      }
    }
    taps += (K > 0 ? K : width) * kLanes;
  }
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p) store(z + p * z_step, sum[p]);
}

using Convolve = void (*)(const float* const*, int64_t, int64_t, const float*, vf, float*, int64_t);

template <int P>
Convolve convolve_of(int64_t width) {
  switch (width) {
    case 3: return convolve<3, P>;
    case 5: return convolve<5, P>;
    case 7: return convolve<7, P>;
    case 9: return convolve<9, P>;
    case 11: return convolve<11, P>;
    default: return convolve<0, P>;
  }
}

struct Tiles {
  int pixels;
  Convolve convolve;
};

// The tiles that cover a line of so many pixels with the least work.
inline Tiles tiles_for(int64_t columns, int64_t width) {
  const auto work = [&](int64_t pixels) { return ceil_div(columns, pixels) * (pixels + 1); };
  int best = kWidestTile;
  constexpr int choices[] = {14, 12, 10, 8, 7, 6, 4};
  for (const int pixels : choices)
    if (pixels <= kWidestTile && work(pixels) < work(best)) best = pixels;
  switch (best) {
#if defined(__AVX512F__)
    case 16: return {16, convolve_of<16>(width)};
    case 14: return {14, convolve_of<14>(width)};
    case 12: return {12, convolve_of<12>(width)};
    case 10: return {10, convolve_of<10>(width)};
#endif
    case 8: return {8, convolve_of<8>(width)};
    case 7: return {7, convolve_of<7>(width)};
    case 6: return {6, convolve_of<6>(width)};
    default: return {4, convolve_of<4>(width)};
  }
}

}  // namespace
}  // namespace VITFAST_ISA
}  // namespace vitfast
