#include "common/huge_pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace vitfast {

#if defined(__linux__) && defined(MADV_HUGEPAGE)

namespace {

// Where the system's pages are larger than these, it refuses, which is all.
void advise(void* begin, int64_t bytes, int advice) {
  constexpr uintptr_t kPage = 4096;
  const auto address = reinterpret_cast<uintptr_t>(begin);
  const uintptr_t first = (address + kPage - 1) / kPage * kPage;
  const uintptr_t last = (address + bytes) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, advice);
}

}  // namespace

void ask_for_huge_pages(void* begin, int64_t bytes) { advise(begin, bytes, MADV_HUGEPAGE); }

void release_pages(void* begin, int64_t bytes) { advise(begin, bytes, MADV_DONTNEED); }

#else

void ask_for_huge_pages(void*, int64_t) {}

void release_pages(void*, int64_t) {}

#endif

}  // namespace vitfast
