#include "common/pages.h"

#include <algorithm>
#include <mutex>
#include <unordered_map>
#include <vector>

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#endif

namespace vitfast {

#if defined(__linux__) && defined(MADV_HUGEPAGE)
namespace {

constexpr int64_t kPage = int64_t{2} << 20;  // a large one

struct Block {
  void* at;
  int64_t bytes;
};

struct Pages {
  std::mutex mutex;
  std::vector<Block> free;  // the oldest first
  std::unordered_map<void*, int64_t> taken;
  int64_t free_bytes = 0, taken_bytes = 0, limit = 0;
};

// Never destroyed: tensors may outlive everything else. No child is forked while it is locked.
Pages& pages() {
  static Pages* const found = [] {
    static Pages* const made = new Pages;
    pthread_atfork([] { made->mutex.lock(); }, [] { made->mutex.unlock(); },
                   [] { made->mutex.unlock(); });
    return made;
  }();
  return *found;
}

void* map(int64_t bytes) {
  void* const begin = mmap(nullptr, bytes + kPage, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (begin == MAP_FAILED) return nullptr;
  char* const first = static_cast<char*>(begin);
  const int64_t before = -reinterpret_cast<uintptr_t>(begin) & (kPage - 1);
  if (before > 0) munmap(first, before);
  if (before < kPage) munmap(first + before + bytes, kPage - before);
  madvise(first + before, bytes, MADV_HUGEPAGE);
  return first + before;
}

void trim(Pages& p, int64_t limit) {
  size_t count = 0;
  for (; p.free_bytes > limit; ++count) {
    munmap(p.free[count].at, p.free[count].bytes);
    p.free_bytes -= p.free[count].bytes;
  }
  p.free.erase(p.free.begin(), p.free.begin() + count);
}

}  // namespace

void* take_pages(int64_t bytes) {
  bytes = (bytes + kPage - 1) / kPage * kPage;
  Pages& p = pages();
  const std::lock_guard<std::mutex> lock(p.mutex);
  auto best = p.free.end();
  for (auto b = p.free.begin(); b != p.free.end(); ++b)
    if (b->bytes >= bytes && b->bytes <= bytes + bytes / 4 &&
        (best == p.free.end() || b->bytes <= best->bytes))
      best = b;
  Block found = {nullptr, bytes};
  if (best != p.free.end()) {
    found = *best;
    p.free.erase(best);
    p.free_bytes -= found.bytes;
  } else {
    found.at = map(bytes);
    if (found.at == nullptr) {  // the caller's next attempt, at least, shall have what is free
      trim(p, 0);
      found.at = map(bytes);
    }
    if (found.at == nullptr) return nullptr;
  }
  p.taken.emplace(found.at, found.bytes);
  p.taken_bytes += found.bytes;
  return found.at;
}

void give_pages(void* block) {
  Pages& p = pages();
  const std::lock_guard<std::mutex> lock(p.mutex);
  const auto found = p.taken.find(block);
  if (found == p.taken.end()) return;
  const int64_t bytes = found->second;
  p.taken.erase(found);
  p.taken_bytes -= bytes;
#if defined(MADV_FREE)
  madvise(block, bytes, MADV_FREE);
#endif
  p.free.push_back({block, bytes});
  p.free_bytes += bytes;
  trim(p, p.limit);
}

void limit_pages(int64_t bytes) {
  Pages& p = pages();
  const std::lock_guard<std::mutex> lock(p.mutex);
  p.limit = std::max<int64_t>(bytes, 0);
  trim(p, p.limit);
}

PagesUse pages_use() {
  Pages& p = pages();
  const std::lock_guard<std::mutex> lock(p.mutex);
  return {p.taken_bytes, p.free_bytes};
}

#else

void* take_pages(int64_t) { return nullptr; }
void give_pages(void*) {}
void limit_pages(int64_t) {}
PagesUse pages_use() { return {0, 0}; }

#endif

}  // namespace vitfast
