// The system's pages under large results.
#pragma once
#include <cstdint>

namespace vitfast {

// Asks for memory in huge pages from here on, where the system has them: freshly mapped memory is
// otherwise filled 4 KiB at a time, which takes longer than many a kernel does.
void ask_for_huge_pages(void* begin, int64_t bytes);

// Gives the pages that lie within this memory back to the system until they are written to again.
// The memory must be the process's own (anonymous, private); nobody may need what it holds.
void release_pages(void* begin, int64_t bytes);

}  // namespace vitfast
