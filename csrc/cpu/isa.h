// Run-time choice of instruction set. Every kernel body is compiled once per level, in a namespace
// of that name; `VITFAST_DISPATCH` calls the one selected for this process.
#pragma once

namespace vitfast {

enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

Isa best_isa();            // what this CPU and operating system offer, and this build contains
Isa selected_isa();        // what kernels run with
void select_isa(Isa isa);  // may only lower: throws std::invalid_argument above best_isa()

}  // namespace vitfast

// clang-format off
#if defined(__x86_64__) || defined(_M_X64)
#define VITFAST_X86 1
#define VITFAST_DECLARE(signature)            \
  namespace baseline { signature; }           \
  namespace avx2 { signature; }               \
  namespace avx512 { signature; }             \
  namespace avx512_bf16 { signature; }
#define VITFAST_DISPATCH(call)                                      \
  switch (::vitfast::selected_isa()) {                              \
    case ::vitfast::Isa::avx512_bf16: return avx512_bf16::call;     \
    case ::vitfast::Isa::avx512: return avx512::call;               \
    case ::vitfast::Isa::avx2: return avx2::call;                   \
    default: return baseline::call;                                 \
  }
#else
#define VITFAST_DECLARE(signature) \
  namespace baseline { signature; }
#define VITFAST_DISPATCH(call) return baseline::call;
#endif
// clang-format on
