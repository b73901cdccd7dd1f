// Huge pages for large results.
#pragma once
#include <cstdint>

namespace vitfast {

// Asks for memory in huge pages from here on, where the system has them: freshly mapped memory is
// otherwise filled 4 KiB at a time, which takes longer than many a kernel does.
void ask_for_huge_pages(void* begin, int64_t bytes);

}  // namespace vitfast
