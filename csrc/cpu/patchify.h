// Images to rows of patches: the matrix whose product with the weight is patch_embed.
#pragma once
#include <cstdint>

#include "../common/dtype.h"
#include "isa.h"

namespace vitfast {

// Row (b, i, j) of the [B * grid_h * grid_w, channels * p * q] matrix is patch (i, j) of image b,
// in the order channel, row, column; rows [first, first + count) of it are written.
struct Patchify {
  const void* image;  // [B, channels, grid_h * p, grid_w * q]
  DType dtype;        // f32, bf16 or u8
  int64_t b_stride, c_stride, h_stride, w_stride;
  int64_t channels, grid_h, grid_w, p, q;
  const float *scale, *shift;  // [channels]: value * scale + shift; null: the value itself
  int64_t first, count;
  void* out;  // [count, channels * p * q], contiguous
  DType out_dtype;
  int threads;
};

VITFAST_DECLARE(void patchify(const Patchify&))
inline void patchify(const Patchify& a) { VITFAST_DISPATCH(patchify(a)) }

}  // namespace vitfast
