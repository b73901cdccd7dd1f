// One vector of floats per instruction set, for kernel bodies only.
//
// Included by files that CMake compiles once per level with -DVITFAST_ISA=<level>. Everything here
// has internal linkage, and kernel bodies use no std:: templates: an inline function shared between
// levels would let the linker pick the AVX-512 copy for a CPU without it.
#pragma once
#include <cstdint>
#include <cstring>

#include "../common/dtype.h"

#define VITFAST_INLINE __attribute__((always_inline))

#ifndef VITFAST_ISA
#error "kernel bodies are compiled through CMake, once per instruction set"
#endif

#if defined(__AVX512F__) || defined(__AVX2__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 calls its own _mm512_undefined_* uninitialised (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
#endif

namespace vitfast {
namespace VITFAST_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vu __attribute__((vector_size(kLanes * 4)));
typedef uint16_t vh __attribute__((vector_size(kLanes * 2)));
typedef uint8_t vb __attribute__((vector_size(kLanes)));

// Bytes of a float or bfloat16.
inline int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

inline vf splat(float x) { return x - vf{}; }  // not "+": compilers drop only "- 0"
inline vf zero() { return vf{}; }

inline vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

// 16-bit lanes to 32 bits and back (values below 2^16). GCC 12 lowers __builtin_convertvector to
// twice the work.
inline vu widen(vh h) {
#if defined(__AVX512F__)
  return reinterpret_cast<vu>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(h)));
#elif defined(__AVX2__)
  return reinterpret_cast<vu>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(h)));
#else
  return __builtin_convertvector(h, vu);
#endif
}
inline vh narrow(vu v) {
#if defined(__AVX512F__)
  return reinterpret_cast<vh>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(v)));
#elif defined(__AVX2__)
  const __m256i packed =
      _mm256_packus_epi32(reinterpret_cast<__m256i>(v), reinterpret_cast<__m256i>(v));
  return reinterpret_cast<vh>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0xd8)));
#else
  return __builtin_convertvector(v, vh);
#endif
}

inline vf from_bf16(vh h) { return reinterpret_cast<vf>(widen(h) << 16); }
inline vf load(const bf16_t* p) {
  vh h;
  std::memcpy(&h, p, sizeof h);
  return from_bf16(h);
}

// Round to nearest even; NaN stays NaN (quiet), infinities stay.
inline vh to_bf16(vf v) {
#if defined(__AVX512BF16__) && defined(__AVX512F__)
  return reinterpret_cast<vh>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(v)));
#else
  const vu u = reinterpret_cast<vu>(v);
  const vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const vu nan = (u >> 16) | 0x40u;
  const vi is_nan = v != v;
  const vu mask = reinterpret_cast<vu>(is_nan);
  return narrow((rounded & ~mask) | (nan & mask));
#endif
}
inline void store(bf16_t* p, vh h) { std::memcpy(p, &h, sizeof h); }
inline void store(bf16_t* p, vf v) { store(p, to_bf16(v)); }

inline float to_float(float x) { return x; }
inline float to_float(bf16_t x) {
  const uint32_t u = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline float to_float(uint8_t x) { return static_cast<float>(x); }

inline void from_float(float x, float* p) { *p = x; }
inline void from_float(float x, bf16_t* p) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  p->bits = x != x ? static_cast<uint16_t>((u >> 16) | 0x40u)
                   : static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

// The first n lanes (0 < n < kLanes); the others are zero / untouched. Never reads past the end.
template <class T>
inline vf load_n(const T* p, int n) {
  T tmp[kLanes] = {};
  std::memcpy(tmp, p, static_cast<size_t>(n) * sizeof(T));
  return load(tmp);
}
template <class T>
inline void store_n(T* p, vf v, int n) {
  T tmp[kLanes];
  store(tmp, v);
  std::memcpy(p, tmp, static_cast<size_t>(n) * sizeof(T));
}
#if defined(__AVX512F__)
inline vf load_n(const float* p, int n) {
  return reinterpret_cast<vf>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1u), p));
}
inline void store_n(float* p, vf v, int n) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1u), reinterpret_cast<__m512>(v));
}
inline vf load_n(const bf16_t* p, int n) {
  const __m256i h = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1u), p);
  return from_bf16(reinterpret_cast<vh>(h));
}
inline void store_n(bf16_t* p, vf v, int n) {
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1u),
                           reinterpret_cast<__m256i>(to_bf16(v)));
}
#endif

// Past the caches, for output that is larger than they are: spares reading the line before writing
// it. The address must be a multiple of the store's size; stream_fence() before others may look.
#if defined(__AVX512F__)
inline void stream(float* p, vf v) { _mm512_stream_ps(p, reinterpret_cast<__m512>(v)); }
inline void stream(bf16_t* p, vh h) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(h));
}
inline void stream_fence() { _mm_sfence(); }
#elif defined(__AVX2__)
inline void stream(float* p, vf v) { _mm256_stream_ps(p, reinterpret_cast<__m256>(v)); }
inline void stream(bf16_t* p, vh h) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), reinterpret_cast<__m128i>(h));
}
inline void stream_fence() { _mm_sfence(); }
#else
inline void stream(float* p, vf v) { store(p, v); }
inline void stream(bf16_t* p, vh h) { store(p, h); }
inline void stream_fence() {}
#endif
inline void stream(bf16_t* p, vf v) { stream(p, to_bf16(v)); }

inline vf load(const uint8_t* p) {
  vb b;
  std::memcpy(&b, p, sizeof b);
  return __builtin_convertvector(__builtin_convertvector(b, vi), vf);
}

// a * b + c; fused where the instruction set has it (the compiler contracts the expression).
inline vf fma(vf a, vf b, vf c) { return a * b + c; }

inline vf select(vi mask, vf a, vf b) {
  const vi x = reinterpret_cast<vi>(a), y = reinterpret_cast<vi>(b);
  return reinterpret_cast<vf>((mask & x) | (~mask & y));
}
// NaN in the second operand wins, as _mm_max_ps does: keep the accumulator first.
inline vf vmax(vf a, vf b) {
#if defined(__AVX512F__)
  return reinterpret_cast<vf>(
      _mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<vf>(
      _mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
  return select(a > b, a, b);
#endif
}
inline vf vmin(vf a, vf b) {  // NaN as in vmax
#if defined(__AVX512F__)
  return reinterpret_cast<vf>(
      _mm512_min_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<vf>(
      _mm256_min_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
  return select(a < b, a, b);
#endif
}

inline float reduce_add(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(reinterpret_cast<__m512>(v));
#else
  float s = 0.f;
  for (int i = 0; i < kLanes; ++i) s += v[i];
  return s;
#endif
}

inline double sum_lanes(vf v) {
#if defined(__AVX512F__)
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(reinterpret_cast<__m512>(v)));
  const __m512 swapped =
      _mm512_shuffle_f32x4(reinterpret_cast<__m512>(v), reinterpret_cast<__m512>(v), 0x4e);
  const __m512d high = _mm512_cvtps_pd(_mm512_castps512_ps256(swapped));
  return _mm512_reduce_add_pd(_mm512_add_pd(low, high));
#else
  double s = 0.;
  for (int i = 0; i < kLanes; ++i) s += static_cast<double>(v[i]);
  return s;
#endif
}

#if defined(__AVX512F__)
// p * 2^n, and 0 where x <= -126: there scalef is not asked, since it takes Intel's CPUs more than
// a hundred cycles to make a denormal number, or a zero for want of one. NaN counts as above.
inline vf scaled_above(vf x, vf p, __m512 n) {
  const __mmask16 normal =
      _mm512_cmp_ps_mask(reinterpret_cast<__m512>(x), _mm512_set1_ps(-126.f), _CMP_NLE_UQ);
  return reinterpret_cast<vf>(_mm512_maskz_scalef_ps(normal, reinterpret_cast<__m512>(p), n));
}
#endif

// The value as a number of its own: the compiler fuses no product with what follows.
inline vf unfused(vf x) {
#if defined(__GNUC__) && defined(__x86_64__)
  asm("" : "+x"(x));
#elif defined(__GNUC__) && defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

// 2^x for x <= 0, flushed to zero from -126 down; relative error below 3e-7 (the degree-6
// polynomial that Cephes uses on [-1/2, 1/2]). NaN stays NaN, -inf gives 0.
inline VITFAST_INLINE vf exp2_nonpositive(vf x) {
  const vf v = vmax(splat(-127.f), x);
#if defined(__AVX512F__)
  const __m512 n = _mm512_roundscale_ps(reinterpret_cast<__m512>(v),
                                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const vf f = v - reinterpret_cast<vf>(n);
#else
  // 1.5 * 2^23 + 127: a sum with it is rounded to an integer n, and has n + 127 in its last bits.
  const vf magic = splat(12583039.f);
  const vf sum = v + magic;
  const vf f = v - (sum - magic);
#endif
  vf p = splat(1.535336188e-4f);
  p = fma(p, f, splat(1.339887440e-3f));
  p = fma(p, f, splat(9.618437357e-3f));
  p = fma(p, f, splat(5.550332471e-2f));
  p = fma(p, f, splat(2.402264791e-1f));
  p = fma(p, f, splat(6.931472028e-1f));
  p = fma(p, f, splat(1.f));
#if defined(__AVX512F__)
  return scaled_above(x, p, n);
#else
  const vf power = reinterpret_cast<vf>(reinterpret_cast<vu>(sum) << 23);  // 2^n; 0 for n = -127
  return select(v <= -126.f, zero(), p * power);
#endif
}

#if defined(__AVX512BF16__) && defined(__AVX512F__)
// 2^x for x <= 0 whose result is rounded to bfloat16 next: relative error below 3e-6, a thousandth
// of that rounding (degree-4 least-maximum polynomial on [-1/2, 1/2]).
inline vf exp2_bf16(vf x) {
  const __m512 v = reinterpret_cast<__m512>(vmax(splat(-127.f), x));
  const __m512 n = _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const vf f = reinterpret_cast<vf>(_mm512_sub_ps(v, n));
  vf p = splat(9.58286e-3f);
  p = fma(p, f, splat(5.590643e-2f));
  p = fma(p, f, splat(2.4024099e-1f));
  p = fma(p, f, splat(6.9312419e-1f));
  p = fma(p, f, splat(1.f));
  return scaled_above(x, p, n);
}
#endif

}  // namespace
}  // namespace VITFAST_ISA
}  // namespace vitfast
