// Row kernels of layer_norm, rms_norm, add_norm, norm_add, residual_add and patch_merge, forward
// and backward.
//
// Every big tensor is a stack of rows [B, N, C] with contiguous C. Work is shared out by rows; the
// backward sums its gradients of [C] vectors over fixed blocks of rows, and then over the blocks in
// order, so that results do not depend on the number of threads.
#pragma once
#include <cstdint>

#include "../common/dtype.h"
#include "isa.h"

namespace vitfast {

enum class NormKind : int { layer = 0, rms = 1, none = 2 };

// Row (b, n) begins at element b * outer + n * inner. Null: absent.
//
// With H > 0 it is patch n of 2x2 pixels of a map [B, H, W, C / 4], whose pixels are `inner` apart
// from one line to the next and `column` within a line: top left, bottom left, top right, bottom
// right, and zeros past the edges. N is then ceil(H / 2) * ceil(W / 2).
struct Rows {
  void* ptr = nullptr;  // [B, N, C]
  DType dtype = DType::f32;
  int64_t outer = 0, inner = 0;
  int64_t H = 0, W = 0, column = 0;
};

// A contiguous [C] vector. Null: absent.
struct Channels {
  void* ptr = nullptr;  // [C]
  DType dtype = DType::f32;
};

// residual = x + drop_scale[b] * gamma * branch (x itself without a branch);
// normed = base + normed_scale[b] * ((residual - mean) * rstd * weight + bias), of the residual as
// it was rounded for output. residual may lie exactly over x or branch; normed over either, over
// the residual or over the base. Only x may be a map, and without a branch.
struct NormForward {
  NormKind kind;  // none: residual only
  int64_t B, N, C;
  Rows x, branch, residual, normed;  // residual exists with a branch, or with kind none
  Rows base;                         // null: zero
  Channels gamma, weight, bias;
  const float* drop_scale;    // [B] or null
  const float* normed_scale;  // [B] or null, with a base
  float eps;
  float* stats;  // [B * N, 2]: mean, 1 / sqrt(var + eps); null: not wanted
  int threads;
};

// Gradients of the above. The residual is the stored output of the forward (x without a branch);
// the base's gradient is grad_normed itself. Residual and dx may be maps, without a branch.
struct NormBackward {
  NormKind kind;  // none: grad_residual only
  int64_t B, N, C;
  Rows grad_normed, grad_residual;  // at least one; null: zero
  Rows residual;                    // with a kind
  Rows branch;                      // with dgamma
  Rows dx, dbranch;                 // either may be null
  Channels gamma, weight;
  Channels dgamma, dweight, dbias;  // overwritten; null: not wanted
  const float* drop_scale;          // [B] or null
  const float* normed_scale;        // [B] or null, with a kind
  float eps;
  const float* stats;  // [B * N, 2], of the forward; null: computed again
  int threads;
};

VITFAST_DECLARE(void norm_forward(const NormForward&))
VITFAST_DECLARE(void norm_backward(const NormBackward&))

inline void norm_forward(const NormForward& a) { VITFAST_DISPATCH(norm_forward(a)) }
inline void norm_backward(const NormBackward& a) { VITFAST_DISPATCH(norm_backward(a)) }

}  // namespace vitfast
