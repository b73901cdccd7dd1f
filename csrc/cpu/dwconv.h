// Depthwise convolution of a map [B, H, W, C] and a norm over its channels: dwconv_norm.
//
// Stride 1, zero padding to the same size. Every pixel is computed in the same order of operations,
// whatever part of the map a call covers, and the weight's gradient sums fixed blocks of lines in
// order: results depend neither on the number of threads nor on stripes.
#pragma once
#include <cstdint>

#include "../common/dtype.h"
#include "isa.h"
#include "norm.h"

namespace vitfast {

constexpr int64_t kDwconvWidest = 31;  // of a kernel, in both directions

// Strides in elements.
struct DwconvMap {
  const void* ptr;  // [B, H, W, C]
  DType dtype;
  int64_t b, h, w, c;
  bool rounded;  // to bfloat16 first
};

struct DwconvSizes {
  int64_t B, H, W, C;
  int64_t kh, kw;  // odd
  int threads;
};

struct DwconvForward {
  DwconvSizes size;
  NormKind kind;
  DwconvMap x;
  Channels weight;                        // contiguous [C, kh, kw]
  bool rounded;                           // weight and bias are, to bfloat16
  bool flipped;                           // both ways: the gradient of x
  Channels bias, norm_weight, norm_bias;  // [C]; null: zero, one, zero
  float eps;
  int64_t first, last;  // lines of each image to compute
  void* y;              // contiguous [B, last - first, W, C]
  DType y_dtype;
  float* stats;  // [B * (last - first) * W, 2]: mean, 1 / sqrt(var + eps); null: not wanted
};

// Gradients of weight and bias of the convolution alone; null: not wanted.
struct DwconvWeightGrad {
  DwconvSizes size;
  DwconvMap x;
  DwconvMap grad;   // of the convolution's result
  Channels weight;  // contiguous [C, kh, kw], overwritten
  Channels bias;    // [C], overwritten
};

VITFAST_DECLARE(void dwconv_forward(const DwconvForward&))
VITFAST_DECLARE(void dwconv_weight_grad(const DwconvWeightGrad&))

inline void dwconv_forward(const DwconvForward& a) { VITFAST_DISPATCH(dwconv_forward(a)) }
inline void dwconv_weight_grad(const DwconvWeightGrad& a) {
  VITFAST_DISPATCH(dwconv_weight_grad(a))
}

}  // namespace vitfast
