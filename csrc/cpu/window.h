// Attention in windows of a feature map (Swin), forward and backward. Cyclic shift, padding to
// whole windows, partition, relative-position bias, shift mask and merge are index arithmetic:
// nothing but qkv and out is as large as the map.
#pragma once
#include <cstdint>

#include "../common/dtype.h"
#include "isa.h"

namespace vitfast {

struct WindowArgs {
  DType dtype;
  int64_t B, H, W, heads, D;
  int64_t wh, ww;       // window
  int64_t sh, sw;       // cyclic shift, 0 <= s < window
  int64_t first, last;  // rows of windows to compute: [first, last)
  int stripe;           // qkv and out hold only their rows, of the map already rolled back by sh
  int roll_first;       // shift, then pad (timm); else pad, then shift
  // A window's tokens lie H / wh and W / ww apart (MaxViT's grid); then no shift or padding.
  int spread;
  int cosine;                     // q and k are scaled to length 1
  const void* qkv;                // [B, H, W, 3, heads, D], unit stride along D
  int64_t sb, sy, sx, s3, shead;  // its strides in elements
  void* out;                      // [B, H, W, heads, D], contiguous; not for the backward
  const float* scale;             // [heads], of the scores
  const float* table;  // [heads, 2 wh - 1, 2 ww - 1], added by relative position; or null
  const float* pad;    // [3, heads, D]: q, k and v of padding, which is attended to; null: zeros
  float* stats;        // [2, B, windows, heads, wh * ww] or null: as AttnArgs::stats
  int threads;
};

struct WindowGrads {
  const void* dout;  // [B, H, W, heads, D], contiguous, dtype of WindowArgs
  void* dqkv;        // [B, H, W, 3, heads, D], contiguous, overwritten
  float* dtable;     // [heads, (2 wh - 1)(2 ww - 1)], overwritten, or null
  float* dpad;       // [3, heads, D], overwritten, or null
  float* dscale;     // [heads], overwritten, or null
};

VITFAST_DECLARE(void window_forward(const WindowArgs&))
VITFAST_DECLARE(void window_backward(const WindowArgs&, const WindowGrads&))

inline void window_forward(const WindowArgs& a) { VITFAST_DISPATCH(window_forward(a)) }
inline void window_backward(const WindowArgs& a, const WindowGrads& g) {
  VITFAST_DISPATCH(window_backward(a, g))
}

}  // namespace vitfast
