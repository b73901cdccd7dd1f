// The activation functions that kernels know. The numbers are part of the Python contract
// (vitfast/ops/common/gemm.py).
#pragma once

namespace vitfast {

enum class Act : int { none = 0, relu, gelu, gelu_tanh, quick_gelu, silu, sigmoid };

}  // namespace vitfast
