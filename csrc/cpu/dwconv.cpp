// Forward of dwconv_norm: each line of the map is read once, into a window of lines that stays in
// the second-level cache, and pixels are normalised before they leave it.
#include "dwconv_lines.h"
#include "dwconv_tile.h"

namespace vitfast {
namespace VITFAST_ISA {
namespace {

constexpr int64_t kGroup = 2;  // lines of results at a time: each line read serves all of them

// What all threads share.
struct Plan {
  const DwconvForward& a;
  int64_t vectors, columns, z_step;
  const float *taps, *bias, *weight, *shift;  // padded to whole vectors
  bool stream_out;
};

// Sum of the lanes of each of kLanes vectors.
inline vf sums_of(vf (&r)[kLanes]) {
#if defined(__AVX512F__)
  __m512 t[8], u[4];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m512 a = reinterpret_cast<__m512>(r[2 * i]), b = reinterpret_cast<__m512>(r[2 * i + 1]);
    t[i] = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(t[2 * i]), b = _mm512_castps_pd(t[2 * i + 1]);
    u[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)) + _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
  }
  const __m512 low =
      _mm512_shuffle_f32x4(u[0], u[1], 0x88) + _mm512_shuffle_f32x4(u[0], u[1], 0xdd);
  const __m512 high =
      _mm512_shuffle_f32x4(u[2], u[3], 0x88) + _mm512_shuffle_f32x4(u[2], u[3], 0xdd);
  return reinterpret_cast<vf>(_mm512_shuffle_f32x4(low, high, 0x88) +
                              _mm512_shuffle_f32x4(low, high, 0xdd));
#else
  transpose(r);
  vf sum = r[0];
#pragma GCC unroll 16
  for (int i = 1; i < kLanes; ++i) sum = sum + r[i];
  return sum;
#endif
}

inline vf square_root(vf v) {
#if defined(__AVX512F__)
  return reinterpret_cast<vf>(_mm512_sqrt_ps(reinterpret_cast<__m512>(v)));
#elif defined(__AVX2__)
  return reinterpret_cast<vf>(_mm256_sqrt_ps(reinterpret_cast<__m256>(v)));
#else
  for (int i = 0; i < kLanes; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

// Pixels that are normalised side by side, so that none waits for its own sums.
constexpr int kSide = 4;

// The sums over the channels of kSide pixels; of squared distances from `centre` if Square. Lanes
// stay apart, and a pixel's order of additions is always the same.
template <bool Square>
inline void sum_pixels(const float* z, int64_t step, int64_t C, const float* centre, vf* sums) {
  vf even[kSide] = {}, odd[kSide] = {}, mean[kSide] = {};
  if constexpr (Square)
    for (int p = 0; p < kSide; ++p) mean[p] = splat(centre[p]);
  const auto add = [&](vf(&sum)[kSide], int64_t c) VITFAST_INLINE {
#pragma GCC unroll 4
    for (int p = 0; p < kSide; ++p) {
      const vf v = load(z + p * step + c), d = v - mean[p];
      sum[p] = Square ? fma(d, d, sum[p]) : sum[p] + v;
    }
  };
  int64_t c = 0;
  for (; c + 2 * kLanes <= C; c += 2 * kLanes) {
    add(even, c);
    add(odd, c + kLanes);
  }
  if (c + kLanes <= C) {
    add(even, c);
    c += kLanes;
  }
  if (c < C)
#pragma GCC unroll 4
    for (int p = 0; p < kSide; ++p) {  // z is zero past the last channel
      const vf v = load(z + p * step + c), d = keep(v - mean[p], Part{static_cast<int>(C - c)});
      odd[p] = Square ? fma(d, d, odd[p]) : odd[p] + v;
    }
#pragma GCC unroll 4
  for (int p = 0; p < kSide; ++p) sums[p] = even[p] + odd[p];
}

// The means of kLanes pixels, of which those past `count` mean nothing.
template <bool Square>
inline vf means_of(const float* z, int64_t step, int count, int64_t C, const float* centres) {
  vf sums[kLanes];
  for (int i = 0; i < kLanes; i += kSide)
    if (i < count)
      sum_pixels<Square>(z + i * step, step, C, centres + i, sums + i);
    else
      for (int p = 0; p < kSide; ++p) sums[i + p] = zero();
  return sums_of(sums) / static_cast<float>(C);
}

template <class T, bool Past>
void write_pixels(const float* z, int64_t step, int count, const float* means, const float* scales,
                  const float* weight, const float* bias, T* y, int64_t C) {
  vf mean[kSide], scale[kSide];
#pragma GCC unroll 4
  for (int p = 0; p < kSide; ++p) mean[p] = splat(means[p]), scale[p] = splat(scales[p]);
  const auto write = [&](int p, int64_t c, vf w, vf b, auto span) VITFAST_INLINE {
    const vf normal = (load(z + p * step + c) - mean[p]) * scale[p];
    put(y + p * C + c, fma(normal, w, b), span, Past);
  };
  int64_t c = 0;
  if (count >= kSide)
    for (; c + kLanes <= C; c += kLanes) {
      const vf w = load(weight + c), b = load(bias + c);
#pragma GCC unroll 4
      for (int p = 0; p < kSide; ++p) write(p, c, w, b, Whole{});
    }
  for (; c < C; c += kLanes) {
    const vf w = load(weight + c), b = load(bias + c);
    for (int p = 0; p < min(count, kSide); ++p) {
      if (c + kLanes <= C)
        write(p, c, w, b, Whole{});
      else
        write(p, c, w, b, Part{static_cast<int>(C - c)});
    }
  }
}

// Norm of up to kLanes pixels, a lane for the statistics of each.
template <class T>
void normalise(const Plan& plan, const float* z, int count, T* y, float* stats) {
  const int64_t C = plan.a.size.C, step = plan.z_step;
  float mean[kLanes] = {}, scale[kLanes];
  if (plan.a.kind == NormKind::layer) store(mean, means_of<false>(z, step, count, C, mean));
  const vf var = means_of<true>(z, step, count, C, mean);
  store(scale, splat(1.f) / square_root(var + splat(plan.a.eps)));
  const auto write = plan.stream_out ? write_pixels<T, true> : write_pixels<T, false>;
  for (int i = 0; i < count; i += kSide)
    write(z + i * step, step, count - i, mean + i, scale + i, plan.weight, plan.shift, y + i * C,
          C);
  if (stats != nullptr)
    for (int i = 0; i < count; ++i) {
      stats[2 * i] = mean[i];
      stats[2 * i + 1] = scale[i];
    }
}

template <class T>
void finish(const Plan& plan, const float* z, int64_t count, int64_t pixel) {
  const int64_t C = plan.a.size.C;
  T* const y = static_cast<T*>(plan.a.y) + pixel * C;
  if (plan.a.kind == NormKind::none) {
    for (int64_t i = 0; i < count; ++i)
      convert<float, T>(z + i * plan.z_step, y + i * C, plan.stream_out, C);
    return;
  }
  float* const stats = plan.a.stats != nullptr ? plan.a.stats + 2 * pixel : nullptr;
  for (int64_t i = 0; i < count; i += kLanes)
    normalise(plan, z + i * plan.z_step, static_cast<int>(min(kLanes, count - i)), y + i * C,
              stats != nullptr ? stats + 2 * i : nullptr);
}

// Convolved pixels that wait for their norm: some lines of a block of columns.
struct Convolved {
  const float* z;
  int64_t columns, count, done;
  int64_t pixel;  // of the result, where the first one belongs
};

inline void finish_until(const Plan& plan, Convolved& c, int64_t end) {
  while (c.done < end) {
    const int64_t line = c.done / c.columns, column = c.done % c.columns;
    const int64_t count = min(end - c.done, c.columns - column);
    const float* const z = c.z + c.done * plan.z_step;
    const int64_t pixel = c.pixel + line * plan.a.size.W + column;
    if (plan.a.y_dtype == DType::f32)
      finish<float>(plan, z, count, pixel);
    else
      finish<bf16_t>(plan, z, count, pixel);
    c.done += count;
  }
}

// What the window takes from a line of x later on, to be asked for bit by bit: all at once,
// requests would be lost.
struct Ahead {
  const char *at, *end;
  int64_t step;

  // GCC drops calls of a function that only prefetches, unless it is part of its caller.
  VITFAST_INLINE void fetch() {
    for (int64_t i = 0; i < step && at < end; ++i, at += 64) __builtin_prefetch(at, 0, 3);
  }
};

inline Ahead ahead(const Plan& plan, int64_t b, int64_t h, int64_t left, int64_t columns,
                   int64_t parts) {
  const DwconvMap& x = plan.a.x;
  if (x.c != 1 || h >= plan.a.size.H) return {};
  const int64_t begin = max(left, 0), end = min(left + columns, plan.a.size.W);
  const int64_t element = size_of(x.dtype), bytes = (end - begin) * x.w * element;
  const char* const line =
      static_cast<const char*>(x.ptr) + (b * x.b + h * x.h + begin * x.w) * element;
  return {line, line + bytes, (bytes / 64 + parts) / parts};
}

// Lines [first, last) of image b, whose results begin at pixel `pixel` of y. While some lines are
// convolved, those before are normalised bit by bit and those that come next are asked for, so that
// memory has work all the time.
void run_lines(const Plan& plan, int64_t b, int64_t first, int64_t last, int64_t pixel,
               const Window& window, float* z, int64_t z_floats) {
  const DwconvSizes& size = plan.a.size;
  const int64_t above = size.kh / 2, beside = size.kw / 2, taps = size.kh * size.kw;
  Convolved before = {};
  for (int64_t left = 0; left < size.W; left += plan.columns) {
    const int64_t columns = min(plan.columns, size.W - left);
    const Tiles tiles = tiles_for(columns, size.kw);
    int64_t filled = max(first - above, 0);
    for (int64_t h = first; h < last; h += kGroup) {
      const int64_t lines = min(kGroup, last - h);
      for (; filled < min(h + lines + above, size.H); ++filled)
        fill_line(plan.a.x, size, b, filled, left - beside, window);
      float* const now = before.z == z ? z + z_floats : z;
      const int64_t parts = plan.vectors * ceil_div(columns, tiles.pixels);
      Ahead next[kGroup];
      for (int64_t i = 0; i < kGroup; ++i)
        next[i] = ahead(plan, b, filled + i, left - beside, window.width, parts);
      for (int64_t v = 0; v < plan.vectors; ++v) {
        const vf bias = load(plan.bias + v * kLanes);
        for (int64_t i = 0; i < lines; ++i) {
          const int64_t top = max(h + i - above, 0);
          const int64_t height = min(h + i + above + 1, size.H) - top;
          const float* const kernel =
              plan.taps + (v * taps + (top - (h + i - above)) * size.kw) * kLanes;
          for (int64_t p = 0; p < columns; p += tiles.pixels) {
            const int64_t at = max(min(p, columns - tiles.pixels), 0);
            next[i].fetch();
            const float* in[kDwconvWidest];
            for (int64_t ky = 0; ky < height; ++ky) in[ky] = window.line(v, top + ky) + at * kLanes;
            tiles.convolve(in, height, size.kw, kernel, bias,
                           now + (i * columns + at) * plan.z_step + v * kLanes, plan.z_step);
          }
        }
        finish_until(plan, before, before.count * (v + 1) / plan.vectors / kLanes * kLanes);
      }
      finish_until(plan, before, before.count);
      before = {now, columns, lines * columns, 0, pixel + (h - first) * size.W + left};
    }
  }
  finish_until(plan, before, before.count);
}

}  // namespace

void dwconv_forward(const DwconvForward& a) {
  const DwconvSizes& size = a.size;
  const int64_t C = size.C, vectors = vectors_of(C), padded = vectors * kLanes;
  const int64_t taps = size.kh * size.kw, lines_each = a.last - a.first;
  const int64_t lines = size.B * lines_each, elements = lines * size.W * C;

  Plan plan = {a, vectors, 0, padded + kLanes, nullptr, nullptr, nullptr, nullptr, false};
  Window window = {nullptr, vectors, size.kh - 1 + kGroup, 0};
  plan.columns = block_columns(size, window.lines + 2 * kGroup);
  window.width = max(plan.columns, kWidestTile) + size.kw - 1;
  const int64_t z_floats = (kGroup * plan.columns + kWidestTile) * plan.z_step;
  const Rows out = {a.y, a.y_dtype, C, C};
  plan.stream_out =
      past_cache(out, elements * (size_of(a.x.dtype) + size_of(a.y_dtype))) && C % kLanes == 0;

  const int threads = team_size(elements * (taps / 16 + 1), size.threads);
  const int64_t each = window.floats() + 2 * z_floats;
  const Scratch scratch((vectors * taps * kLanes + 3 * padded + threads * each) * 4);
  float* const packed = scratch.as<float>();
  float* const shared = packed + vectors * taps * kLanes;
  float* const own = shared + 3 * padded;
  parallel_for(
      vectors, team_size(vectors * taps * kLanes, threads), [&](int64_t begin, int64_t end, int) {
        for (int64_t v = begin; v < end; ++v) {
          float* const to = packed + v * taps * kLanes;
          if (a.weight.dtype == DType::f32)
            pack_taps(static_cast<const float*>(a.weight.ptr), v, C, taps, a.flipped, a.rounded,
                      to);
          else
            pack_taps(static_cast<const bf16_t*>(a.weight.ptr), v, C, taps, a.flipped, false, to);
        }
      });
  const auto vector = [&](const Channels& from, float* to, float absent) {
    for (int64_t c = C; c < padded; ++c) to[c] = 0.f;
    const float* const found = floats(from, to, C, absent);
    if (found != to) std::memcpy(to, found, C * sizeof(float));
    return to;
  };
  float* const bias = vector(a.bias, shared, 0.f);
  if (a.rounded)
    for (int64_t c = 0; c < padded; c += kLanes) store(bias + c, as_bf16(load(bias + c)));
  plan.taps = packed;
  plan.bias = bias;
  plan.weight = vector(a.norm_weight, shared + padded, 1.f);
  plan.shift = vector(a.norm_bias, shared + 2 * padded, 0.f);

  parallel_for(lines, threads, [&](int64_t begin, int64_t end, int thread) {
    Window mine = window;
    mine.data = own + thread * each;
    float* const z = mine.data + window.floats();
    while (begin < end) {
      const int64_t b = begin / lines_each, line = begin % lines_each;
      const int64_t stop = min(end - begin, lines_each - line);
      run_lines(plan, b, a.first + line, a.first + line + stop, begin * size.W, mine, z, z_floats);
      begin += stop;
    }
    if (plan.stream_out) stream_fence();
  });
}

}  // namespace VITFAST_ISA
}  // namespace vitfast
