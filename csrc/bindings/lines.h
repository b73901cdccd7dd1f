// Cache lines that are about to be looked at.
#pragma once
#include <cstdint>
#include <vector>

namespace vitfast {

// What to fetch before looking at it. Only hints: what is no longer there does no harm.
class Lines {
 public:
  void add(const void* address, int64_t bytes) {
    const auto first = reinterpret_cast<uintptr_t>(address) & ~uintptr_t{63};
    const auto last = reinterpret_cast<uintptr_t>(address) + bytes;
    for (uintptr_t line = first; line < last; line += 64) lines_.push_back(line);
  }
  void fetch() const {
#if defined(__GNUC__)
    for (const uintptr_t line : lines_) __builtin_prefetch(reinterpret_cast<const void*>(line));
#endif
  }

 private:
  std::vector<uintptr_t> lines_;
};

}  // namespace vitfast
