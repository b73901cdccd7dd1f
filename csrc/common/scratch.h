// Cache-line aligned scratch for kernels, freed on scope exit. Allocated before a parallel region,
// because an exception may not leave one.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>

#ifndef VITFAST_ISA
#define VITFAST_ISA common
#endif

namespace vitfast {
namespace VITFAST_ISA {
namespace {

struct Scratch {
  void* ptr = nullptr;
  explicit Scratch(int64_t bytes) {
    if (bytes > 0 && posix_memalign(&ptr, 64, static_cast<size_t>(bytes)) != 0)
      throw std::bad_alloc();
  }
  ~Scratch() { std::free(ptr); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  template <class T>
  T* as(int64_t byte_offset = 0) const {
    return reinterpret_cast<T*>(static_cast<char*>(ptr) + byte_offset);
  }
};

inline int64_t align64(int64_t bytes) { return (bytes + 63) & ~static_cast<int64_t>(63); }

// Hands out `count` elements at `used` bytes past base; returns the bytes used after it. With a
// null base it only measures.
template <class T>
inline int64_t take(char* base, int64_t used, T*& pointer, int64_t count) {
  pointer = base ? reinterpret_cast<T*>(base + used) : nullptr;
  return used + align64(count * static_cast<int64_t>(sizeof(T)));
}

}  // namespace
}  // namespace VITFAST_ISA
}  // namespace vitfast
