// Flash attention on CPUs: forward and backward, never an Nq x Nk buffer.
//
// Layout: q, k, v, out are [B, N, H, D] with any element strides. Scores are computed transposed,
// keys by queries, with the queries of a block across vector lanes: K and V enter as broadcast
// scalars in their own layout, the softmax needs no horizontal step, and any head dim D runs
// without padding.
#pragma once
#include <cstdint>

#include "../common/dtype.h"
#include "isa.h"

namespace vitfast {

struct AttnTensor {
  void* ptr;               // [B, N, H, D]
  int64_t sb, sn, sh, sd;  // strides in elements
};

// A term added to the scaled scores, broadcast where a stride is 0.
struct AttnAdd {
  const void* ptr;  // [B, H, Nq, Nk]; null: absent
  int dtype;        // 0 float32, 1 bfloat16, 3 bool (nonzero keeps the key)
  int64_t sb, sh, sq, sk;
};

// What is applied to q and k while they are loaded.
struct AttnPrologue {
  int norm;  // 0 none, 1 LayerNorm, 2 RMSNorm over D
  float eps;
  const float *q_weight, *q_bias, *k_weight, *k_bias;  // [D] or null
  const float* rope;  // cat(sin, cos), [B, H, N - rope_prefix, 2 D]; null: absent
  int64_t rope_sb, rope_sh, rope_sn;
  int64_t rope_prefix;  // leading tokens left alone
  int rope_half;        // rotate halves instead of neighbouring pairs
};

struct AttnArgs {
  DType dtype;
  int64_t B, H, Nq, Nk, D;
  float scale;
  int causal;  // key j is seen by query i where j <= i
  AttnTensor q, k, v, out;
  // [2, B, H, Nq] or null: m and the sum over keys of 2^(x - m), x the scores in powers of two.
  // Apart, because log-sum-exp loses the sum where |m| is large (a row masked by finfo.min).
  float* stats;
  AttnAdd mask, bias;
  AttnPrologue pro;
  int threads;
};

struct AttnGrads {
  AttnTensor dout, dq, dk, dv;  // dtype of AttnArgs, sd == 1 for the outputs
  float* dbias;                 // [H, Nq, Nk], overwritten with the sum over the batch, or null
  int64_t dbias_sh, dbias_sq, dbias_sk;
  float *dq_weight, *dq_bias, *dk_weight, *dk_bias;  // [D], overwritten, or null
};

VITFAST_DECLARE(void attention_forward(const AttnArgs&))
VITFAST_DECLARE(void attention_backward(const AttnArgs&, const AttnGrads&))

inline void attention_forward(const AttnArgs& a) { VITFAST_DISPATCH(attention_forward(a)) }
inline void attention_backward(const AttnArgs& a, const AttnGrads& g) {
  VITFAST_DISPATCH(attention_backward(a, g))
}

}  // namespace vitfast
