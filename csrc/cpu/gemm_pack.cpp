// All of B at once, for products of many rows: panels in order, in each the steps.
#include "gemm_pack.h"

#include "../common/parallel.h"

namespace vitfast {
namespace VITFAST_ISA {

void gemm_pack(const GemmB& b, DType compute, void* packed, int threads) {
  const int64_t halves = b.gate != nullptr ? 2 : 1, steps = steps_of(b.k, compute);
  parallel_for(panels_of(b.n) * halves, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i)
      pack_steps(b, compute, i % halves != 0 ? b.gate : b.ptr, i / halves, 0, steps,
                 static_cast<uint32_t*>(packed) + i * steps * kPanel);
  });
}

int64_t gemm_packed_bytes(const GemmB& b, DType compute) {
  return (b.gate != nullptr ? 2 : 1) * panels_of(b.n) * steps_of(b.k, compute) * kPanel *
         kStepBytes;
}

}  // namespace VITFAST_ISA
}  // namespace vitfast
