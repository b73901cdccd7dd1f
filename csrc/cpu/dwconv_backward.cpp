// Gradients of the taps and the bias: sums over fixed blocks of lines, and then over the blocks.
#include "dwconv_lines.h"

namespace vitfast {
namespace VITFAST_ISA {
namespace {

constexpr int kPixels = kLanes == 16 ? 8 : 4;
constexpr int kLines = kLanes == 16 ? 2 : 1;
constexpr int64_t kMostBlocks = 32, kFewestPixels = 96;

// sums[y][kx] += sum over pixels of grad[p] * lines[y][p + kx], for L lines of the input that
// belong to rows of taps one below the other. The grad is zero past the last pixel, up to whole
// tiles.
template <int K, int L>
void add_products(const float* const* lines, const float* grad, int64_t pixels, int64_t width,
                  float* sums) {
  if constexpr (K > 0) {
    vf sum[L][K] = {};
    for (int64_t p0 = 0; p0 < pixels; p0 += kPixels) {
      vf g[kPixels];
#pragma GCC unroll 16
      for (int p = 0; p < kPixels; ++p) g[p] = load(grad + (p0 + p) * kLanes);
#pragma GCC unroll 32
      for (int j = 0; j < kPixels + K - 1; ++j) {
#pragma GCC unroll 4
        for (int y = 0; y < L; ++y) {
          const vf x = load(lines[y] + (p0 + j) * kLanes);
#pragma GCC unroll 16
          for (int p = 0; p < kPixels; ++p)
            if (j - p >= 0 && j - p < K) sum[y][j - p] = fma(x, g[p], sum[y][j - p]);
        }
      }
    }
#pragma GCC unroll 4
    for (int y = 0; y < L; ++y)
#pragma GCC unroll 16
      for (int kx = 0; kx < K; ++kx) {
        float* const to = sums + (y * K + kx) * kLanes;
        store(to, load(to) + sum[y][kx]);
      }
  } else {
    for (int y = 0; y < L; ++y)
      for (int64_t kx = 0; kx < width; ++kx) {
        const float* const in = lines[y] + kx * kLanes;
        vf sum[4] = {};
        for (int64_t p = 0; p < pixels; p += 4)
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i)
            sum[i] = fma(load(in + (p + i) * kLanes), load(grad + (p + i) * kLanes), sum[i]);
        float* const to = sums + (y * width + kx) * kLanes;
        store(to, load(to) + ((sum[0] + sum[1]) + (sum[2] + sum[3])));
      }
  }
}

using AddProducts = void (*)(const float* const*, const float*, int64_t, int64_t, float*);

template <int L>
AddProducts add_products_of(int64_t width) {
  switch (width) {
    case 3: return add_products<3, L>;
    case 5: return add_products<5, L>;
    case 7: return add_products<7, L>;
    case 9: return add_products<9, L>;
    case 11: return add_products<11, L>;
    default: return add_products<0, L>;
  }
}

struct Sizes {
  int64_t vectors, taps, columns;
  AddProducts several, one;
};

// Adds lines [begin, end) of the batch to sums[v][tap], the bias's after the last tap.
void add_lines(const DwconvWeightGrad& a, const Sizes& s, int64_t begin, int64_t end,
               const Window& window, const Window& grads, float* sums) {
  const DwconvSizes& size = a.size;
  const int64_t above = size.kh / 2, beside = size.kw / 2;
  for (int64_t left = 0; left < size.W; left += s.columns) {
    const int64_t columns = min(s.columns, size.W - left);
    const int64_t pixels = ceil_div(columns, kPixels) * kPixels;
    int64_t filled = 0, image = -1;
    for (int64_t line = begin; line < end; ++line) {
      const int64_t b = line / size.H, h = line % size.H;
      const int64_t top = max(h - above, 0), bottom = min(h + above + 1, size.H);
      if (b != image) filled = top, image = b;
      for (; filled < bottom; ++filled) fill_line(a.x, size, b, filled, left - beside, window);
      fill_line(a.grad, size, b, h, left, grads);
      for (int64_t v = 0; v < s.vectors; ++v) {
        float* const own = sums + v * (s.taps + 1) * kLanes;
        float* const grad = grads.line(v, h);
        // What the window holds there belongs to the next block of columns.
        for (int64_t p = columns; p < pixels; ++p) store(grad + p * kLanes, zero());
        int64_t at = top;
        while (at < bottom) {
          const float* in[kLines];
          const int count = at + kLines <= bottom ? kLines : 1;
          for (int i = 0; i < count; ++i) in[i] = window.line(v, at + i);
          (count > 1 ? s.several : s.one)(in, grad, pixels, size.kw,
                                          own + (at - (h - above)) * size.kw * kLanes);
          at += count;
        }
        vf total = zero();
        for (int64_t p = 0; p < pixels; ++p) total = total + load(grad + p * kLanes);
        float* const to = own + s.taps * kLanes;
        store(to, load(to) + total);
      }
    }
  }
}

template <class T>
void write_taps(const float* partials, int64_t blocks, int64_t step, int64_t taps, int64_t channels,
                T* to) {
  for (int64_t t0 = 0; t0 < taps; t0 += kLanes) {
    const int count = static_cast<int>(min(kLanes, taps - t0));
    vf r[kLanes] = {};
    for (int i = 0; i < count; ++i)
      r[i] = sum_blocks(partials + (t0 + i) * kLanes, blocks, step, Whole{});
    transpose(r);
    for (int64_t c = 0; c < channels; ++c) {
      if (count == kLanes)
        store(to + c * taps + t0, r[c]);
      else
        store_n(to + c * taps + t0, r[c], count);
    }
  }
}

template <class T>
void write_bias(const float* partials, int64_t blocks, int64_t step, int64_t channels, T* to) {
  const vf sum = sum_blocks(partials, blocks, step, Whole{});
  if (channels == kLanes)
    store(to, sum);
  else
    store_n(to, sum, static_cast<int>(channels));
}

}  // namespace

void dwconv_weight_grad(const DwconvWeightGrad& a) {
  const DwconvSizes& size = a.size;
  const int64_t C = size.C, lines = size.B * size.H;
  Sizes s = {vectors_of(C), size.kh * size.kw, 0, add_products_of<kLines>(size.kw),
             add_products_of<1>(size.kw)};
  s.columns = block_columns(size, size.kh + 1);

  // Blocks depend on the map alone.
  const int64_t by_count = ceil_div(lines, kMostBlocks);
  const int64_t by_pixels = ceil_div(kFewestPixels, size.W);
  const int64_t block_lines = max(by_count, by_pixels);
  const int64_t blocks = ceil_div(lines, block_lines);
  const int64_t step = s.vectors * (s.taps + 1) * kLanes;

  Window window = {nullptr, s.vectors, size.kh, s.columns + kPixels + size.kw - 1};
  Window grads = {nullptr, s.vectors, 1, s.columns + kPixels};
  const int threads = team_size(lines * size.W * C * (s.taps / 16 + 1), size.threads);
  const int64_t each = window.floats() + grads.floats();
  const Scratch scratch((blocks * step + threads * each) * 4);
  float* const partials = scratch.as<float>();
  parallel_for(blocks, threads, [&](int64_t first, int64_t last, int thread) {
    Window mine = window, own = grads;
    mine.data = partials + blocks * step + thread * each;
    own.data = mine.data + window.floats();
    for (int64_t block = first; block < last; ++block) {
      float* const sums = partials + block * step;
      for (int64_t i = 0; i < step; i += kLanes) store(sums + i, zero());
      add_lines(a, s, block * block_lines, min((block + 1) * block_lines, lines), mine, own, sums);
    }
  });
  parallel_for(s.vectors, team_size(blocks * step, threads), [&](int64_t first, int64_t last, int) {
    for (int64_t v = first; v < last; ++v) {
      const float* const sums = partials + v * (s.taps + 1) * kLanes;
      const int64_t c = v * kLanes, channels = min(kLanes, C - c);
      if (a.weight.ptr != nullptr && a.weight.dtype == DType::f32)
        write_taps(sums, blocks, step, s.taps, channels,
                   static_cast<float*>(a.weight.ptr) + c * s.taps);
      else if (a.weight.ptr != nullptr)
        write_taps(sums, blocks, step, s.taps, channels,
                   static_cast<bf16_t*>(a.weight.ptr) + c * s.taps);
      const float* const bias = sums + s.taps * kLanes;
      if (a.bias.ptr != nullptr && a.bias.dtype == DType::f32)
        write_bias(bias, blocks, step, channels, static_cast<float*>(a.bias.ptr) + c);
      else if (a.bias.ptr != nullptr)
        write_bias(bias, blocks, step, channels, static_cast<bf16_t*>(a.bias.ptr) + c);
    }
  });
}

}  // namespace VITFAST_ISA
}  // namespace vitfast
