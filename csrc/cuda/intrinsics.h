// All that kernels know of the hardware. A body includes this and nothing else, so that the same
// text is compiled by nvcc, by NVRTC (which has no headers of its own), and by a C++ compiler whose
// host.h runs it on a CPU (tests/cuda/host).
#pragma once

namespace vitfast {

typedef long long i64;
typedef unsigned int u32;
typedef unsigned short u16;

}  // namespace vitfast

#if defined(__CUDACC__)

#define VITFAST_DEVICE __device__ __forceinline__
#define VITFAST_CONSTANT __host__ __device__ constexpr
// A kernel of at most `threads` threads a block, called by its own name.
#define VITFAST_KERNEL(name, threads, Arguments) \
  extern "C" __global__ void __launch_bounds__(threads) name(const __grid_constant__ Arguments a)

namespace vitfast {

extern __shared__ float4 shared_memory[];

VITFAST_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
VITFAST_DEVICE int threads_of_block() { return static_cast<int>(blockDim.x); }
VITFAST_DEVICE i64 block_index() { return blockIdx.x; }
VITFAST_DEVICE i64 blocks() { return gridDim.x; }
// Dynamic shared memory, 16-byte aligned; its size is a launch's.
VITFAST_DEVICE void* shared() { return shared_memory; }

// All threads of a block wait for each other, and see what the others wrote.
VITFAST_DEVICE void barrier() { __syncthreads(); }
// The value of the lane whose number differs from this one's by the bits of `mask`.
VITFAST_DEVICE float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// 1 / sqrt(x), correctly rounded twice: the reciprocal of the root.
VITFAST_DEVICE float inverse_root(float x) { return __frcp_rn(__fsqrt_rn(x)); }
VITFAST_DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }

VITFAST_DEVICE float bits_to_float(u32 bits) { return __uint_as_float(bits); }
VITFAST_DEVICE u32 float_to_bits(float x) { return __float_as_uint(x); }

VITFAST_DEVICE float half_to_float(u16 bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
VITFAST_DEVICE u16 float_to_half(float x) {
  u16 bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

}  // namespace vitfast

#else
#include "host.h"
#endif

namespace vitfast {

// ---- elements in memory ----

struct half {
  u16 bits;
};
struct bfloat16 {
  u16 bits;
};

// To nearest, ties to even; NaN stays NaN. All architectures have it in integers, sm_75 nothing
// else.
VITFAST_DEVICE u16 float_to_bfloat16(float x) {
  const u32 bits = float_to_bits(x);
  const u32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<u16>(x == x ? rounded : (bits >> 16) | 0x40u);
}

VITFAST_DEVICE float to_float(float x) { return x; }
VITFAST_DEVICE float to_float(half x) { return half_to_float(x.bits); }
VITFAST_DEVICE float to_float(bfloat16 x) { return bits_to_float(static_cast<u32>(x.bits) << 16); }

// The dtypes of arguments that a kernel is not compiled for one by one.
enum Type : int { kFloat = 0, kBfloat16 = 1, kHalf = 2 };

VITFAST_DEVICE float rounded_to(int type, float x) {
  if (type == kFloat) return x;
  return type == kHalf ? half_to_float(float_to_half(x))
                       : bits_to_float(static_cast<u32>(float_to_bfloat16(x)) << 16);
}
VITFAST_DEVICE float load(const void* p, int type, i64 index) {
  if (type == kFloat) return static_cast<const float*>(p)[index];
  return type == kHalf ? to_float(static_cast<const half*>(p)[index])
                       : to_float(static_cast<const bfloat16*>(p)[index]);
}
VITFAST_DEVICE void store(void* p, int type, i64 index, float x) {
  if (type == kFloat)
    static_cast<float*>(p)[index] = x;
  else
    static_cast<u16*>(p)[index] = type == kHalf ? float_to_half(x) : float_to_bfloat16(x);
}
// Elements index and index + 1 in one access, which their address has to be a multiple of: index is
// even, and p begins at a multiple of two elements.
VITFAST_DEVICE void store_two(void* p, int type, i64 index, float x, float y) {
  if (type == kFloat) {
    struct alignas(8) Two {
      float x, y;
    };
    *reinterpret_cast<Two*>(static_cast<float*>(p) + index) = Two{x, y};
  } else {
    const u32 low = type == kHalf ? float_to_half(x) : float_to_bfloat16(x);
    const u32 high = type == kHalf ? float_to_half(y) : float_to_bfloat16(y);
    *reinterpret_cast<u32*>(static_cast<u16*>(p) + index) = low | high << 16;
  }
}

}  // namespace vitfast
