// Large pages for large new buffers. The allocator gives blocks above 32 MiB back to the system, so
// that each is mapped anew, 4 KiB at a time: for a matrix product that is a fifth of its time.
#pragma once
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace vitfast {

// A hint, to be given before the first write; wrong or unsupported ones change nothing.
inline void advise_large_pages(void* begin, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t{2} << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + page - 1) & ~(page - 1);
  const uintptr_t last =
      (reinterpret_cast<uintptr_t>(begin) + static_cast<uintptr_t>(bytes)) & ~(page - 1);
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)begin;
  (void)bytes;
#endif
}

}  // namespace vitfast
