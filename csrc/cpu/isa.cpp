#include "isa.h"

#include <atomic>
#include <stdexcept>

namespace vitfast {

Isa best_isa() {
#if defined(VITFAST_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return Isa::avx512_bf16;
  if (avx512) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::baseline;
}

static std::atomic<int>& selected() {
  static std::atomic<int> value{static_cast<int>(best_isa())};
  return value;
}

Isa selected_isa() { return static_cast<Isa>(selected().load(std::memory_order_relaxed)); }

void select_isa(Isa isa) {
  if (static_cast<int>(isa) > static_cast<int>(best_isa()))
    throw std::invalid_argument("this CPU does not support the requested instruction set");
  selected().store(static_cast<int>(isa), std::memory_order_relaxed);
}

}  // namespace vitfast
