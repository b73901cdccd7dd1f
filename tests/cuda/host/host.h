// Runs kernels of csrc/cuda on a CPU: what intrinsics.h is on a GPU.
//
// One fiber is a CUDA thread; the fibers of a block take turns on one thread of the machine, so
// that a run is the same each time. A fiber runs until it waits: at a barrier, or for the other
// lanes of its warp. ThreadSanitizer is told of the fibers and of what waiting orders, and of
// nothing else: two accesses of the same place without a barrier between them are a race to it,
// whatever their turns were. AddressSanitizer is told of their stacks.
//
// Shared memory is filled with NaNs before each block, and ends where the launch says.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <string>

#define VITFAST_DEVICE inline
#define VITFAST_CONSTANT constexpr
#define VITFAST_KERNEL(name, threads, Arguments)                                                \
  static void name(const Arguments& a);                                                         \
  static const vitfast::host::Registered registered_##name(                                     \
      #name, {threads, sizeof(Arguments),                                                       \
              [](const void* arguments) { name(*static_cast<const Arguments*>(arguments)); }}); \
  static void name(const Arguments& a)

namespace vitfast {
namespace host {

struct Kernel {
  int most_threads;
  std::size_t size;  // of its arguments
  std::function<void(const void*)> run;
};
std::map<std::string, Kernel>& kernels();
struct Registered {
  Registered(const char* name, Kernel kernel) { kernels()[name] = std::move(kernel); }
};

// Runs all blocks, one after the other. Throws std::runtime_error where a launch or a thread does
// what a GPU would not: too many threads, a barrier that some never reach.
void launch(const std::string& name, std::int64_t blocks, int threads, std::size_t shared_bytes,
            const void* arguments, std::size_t size);

int thread();
int threads();
std::int64_t block();
std::int64_t blocks();
void* shared();
void wait_for_block();
float exchange(float value, int lane);  // of the warp

}  // namespace host

inline int thread_index() { return host::thread(); }
inline int threads_of_block() { return host::threads(); }
inline i64 block_index() { return host::block(); }
inline i64 blocks() { return host::blocks(); }
inline void* shared() { return host::shared(); }
inline void barrier() { host::wait_for_block(); }
inline float shuffle_xor(float value, int mask) {
  return host::exchange(value, thread_index() % 32 ^ mask);
}

inline float inverse_root(float x) { return 1.f / std::sqrt(x); }
inline float fma(float a, float b, float c) { return std::fmaf(a, b, c); }

inline float bits_to_float(u32 bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline u32 float_to_bits(float x) {
  u32 bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// binary16, by the bits: no compiler has to know the type.
inline float half_to_float(u16 bits) {
  const u32 sign = static_cast<u32>(bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude >= 0x400u) return bits_to_float(sign | ((magnitude << 13) + 0x38000000u));
  const float small = std::ldexp(static_cast<float>(magnitude), -24);
  return sign ? -small : small;
}
inline u16 float_to_half(float x) {
  const u32 bits = float_to_bits(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  u32 half;
  if (magnitude > 0x7f800000u) {
    half = 0x7fffu;  // what cvt.rn.f16.f32 makes of a NaN
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;  // 65520 and above
  } else if (magnitude >= 0x38800000u) {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  } else {
    // Subnormal: an integer of 2^-24, to nearest even as the mode of the CPU has it.
    half = static_cast<u32>(std::nearbyint(std::ldexp(bits_to_float(magnitude), 24)));
  }
  return static_cast<u16>(sign | half);
}

}  // namespace vitfast
