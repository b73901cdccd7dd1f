// GroupNorm with a residual and ReLU, forward and backward.
//
// Statistics come from fixed blocks of pixels, whose sums are put together in their order: results
// do not depend on the number of threads. A sample is read twice and written once; with as many
// samples as threads each of them goes through whole, while it lies in cache.
#pragma once
#include <cstdint>

#include "../common/dtype.h"
#include "isa.h"
#include "norm.h"

namespace vitfast {

// A map [B, C, H, W], strides in elements: either its channels are contiguous (`channel` 1), and
// pixels of a line `pixel` and lines `line` apart; or its pixels are (`pixel` 1, `line` W), and
// channels `channel` apart. Null: absent.
struct FeatureMap {
  void* ptr = nullptr;  // [B, C, H, W]
  DType dtype = DType::f32;
  int64_t sample = 0, channel = 0, line = 0, pixel = 0;
};

struct GroupNormShape {
  int64_t B, C, H, W, groups;
  bool channels_last;  // which of the two all maps are
  bool relu;
  double eps;
  int threads;
};

// y = act((x - mean) * rstd * weight + bias + residual). Only y may have lines that do not follow
// each other. It may lie exactly over x or the residual.
struct GroupNormForward {
  GroupNormShape shape;
  FeatureMap x, residual, y;
  Channels weight, bias;  // [C]
  float* stats;           // [B, groups, 2]: mean, 1 / sqrt(var + eps); null: not wanted
};

// y is the forward's, and given with ReLU. dresidual: null, not wanted.
struct GroupNormBackward {
  GroupNormShape shape;
  FeatureMap grad, x, y, dx, dresidual;
  Channels weight;          // [C]
  Channels dweight, dbias;  // [C], overwritten; null: not wanted
  const float* stats;       // [B, groups, 2], of the forward
};

VITFAST_DECLARE(void group_norm_forward(const GroupNormForward&))
VITFAST_DECLARE(void group_norm_backward(const GroupNormBackward&))

inline void group_norm_forward(const GroupNormForward& a) {
  VITFAST_DISPATCH(group_norm_forward(a))
}
inline void group_norm_backward(const GroupNormBackward& a) {
  VITFAST_DISPATCH(group_norm_backward(a))
}

}  // namespace vitfast
