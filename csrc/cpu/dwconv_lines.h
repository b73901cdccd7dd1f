// Lines of a map as floats, in the order that the convolution reads them in, and the taps.
//
// A window holds some lines of a block of columns, with the padding on both sides: for each vector
// of channels, line by line, its pixels one after another. So the pixels that one vector of results
// needs lie close together, whatever the number of channels and the layout of the map.
#pragma once
#include "dwconv.h"
#include "norm_rows.h"
#include "transpose.h"

namespace vitfast {
namespace VITFAST_ISA {
namespace {

inline int64_t vectors_of(int64_t C) { return ceil_div(C, kLanes); }
inline vf as_bf16(vf v) { return from_bf16(to_bf16(v)); }

struct Window {
  float* data;                    // [vectors][lines][width][kLanes]
  int64_t vectors, lines, width;  // width: pixels with padding

  int64_t floats() const { return vectors * lines * width * kLanes; }
  // Line h of the map, which shares its place with lines h +- lines.
  float* line(int64_t v, int64_t h) const {
    return data + (v * lines + h % lines) * width * kLanes;
  }
};

// `count` pixels of C channels, these side by side, or else in planes, square by square; to vectors
// of channels, `step` floats apart, of [count][kLanes].
template <class T>
void copy_pixels(const T* from, int64_t w_stride, int64_t count, int64_t C, bool rounded, float* to,
                 int64_t step) {
  const int64_t whole = C / kLanes;
  const int rest = static_cast<int>(C % kLanes);
  for (int64_t p = 0; p < count; ++p, from += w_stride, to += kLanes) {
    float* place = to;
    for (int64_t v = 0; v < whole; ++v, place += step) {
      const vf x = load(from + v * kLanes);
      store(place, rounded ? as_bf16(x) : x);
    }
    if (rest > 0) {
      const vf x = load_n(from + whole * kLanes, rest);
      store(place, rounded ? as_bf16(x) : x);
    }
  }
}

template <class T>
void copy_planes(const T* from, int64_t w_stride, int64_t c_stride, int64_t count, int64_t C,
                 bool rounded, float* to, int64_t step) {
  for (int64_t c0 = 0; c0 < C; c0 += kLanes, to += step, from += kLanes * c_stride) {
    const int64_t channels = min(kLanes, C - c0);
    for (int64_t p = 0; p < count; p += kLanes) {
      const int pixels = static_cast<int>(min(kLanes, count - p));
      vf r[kLanes] = {};
      for (int64_t c = 0; c < channels; ++c) {
        const T* const row = from + c * c_stride + p * w_stride;
        if (w_stride != 1)
          for (int i = 0; i < pixels; ++i) r[c][i] = to_float(row[i * w_stride]);
        else
          r[c] = pixels == kLanes ? load(row) : load_n(row, pixels);
        if (rounded) r[c] = as_bf16(r[c]);
      }
      transpose(r);
      for (int i = 0; i < pixels; ++i) store(to + (p + i) * kLanes, r[i]);
    }
  }
}

// Columns [first, first + window.width) of line h of image b; zeros outside the map.
inline void fill_line(const DwconvMap& x, const DwconvSizes& size, int64_t b, int64_t h,
                      int64_t first, const Window& window) {
  const int64_t step = window.lines * window.width * kLanes;
  const int64_t left = min(max(-first, 0), window.width);
  const int64_t right = max(min(size.W - first, window.width), left);
  float* const to = window.line(0, h);
  for (int64_t v = 0; v < window.vectors; ++v) {
    float* const line = to + v * step;
    for (int64_t p = 0; p < left; ++p) store(line + p * kLanes, zero());
    for (int64_t p = right; p < window.width; ++p) store(line + p * kLanes, zero());
  }
  const int64_t offset = b * x.b + h * x.h + (first + left) * x.w, count = right - left;
  float* const inside = to + left * kLanes;
  const auto copy = [&](const auto* from, bool rounded) {
    if (x.c == 1)
      copy_pixels(from + offset, x.w, count, size.C, rounded, inside, step);
    else
      copy_planes(from + offset, x.w, x.c, count, size.C, rounded, inside, step);
  };
  if (x.dtype == DType::f32)
    copy(static_cast<const float*>(x.ptr), x.rounded);
  else
    copy(static_cast<const bf16_t*>(x.ptr), false);
}

// Taps of kLanes channels from v * kLanes on, of weight [C, taps], to [taps][kLanes]; zeros for
// channels past the end.
template <class T>
void pack_taps(const T* weight, int64_t v, int64_t C, int64_t taps, bool flipped, bool rounded,
               float* to) {
  const int64_t channels = min(kLanes, C - v * kLanes);
  for (int64_t t0 = 0; t0 < taps; t0 += kLanes) {
    const int count = static_cast<int>(min(kLanes, taps - t0));
    if (count == 1) {  // of 9, 25, 49 or 81
      vf r = {};
      for (int64_t c = 0; c < channels; ++c) r[c] = to_float(weight[(v * kLanes + c) * taps + t0]);
      store(to + (flipped ? 0 : t0) * kLanes, rounded ? as_bf16(r) : r);
      break;
    }
    vf r[kLanes] = {};
    for (int64_t c = 0; c < channels; ++c) {
      const T* const row = weight + (v * kLanes + c) * taps + t0;
      r[c] = count == kLanes ? load(row) : load_n(row, count);
      if (rounded) r[c] = as_bf16(r[c]);
    }
    transpose(r);
    for (int i = 0; i < count; ++i)
      store(to + (flipped ? taps - 1 - t0 - i : t0 + i) * kLanes, r[i]);
  }
}

// Columns are taken in blocks that keep a window of this many lines, and as many floats a pixel
// besides, in the second-level cache.
inline int64_t block_columns(const DwconvSizes& size, int64_t lines) {
  const int64_t pixel = vectors_of(size.C) * kLanes * 4 * lines;
  const int64_t fits = max((int64_t{720} << 10) / pixel - size.kw, 16);
  const int64_t most = max(min(fits, 72), 2 * size.kw);
  const int64_t blocks = ceil_div(size.W, most);
  return blocks > 0 ? ceil_div(size.W, blocks) : 0;
}

}  // namespace
}  // namespace VITFAST_ISA
}  // namespace vitfast
