// Transposition in registers.
#pragma once
#include "simd.h"

namespace vitfast {
namespace VITFAST_ISA {
namespace {

// A square of words, rows for columns.
inline void transpose(vu (&r)[kLanes]) {
#if defined(__AVX512F__)
  __m512i t[16], u[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    const __m512i a = reinterpret_cast<__m512i>(r[i]), b = reinterpret_cast<__m512i>(r[i + 1]);
    t[i] = _mm512_unpacklo_epi32(a, b);
    t[i + 1] = _mm512_unpackhi_epi32(a, b);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    u[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    u[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    u[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    u[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 16
  for (int c = 0; c < 4; ++c) {
    const __m512i even = _mm512_shuffle_i32x4(u[c], u[4 + c], 0x88);
    const __m512i odd = _mm512_shuffle_i32x4(u[c], u[4 + c], 0xdd);
    const __m512i even2 = _mm512_shuffle_i32x4(u[8 + c], u[12 + c], 0x88);
    const __m512i odd2 = _mm512_shuffle_i32x4(u[8 + c], u[12 + c], 0xdd);
    r[c] = reinterpret_cast<vu>(_mm512_shuffle_i32x4(even, even2, 0x88));
    r[4 + c] = reinterpret_cast<vu>(_mm512_shuffle_i32x4(odd, odd2, 0x88));
    r[8 + c] = reinterpret_cast<vu>(_mm512_shuffle_i32x4(even, even2, 0xdd));
    r[12 + c] = reinterpret_cast<vu>(_mm512_shuffle_i32x4(odd, odd2, 0xdd));
  }
#elif defined(__AVX2__)
  __m256i t[8], u[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 2) {
    const __m256i a = reinterpret_cast<__m256i>(r[i]), b = reinterpret_cast<__m256i>(r[i + 1]);
    t[i] = _mm256_unpacklo_epi32(a, b);
    t[i + 1] = _mm256_unpackhi_epi32(a, b);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    u[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    u[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    u[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 8
  for (int c = 0; c < 4; ++c) {
    r[c] = reinterpret_cast<vu>(_mm256_permute2x128_si256(u[c], u[4 + c], 0x20));
    r[4 + c] = reinterpret_cast<vu>(_mm256_permute2x128_si256(u[c], u[4 + c], 0x31));
  }
#elif defined(__GNUC__) && !defined(__clang__)
#pragma GCC unroll 8
  for (int s = 1; s < kLanes; s *= 2) {
    vi low, high;
#pragma GCC unroll 16
    for (int j = 0; j < kLanes; ++j) {
      low[j] = (j & s) ? kLanes + j - s : j;
      high[j] = (j & s) ? kLanes + j : j + s;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i & s) continue;
      const vu a = r[i], b = r[i + s];
      r[i] = __builtin_shuffle(a, b, low);
      r[i + s] = __builtin_shuffle(a, b, high);
    }
  }
#else
  for (int i = 0; i < kLanes; ++i) {
    for (int j = i + 1; j < kLanes; ++j) {
      const uint32_t swapped = r[i][j];
      r[i][j] = r[j][i];
      r[j][i] = swapped;
    }
  }
#endif
}
inline void transpose(vf (&r)[kLanes]) {
  vu words[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) words[i] = reinterpret_cast<vu>(r[i]);
  transpose(words);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) r[i] = reinterpret_cast<vf>(words[i]);
}

}  // namespace
}  // namespace VITFAST_ISA
}  // namespace vitfast
