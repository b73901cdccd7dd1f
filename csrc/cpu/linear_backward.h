// From the gradient of linear_act's output to that of its sums before the activation, and of its
// biases: columns of it, summed in float32 over fixed blocks of rows.
#pragma once
#include "gemm.h"

namespace vitfast {

// dz = grad * act'(z), and gated, with y = act(z) * gate_z:
// dz = grad * gate_z * act'(z), dgate_z = grad * act(z). All rows have one dtype.
struct LinearBackward {
  int64_t m, n;
  Act act;
  GemmRows grad;              // [m, n]
  GemmRows z, gate_z;         // [m, n]; gate_z null: not gated; z may be null with Act::none
  GemmRows dz, dgate_z;       // [m, n]; null: not stored
  float *dbias, *dgate_bias;  // [n], overwritten; null: not wanted
  int threads;
};

VITFAST_DECLARE(void linear_backward(const LinearBackward&))
inline void linear_backward(const LinearBackward& a) { VITFAST_DISPATCH(linear_backward(a)) }

}  // namespace vitfast
