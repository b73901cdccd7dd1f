// Static work split over OpenMP threads. The thread count is the caller's
// (torch.get_num_threads()), and one thread never opens a parallel region, so that a forked worker
// is safe.
#pragma once
#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

#ifndef VITFAST_ISA
#define VITFAST_ISA common
#endif

namespace vitfast {
namespace VITFAST_ISA {
namespace {

// f(begin, end, thread) over [0, n) in contiguous ranges. The split depends on n and threads only.
template <class F>
inline void parallel_for(int64_t n, int threads, const F& f) {
  if (threads > n) threads = static_cast<int>(n);
  if (threads <= 1) {
    if (n > 0) f(static_cast<int64_t>(0), n, 0);
    return;
  }
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads)
  {
    // The team may be smaller than asked for (nested region, thread limit).
    const int64_t team = omp_get_num_threads(), t = omp_get_thread_num();
    const int64_t begin = n * t / team, end = n * (t + 1) / team;
    if (begin < end) f(begin, end, static_cast<int>(t));
  }
#else
  f(static_cast<int64_t>(0), n, 0);
#endif
}

}  // namespace
}  // namespace VITFAST_ISA
}  // namespace vitfast
