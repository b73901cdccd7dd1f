// Forward of group_norm.
#include "group_norm_maps.h"

namespace vitfast {
namespace VITFAST_ISA {
namespace {

// Pixels whose mean is the shift below.
constexpr int64_t kFirst = 8, kFirstOfPlane = 64;

// Per channel of a block, rows of C floats: a shift, the sum of x - shift, and of its square.
//
// The shift is the mean of the first pixels, k of n. It is off the block's mean by at most
// sqrt(n / k) standard deviations, so that sums about it lose next to nothing.
struct Sums3 {
  float *shift, *plain, *square;
};

template <int K, class T, class Span>
inline void sum_column(const T* x, int64_t n, int64_t step, const Sums3& out, int64_t c,
                       Span span) {
  const int64_t head = min(n, kFirst);
  vf shift[K] = {}, plain[K] = {}, square[K] = {};
  for (int64_t p = 0; p < head; ++p)
    for (int k = 0; k < K; ++k) shift[k] = shift[k] + load(x + p * step + k * kLanes, span);
  for (int k = 0; k < K; ++k) shift[k] = shift[k] * (1.f / static_cast<float>(head));
  for (int64_t p = 0; p < n; ++p)
    for (int k = 0; k < K; ++k) {
      const vf d = load(x + p * step + k * kLanes, span) - shift[k];
      plain[k] = plain[k] + d;
      square[k] = fma(d, d, square[k]);
    }
  for (int k = 0; k < K; ++k) {
    put(out.shift + c + k * kLanes, shift[k], span, false);
    put(out.plain + c + k * kLanes, plain[k], span, false);
    put(out.square + c + k * kLanes, square[k], span, false);
  }
}

// n pixels, `step` elements apart, of C contiguous channels.
template <class T>
void sum_pixels(const void* x_, int64_t n, int64_t step, const Sums3& out, int64_t C) {
  const T* x = static_cast<const T*>(x_);
  int64_t c = 0;
  for (; c + 4 * kLanes <= C; c += 4 * kLanes) sum_column<4>(x + c, n, step, out, c, Whole{});
  for (; c + kLanes <= C; c += kLanes) sum_column<1>(x + c, n, step, out, c, Whole{});
  if (c < C) sum_column<1>(x + c, n, step, out, c, Part{static_cast<int>(C - c)});
}

// n contiguous pixels of channel c.
template <class T>
void sum_plane(const void* x_, int64_t n, const Sums3& out, int64_t c) {
  const T* x = static_cast<const T*>(x_);
  const int64_t head = min(n, kFirstOfPlane);
  float shift = 0.f;
  for (int64_t p = 0; p < head; ++p) shift += to_float(x[p]);
  shift /= static_cast<float>(head);
  const vf from = splat(shift);
  Sums plain, square;
  over(n, [&](int64_t p, int slot, auto span) VITFAST_INLINE {
    const vf d = keep(load(x + p, span) - from, span);
    plain.v[slot] = plain.v[slot] + d;
    square.v[slot] = fma(d, d, square.v[slot]);
  });
  out.shift[c] = shift;
  out.plain[c] = static_cast<float>(plain.total());
  out.square[c] = static_cast<float>(square.total());
}

// Per channel: y = (x - mean) * scale + offset.
struct Affine {
  float *mean, *scale, *offset;
};

template <class TX, class TR, class TY>
void apply_pixel(const void* x_, const void* residual_, void* y_, const Affine& f, bool relu,
                 bool past, int64_t C) {
  const TX* x = static_cast<const TX*>(x_);
  const TR* residual = static_cast<const TR*>(residual_);
  TY* y = static_cast<TY*>(y_);
  over(C, [&](int64_t c, int, auto span) VITFAST_INLINE {
    vf v = fma(load(x + c, span) - load(f.mean + c, span), load(f.scale + c, span),
               load(f.offset + c, span));
    if (residual != nullptr) v = v + load(residual + c, span);
    if (relu) v = select(v <= 0.f, zero(), v);
    put(y + c, v, span, past);
  });
}

template <class TX, class TR, class TY>
void apply_plane(const void* x_, const void* residual_, void* y_, const Affine& f, bool relu,
                 bool past, int64_t c, int64_t n) {
  const TX* x = static_cast<const TX*>(x_);
  const TR* residual = static_cast<const TR*>(residual_);
  TY* y = static_cast<TY*>(y_);
  const vf mean = splat(f.mean[c]), scale = splat(f.scale[c]), offset = splat(f.offset[c]);
  over(n, [&](int64_t p, int, auto span) VITFAST_INLINE {
    vf v = fma(load(x + p, span) - mean, scale, offset);
    if (residual != nullptr) v = v + load(residual + p, span);
    if (relu) v = select(v <= 0.f, zero(), v);
    put(y + p, v, span, past);
  });
}

struct Apply {
  void (*pixel)(const void*, const void*, void*, const Affine&, bool, bool, int64_t);
  void (*plane)(const void*, const void*, void*, const Affine&, bool, bool, int64_t, int64_t);
};
template <class TX, class TR, class TY>
Apply both() {
  return {apply_pixel<TX, TR, TY>, apply_plane<TX, TR, TY>};
}
template <class TX, class TR>
Apply apply_to(DType y) {
  return y == DType::f32 ? both<TX, TR, float>() : both<TX, TR, bf16_t>();
}
Apply apply_for(DType x, DType residual, DType y) {
  if (x == DType::f32)
    return residual == DType::f32 ? apply_to<float, float>(y) : apply_to<float, bf16_t>(y);
  return residual == DType::f32 ? apply_to<bf16_t, float>(y) : apply_to<bf16_t, bf16_t>(y);
}

}  // namespace

void group_norm_forward(const GroupNormForward& a) {
  const GroupNormShape& s = a.shape;
  const Blocks blocks(s);
  const int64_t C = s.C, width = C / s.groups;
  const int64_t vector = padded(C);
  const int threads = team_size(s.B * blocks.pixels * C, s.threads);
  // A slot: the blocks' sums, the affine map, and two rows of doubles.
  const int64_t slot = vector * (3 * blocks.count + 3 + 4);
  const int64_t slots = s.B < threads ? 1 : threads;
  const Scratch scratch(4 * (2 * vector + slots * slot));
  float* const shared = scratch.as<float>();
  const float* weight = floats(a.weight, shared, C, 1.f);
  const float* bias = floats(a.bias, shared + vector, C, 0.f);
  const auto base = [&](int i) { return shared + 2 * vector + i * slot; };
  const auto sums = [&](int i, int64_t block) {
    float* const p = base(i) + 3 * vector * block;
    return Sums3{p, p + vector, p + 2 * vector};
  };
  const auto affine = [&](int i) {
    float* const p = base(i) + 3 * vector * blocks.count;
    return Affine{p, p + vector, p + 2 * vector};
  };
  const bool wide = a.x.dtype == DType::f32;
  const int64_t x_size = size_of(a.x.dtype), y_size = size_of(a.y.dtype);
  const int64_t residual_size = size_of(a.residual.dtype);
  const Apply apply = apply_for(a.x.dtype, a.residual.dtype, a.y.dtype);

  const bool past =
      past_caches(a.y, s, map_bytes(a.x, s) + map_bytes(a.residual, s) + map_bytes(a.y, s));

  const auto first = [&](int64_t b, int64_t i, int at) {
    const char* const x = static_cast<const char*>(a.x.ptr) + b * a.x.sample * x_size;
    if (s.channels_last) {
      (wide ? sum_pixels<float> : sum_pixels<bf16_t>)(x + blocks.begin(i) * a.x.pixel * x_size,
                                                      blocks.length(i), a.x.pixel, sums(at, i), C);
      return;
    }
    for (int64_t k = 0; k < blocks.count; ++k)
      (wide ? sum_plane<float>
            : sum_plane<bf16_t>)(x + (i * a.x.channel + blocks.begin(k)) * x_size, blocks.length(k),
                                 sums(at, k), i);
  };

  // Channel by channel in vectors, then group by group.
  const auto middle = [&](int64_t b, int64_t g0, int64_t g1, int at) {
    const int64_t begin = g0 * width, end = g1 * width;
    const Affine f = affine(at);
    double* const mean = reinterpret_cast<double*>(f.mean + 3 * vector);
    double* const square = mean + vector;
    const double pixels = static_cast<double>(blocks.pixels);
    for (int64_t c = begin; c < end; ++c) mean[c] = square[c] = 0.;
    for (int64_t i = 0; i < blocks.count; ++i) {
      const Sums3 t = sums(at, i);
      const double n = static_cast<double>(blocks.length(i));
      for (int64_t c = begin; c < end; ++c)
        mean[c] += n * static_cast<double>(t.shift[c]) + static_cast<double>(t.plain[c]);
    }
    for (int64_t c = begin; c < end; ++c) mean[c] /= pixels;
    for (int64_t i = 0; i < blocks.count; ++i) {
      const Sums3 t = sums(at, i);
      const double n = static_cast<double>(blocks.length(i));
      for (int64_t c = begin; c < end; ++c) {
        const double d = static_cast<double>(t.shift[c]) - mean[c];
        square[c] +=
            static_cast<double>(t.square[c]) + d * (2. * static_cast<double>(t.plain[c]) + n * d);
      }
    }
    for (int64_t g = g0; g < g1; ++g) {
      double m = 0., var = 0.;
      for (int64_t c = g * width; c < (g + 1) * width; ++c) m += mean[c];
      m /= static_cast<double>(width);
      for (int64_t c = g * width; c < (g + 1) * width; ++c)
        var += square[c] + pixels * (mean[c] - m) * (mean[c] - m);
      var /= pixels * static_cast<double>(width);
      var = var < 0. ? 0. : var;  // a NaN stays
      const double rstd = 1. / __builtin_sqrt(var + s.eps);
      const float rounded = static_cast<float>(m);
      const double shift = (static_cast<double>(rounded) - m) * rstd;
      for (int64_t c = g * width; c < (g + 1) * width; ++c) {
        const double w = static_cast<double>(weight[c]);
        f.mean[c] = rounded;
        f.scale[c] = static_cast<float>(rstd * w);
        f.offset[c] = static_cast<float>(static_cast<double>(bias[c]) + shift * w);
      }
      if (a.stats != nullptr) {
        a.stats[2 * (b * s.groups + g)] = rounded;
        a.stats[2 * (b * s.groups + g) + 1] = static_cast<float>(rstd);
      }
    }
  };

  const auto last = [&](int64_t b, int64_t i, int at) {
    const Affine f = affine(at);
    const char* x = static_cast<const char*>(a.x.ptr) + b * a.x.sample * x_size;
    const char* residual = static_cast<const char*>(a.residual.ptr);
    if (residual != nullptr) residual += b * a.residual.sample * residual_size;
    char* const y = static_cast<char*>(a.y.ptr) + b * a.y.sample * y_size;
    if (!s.channels_last) {
      if (residual != nullptr) residual += i * a.residual.channel * residual_size;
      apply.plane(x + i * a.x.channel * x_size, residual, y + i * a.y.channel * y_size, f, s.relu,
                  past, i, blocks.pixels);
    } else {
      const int64_t begin = blocks.begin(i), end = begin + blocks.length(i);
      int64_t line = begin / s.W, column = begin % s.W;
      for (int64_t p = begin; p < end; ++p) {
        apply.pixel(x + p * a.x.pixel * x_size,
                    residual != nullptr ? residual + p * a.residual.pixel * residual_size : nullptr,
                    y + (line * a.y.line + column * a.y.pixel) * y_size, f, s.relu, past, C);
        if (++column == s.W) column = 0, ++line;
      }
    }
    if (past) stream_fence();
  };
  over_samples(s, blocks, threads, [](int64_t, int) {}, first, middle, last);
}

}  // namespace VITFAST_ISA
}  // namespace vitfast
