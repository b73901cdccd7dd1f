// Where the tokens of a window lie in the map, and their rows.
#pragma once
#include "../common/scratch.h"
#include "attention_tile.h"
#include "window.h"

namespace vitfast {
namespace VITFAST_ISA {
namespace {

// timm's mask: it drowns a score, but does not forbid it.
constexpr float kHidden = -100.f * kLog2e;

struct Grid {
  int64_t high, wide;  // windows
  int64_t tokens;      // of a window
};
inline Grid grid(const WindowArgs& a) {
  return Grid{ceil_div(a.H, a.wh), ceil_div(a.W, a.ww), a.wh * a.ww};
}

// Row or column of the map under a row or column of the shifted and padded one; -1 in the padding.
inline int64_t place(int64_t i, int64_t size, int64_t padded, int64_t shift, bool roll_first) {
  const int64_t ring = roll_first ? size : padded;
  if (i >= ring) return -1;
  const int64_t on = i + shift;
  const int64_t at = on < ring ? on : on % ring;  // a shift may go round several times
  return at < size ? at : -1;
}

// Which of the three bands that a cyclic shift brings together; all one without a shift.
inline int band(int64_t i, int64_t padded, int64_t window, int64_t shift) {
  return shift == 0 ? 0 : i < padded - window ? 0 : i < padded - shift ? 1 : 2;
}

// The tokens [wh * ww] of window number `index`: y * W + x or -1 for padding; and for each its
// band, as floats ready to be compared, [wh * ww]. Returns whether there is more than one band.
inline bool map_window(const WindowArgs& a, int64_t index, int64_t* token, float* bands) {
  const Grid g = grid(a);
  if (a.spread) {
    const int64_t first = index / g.wide * a.W + index % g.wide;
    for (int64_t i = 0; i < a.wh; ++i)
      for (int64_t j = 0; j < a.ww; ++j) {
        token[i * a.ww + j] = first + i * g.high * a.W + j * g.wide;
        bands[i * a.ww + j] = 0.f;
      }
    return false;
  }
  const int64_t y0 = index / g.wide * a.wh, x0 = index % g.wide * a.ww;
  const int64_t high = g.high * a.wh, wide = g.wide * a.ww;
  bool several = false;
  for (int64_t i = 0; i < a.wh; ++i) {
    const int64_t y = a.stripe ? place(y0 + i, a.H, high, 0, true) - a.first * a.wh
                               : place(y0 + i, a.H, high, a.sh, a.roll_first);
    const int row = band(y0 + i, high, a.wh, a.sh);
    for (int64_t j = 0; j < a.ww; ++j) {
      const int64_t x = place(x0 + j, a.W, wide, a.sw, a.roll_first);
      token[i * a.ww + j] = y < 0 || x < 0 ? -1 : y * a.W + x;
      bands[i * a.ww + j] = static_cast<float>(3 * row + band(x0 + j, wide, a.ww, a.sw));
      several = several || bands[i * a.ww + j] != bands[0];
    }
  }
  return several;
}

// The middle of a table's values, [count], if all are of one sign; else 0, as where one is not
// finite.
inline float middle(const float* table, int64_t count) {
  float low = kInf, high = -kInf;
  for (int64_t i = 0; i < count; ++i) {
    const float value = table[i] - table[i] == 0.f ? table[i] : 0.f;
    low = value < low ? value : low;
    high = value > high ? value : high;
  }
  return low > 0.f || high < 0.f ? 0.5f * low + 0.5f * high : 0.f;
}

// bias[key][query] of one head in powers of two, [wh * ww][ld]. What all of a table have in common
// changes no softmax, but would cost every score the last bits: Swin V2's biases lie around 8.
inline void fill_bias(const WindowArgs& a, int64_t head, int64_t ld, float* bias) {
  const int64_t across = 2 * a.ww - 1;
  const float* table = a.table + head * (2 * a.wh - 1) * across;
  const float common = middle(table, (2 * a.wh - 1) * across);
  for (int64_t yk = 0; yk < a.wh; ++yk)
    for (int64_t xk = 0; xk < a.ww; ++xk) {
      float* row = bias + (yk * a.ww + xk) * ld;
      for (int64_t yq = 0; yq < a.wh; ++yq) {
        const float* from = table + (yq - yk + a.wh - 1) * across + (a.ww - 1 - xk);
        for (int64_t xq = 0; xq < a.ww; ++xq) row[yq * a.ww + xq] = log2_term(from[xq] - common);
      }
      for (int64_t q = a.wh * a.ww; q < ld; ++q) row[q] = 0.f;
    }
}

// What a thread knows of the window and of the head that it is at. `ld` is N, the tokens of a
// window, rounded up to whole blocks.
struct WindowMap {
  int64_t* token;  // [ld], see map_window
  float* bands;    // [ld], zeros past N
  float* bias;     // [N][ld], see fill_bias
  int64_t ld, index, head;
  bool several;  // bands

  // pairs: N * ld, or 0 where no bias is kept here.
  static int64_t bytes(int64_t N, int64_t pairs) { return WindowMap().carve(nullptr, N, pairs); }
  int64_t carve(char* base, int64_t N, int64_t pairs) {
    ld = ceil_div(N, kBlock) * kBlock;
    index = head = -1;
    several = false;
    int64_t used = 0;
    used = take(base, used, token, ld);
    used = take(base, used, bands, ld);
    for (int64_t i = N; base && i < ld; ++i) bands[i] = 0.f;
    return take(base, used, bias, pairs);
  }
  void go_to_window(const WindowArgs& a, int64_t to) {
    if (to != index) several = map_window(a, to, token, bands);
    index = to;
  }
  void go_to_head(const WindowArgs& a, int64_t to) {
    if (to != head && a.table) fill_bias(a, to, ld, bias);
    head = to;
  }
};

inline vf rounded(vf x, DType dtype) { return dtype == DType::f32 ? x : from_bf16(to_bf16(x)); }

// 1 / max(|x|, 1e-12), x: [D], as torch.nn.functional.normalize.
inline float inverse_length(const float* x, int64_t D) {
  vf squares = zero();
  int64_t d = 0;
  for (; d + kLanes <= D; d += kLanes) squares = fma(load(x + d), load(x + d), squares);
  double sum = sum_lanes(squares);
  for (; d < D; ++d) sum += static_cast<double>(x[d]) * x[d];
  const double length = __builtin_sqrt(sum);
  return static_cast<float>(1.0 / (length > 1e-12 ? length : 1e-12));
}

// One of q (0), k (1) and v (2) of a token, as floats; row: [D].
inline void read_token(const WindowArgs& a, int64_t batch, int64_t head, int part, int64_t token,
                       float* row) {
  if (token < 0) {
    const float* pad = a.pad ? a.pad + (part * a.heads + head) * a.D : nullptr;
    // Padding passes through the working dtype like everything else.
    for (int64_t d = 0; d < a.D; ++d) row[d] = pad ? rounded(pad[d], a.dtype) : 0.f;
    return;
  }
  const int64_t at =
      batch * a.sb + token / a.W * a.sy + token % a.W * a.sx + part * a.s3 + head * a.shead;
  int64_t d = 0;
  if (a.dtype == DType::f32) {
    std::memcpy(row, static_cast<const float*>(a.qkv) + at, static_cast<size_t>(a.D) * 4);
    return;
  }
  const bf16_t* p = static_cast<const bf16_t*>(a.qkv) + at;
  for (; d + kLanes <= a.D; d += kLanes) store(row + d, load(p + d));
  for (; d < a.D; ++d) row[d] = to_float(p[d]);
}

// The token as the products see it: of length 1 where attention is by cosine.
inline void fetch_token(const WindowArgs& a, int64_t batch, int64_t head, int part, int64_t token,
                        float* row) {
  read_token(a, batch, head, part, token, row);
  if (!a.cosine || part == 2) return;
  const vf inverse = splat(inverse_length(row, a.D));
  int64_t d = 0;
  for (; d + kLanes <= a.D; d += kLanes) store(row + d, rounded(load(row + d) * inverse, a.dtype));
  for (; d < a.D; ++d) row[d] = rounded(row[d] * inverse[0], a.dtype);
}

// Rows of tokens, [count], zero beyond D, into out: [count][width]. row: scratch [D].
template <class Row>
inline void gather(const WindowArgs& a, int64_t batch, int64_t head, int part, const int64_t* token,
                   int64_t count, int64_t width, float* row, Row* out) {
  const bool same = sizeof(Row) == (a.dtype == DType::f32 ? 4 : 2) && (!a.cosine || part == 2);
  for (int64_t i = 0; i < count; ++i, out += width) {
    int64_t d = 0;
    if (same && token[i] >= 0) {
      const int64_t at = batch * a.sb + token[i] / a.W * a.sy + token[i] % a.W * a.sx +
                         part * a.s3 + head * a.shead;
      std::memcpy(out, static_cast<const Row*>(a.qkv) + at, static_cast<size_t>(a.D) * sizeof(Row));
      d = a.D;
    } else {
      fetch_token(a, batch, head, part, token[i], row);
      for (; d + kLanes <= a.D; d += kLanes) store(out + d, load(row + d));
      for (; d < a.D; ++d) from_float(row[d], out + d);
    }
    for (; d < width; ++d) from_float(0.f, out + d);
  }
}

}  // namespace
}  // namespace VITFAST_ISA
}  // namespace vitfast
