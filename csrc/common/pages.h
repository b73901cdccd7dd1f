// Memory for large results, kept for the next one. The C library gives blocks above 32 MiB back to
// the system, and smaller ones too once enough of them are free, so that each is mapped anew, 4 KiB
// at a time: more than many a kernel takes to fill it.
#pragma once
#include <cstdint>

namespace vitfast {

// A block of at least so many bytes, aligned to a large page and of unknown content; nullptr
// where the system has none, or no such pages.
void* take_pages(int64_t bytes);

// Gives a block back. It may be taken again; the system may have its memory until then.
void give_pages(void* block);

// At most so many bytes of free blocks are kept; the others are unmapped, the oldest first.
void limit_pages(int64_t bytes);

struct PagesUse {
  int64_t taken, free;  // bytes
};
PagesUse pages_use();

}  // namespace vitfast
