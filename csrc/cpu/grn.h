// Global response norm (ConvNeXt V2), forward and backward, and its two halves for callers that
// gather the sums of squares while x is in cache.
//
// x is B images of N positions and C channels. Its rows are positions with contiguous channels,
// or, planar, channels with contiguous positions. Sums over positions go over fixed blocks, and
// then over the blocks in order, so that results do not depend on the number of threads.
#pragma once
#include "norm.h"

namespace vitfast {

// y = x + (bias + weight * x * n), n = g / (mean of g over channels + eps), g = |x| over positions.
struct GrnForward {
  bool planar;
  int64_t B, N, C;
  Rows x, y;              // [B, N, C]; planar [B, C, N]
  Channels weight, bias;  // [C]
  float eps;
  float* norms;  // [B, C]: g
  int threads;
};

struct GrnBackward {
  bool planar;
  int64_t B, N, C;
  Rows grad, x, dx;                 // [B, N, C]; planar [B, C, N]
  Channels weight, dweight, dbias;  // [C]; dweight and dbias are overwritten
  float eps;
  const float* norms;  // [B, C], of the forward
  int threads;
};

// sums[c] (+)= sum of squares of channel c over the rows of a chunk.
struct GrnAccumulate {
  int64_t N, C;
  Rows x;        // [N, C]
  double* sums;  // [C]
  bool adds;
  int threads;
};

// scale = 1 + weight * n, of sums of squares: y = x * scale + bias.
struct GrnScale {
  int64_t B, C;
  const double* sums;  // [B, C]
  Channels weight;     // [C]
  float eps;
  float* scale;  // [B, C]
};

VITFAST_DECLARE(void grn_forward(const GrnForward&))
VITFAST_DECLARE(void grn_backward(const GrnBackward&))
VITFAST_DECLARE(void grn_accumulate(const GrnAccumulate&))
VITFAST_DECLARE(void grn_scale(const GrnScale&))

inline void grn_forward(const GrnForward& a) { VITFAST_DISPATCH(grn_forward(a)) }
inline void grn_backward(const GrnBackward& a) { VITFAST_DISPATCH(grn_backward(a)) }
inline void grn_accumulate(const GrnAccumulate& a) { VITFAST_DISPATCH(grn_accumulate(a)) }
inline void grn_scale(const GrnScale& a) { VITFAST_DISPATCH(grn_scale(a)) }

}  // namespace vitfast
