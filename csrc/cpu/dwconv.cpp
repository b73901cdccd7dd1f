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
  int64_t vectors, columns, group, z_step;
  const float *taps, *bias, *weight, *shift;  // padded to whole vectors
  bool stream_out;
};

// Sum of the lanes of each of kLanes vectors.
inline vf sums_of(vf (&r)[kLanes]) {
  transpose(r);
  vf sum = r[0];
#pragma GCC unroll 16
  for (int i = 1; i < kLanes; ++i) sum = sum + r[i];
  return sum;
}

inline vf square_root(vf v) {
  for (int i = 0; i < kLanes; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
}

// Norm of up to kLanes pixels, a lane for the statistics of each.
template <class T>
void normalise(const Plan& plan, const float* z, int count, T* y, float* stats) {
  const int64_t C = plan.a.size.C, step = plan.z_step;
  const bool rms = plan.a.kind == NormKind::rms;
  const vf n = splat(static_cast<float>(C)), eps = splat(plan.a.eps);
  vf first[kLanes] = {}, second[kLanes] = {};
  vf mean = zero(), offset = zero(), var;
  if (rms) {
    for (int i = 0; i < count; ++i) {
      Sums sums;
      over(C, [&](int64_t c, int slot, auto span) VITFAST_INLINE {
        const vf v = load(z + i * step + c, span);
        sums.v[slot] = fma(v, v, sums.v[slot]);
      });
      second[i] = (sums.v[0] + sums.v[1]) + (sums.v[2] + sums.v[3]);
    }
    var = sums_of(second) / n;
  } else {
    for (int i = 0; i < count; ++i) {
      Sums sums;
      over(C, [&](int64_t c, int slot, auto span) VITFAST_INLINE {
        sums.v[slot] = sums.v[slot] + load(z + i * step + c, span);
      });
      first[i] = (sums.v[0] + sums.v[1]) + (sums.v[2] + sums.v[3]);
    }
    mean = sums_of(first) / n;
    // Deviations are exact where the mean is far from zero; their own mean corrects both.
    for (int i = 0; i < count; ++i) {
      const vf centre = splat(mean[i]);
      Sums plain, square;
      over(C, [&](int64_t c, int slot, auto span) VITFAST_INLINE {
        const vf d = keep(load(z + i * step + c, span) - centre, span);
        plain.v[slot] = plain.v[slot] + d;
        square.v[slot] = fma(d, d, square.v[slot]);
      });
      first[i] = (plain.v[0] + plain.v[1]) + (plain.v[2] + plain.v[3]);
      second[i] = (square.v[0] + square.v[1]) + (square.v[2] + square.v[3]);
    }
    offset = sums_of(first) / n;
    var = sums_of(second) / n - offset * offset;
    var = select(var < 0.f, zero(), var);  // a NaN stays
  }
  const vf rstd = splat(1.f) / square_root(var + eps), shift = zero() - offset * rstd;
  for (int i = 0; i < count; ++i) {
    const vf centre = splat(mean[i]), scale = splat(rstd[i]), rest = splat(shift[i]);
    over(C, [&](int64_t c, int, auto span) VITFAST_INLINE {
      const vf normal = fma(load(z + i * step + c, span) - centre, scale, rest);
      put(y + i * C + c, fma(normal, load(plan.weight + c, span), load(plan.shift + c, span)), span,
          plan.stream_out);
    });
    if (stats != nullptr) {
      stats[2 * i] = mean[i] + offset[i];
      stats[2 * i + 1] = rstd[i];
    }
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
    normalise(plan, z + i * plan.z_step, static_cast<int>(dw_min(kLanes, count - i)), y + i * C,
              stats != nullptr ? stats + 2 * i : nullptr);
}

// Lines [first, last) of image b, whose results begin at pixel `pixel` of y.
void run_lines(const Plan& plan, int64_t b, int64_t first, int64_t last, int64_t pixel,
               const Window& window, float* z) {
  const DwconvSizes& size = plan.a.size;
  const int64_t above = size.kh / 2, beside = size.kw / 2, taps = size.kh * size.kw;
  for (int64_t left = 0; left < size.W; left += plan.columns) {
    const int64_t columns = dw_min(plan.columns, size.W - left);
    const Tiles tiles = tiles_for(columns, size.kw);
    int64_t filled = dw_max(first - above, 0);
    for (int64_t h = first; h < last; h += plan.group) {
      const int64_t lines = dw_min(plan.group, last - h);
      for (; filled < dw_min(h + lines + above, size.H); ++filled)
        fill_line(plan.a.x, size, b, filled, left - beside, window);
      for (int64_t v = 0; v < plan.vectors; ++v) {
        const vf bias = load(plan.bias + v * kLanes);
        for (int64_t i = 0; i < lines; ++i) {
          const int64_t top = dw_max(h + i - above, 0);
          const int64_t height = dw_min(h + i + above + 1, size.H) - top;
          const float* const kernel =
              plan.taps + (v * taps + (top - (h + i - above)) * size.kw) * kLanes;
          for (int64_t p = 0; p < columns; p += tiles.pixels) {
            const int64_t at = dw_max(dw_min(p, columns - tiles.pixels), 0);
            const float* in[kDwconvWidest];
            for (int64_t ky = 0; ky < height; ++ky) in[ky] = window.line(v, top + ky) + at * kLanes;
            tiles.convolve(in, height, size.kw, kernel, bias,
                           z + (i * plan.columns + at) * plan.z_step + v * kLanes, plan.z_step);
          }
        }
      }
      for (int64_t i = 0; i < lines; ++i) {
        const int64_t to = pixel + (h - first + i) * size.W + left;
        const float* const from = z + i * plan.columns * plan.z_step;
        if (plan.a.y_dtype == DType::f32)
          finish<float>(plan, from, columns, to);
        else
          finish<bf16_t>(plan, from, columns, to);
      }
    }
  }
}

}  // namespace

void dwconv_forward(const DwconvForward& a) {
  const DwconvSizes& size = a.size;
  const int64_t C = size.C, vectors = vectors_of(C), padded = vectors * kLanes;
  const int64_t taps = size.kh * size.kw, lines_each = a.last - a.first;
  const int64_t lines = size.B * lines_each, elements = lines * size.W * C;

  Plan plan = {a, vectors, 0, kGroup, padded + kLanes, nullptr, nullptr, nullptr, nullptr, false};
  Window window = {nullptr, vectors, size.kh - 1 + kGroup, 0};
  plan.columns = block_columns(size, window.lines + kGroup);
  window.width = dw_max(plan.columns, kWidestTile) + size.kw - 1;
  const int64_t z_floats = (kGroup * plan.columns + kWidestTile) * plan.z_step;
  const Rows out = {a.y, a.y_dtype, C, C};
  plan.stream_out =
      past_cache(out, elements * (size_of(a.x.dtype) + size_of(a.y_dtype))) && C % kLanes == 0;

  const int threads = team_size(elements * (taps / 16 + 1), size.threads);
  const int64_t each = window.floats() + z_floats;
  const Scratch scratch((vectors * taps * kLanes + 3 * padded + threads * each) * 4);
  float* const packed = scratch.as<float>();
  float* const shared = packed + vectors * taps * kLanes;
  float* const own = shared + 3 * padded;
  parallel_for(vectors, team_size(vectors * taps * kLanes, threads),
               [&](int64_t begin, int64_t end, int) {
                 for (int64_t v = begin; v < end; ++v) {
                   float* const to = packed + v * taps * kLanes;
                   if (a.weight.dtype == DType::f32)
                     pack_taps(static_cast<const float*>(a.weight.ptr), v, C, taps, a.flipped,
                               a.rounded, to);
                   else
                     pack_taps(static_cast<const bf16_t*>(a.weight.ptr), v, C, taps, a.flipped,
                               false, to);
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
      const int64_t stop = dw_min(end - begin, lines_each - line);
      run_lines(plan, b, a.first + line, a.first + line + stop, begin * size.W, mine, z);
      begin += stop;
    }
    if (plan.stream_out) stream_fence();
  });
}

}  // namespace VITFAST_ISA
}  // namespace vitfast
