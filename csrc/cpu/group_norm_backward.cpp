// Backward of group_norm: per-channel sums of the gradient, then the gradients of the maps.
#include "group_norm_maps.h"

namespace vitfast {
namespace VITFAST_ISA {
namespace {

// Per channel: the sums of g and of g (x - mean), g being the gradient behind the activation.
struct GradSums {
  float *plain, *product;
};

// g is zero where ReLU's output y is; NaN passes, as in torch.
template <class T, class Span>
inline vf behind_relu(const T* grad, const T* y, int64_t i, Span span) {
  const vf g = load(grad + i, span);
  return y != nullptr ? select(load(y + i, span) <= 0.f, zero(), g) : g;
}

template <class TX, class TG, int K, class Span>
inline void sum_column(const TG* grad, const TG* y, const TX* x, const int64_t (&step)[3],
                       int64_t n, const float* mean_, const GradSums& out, int64_t c, Span span) {
  vf plain[K] = {}, product[K] = {}, mean[K];
  for (int k = 0; k < K; ++k) mean[k] = load(mean_ + c + k * kLanes, span);
  for (int64_t p = 0; p < n; ++p)
    for (int k = 0; k < K; ++k) {
      const int64_t i = c + k * kLanes;
      const vf g = behind_relu(grad + p * step[0], y != nullptr ? y + p * step[1] : y, i, span);
      plain[k] = plain[k] + g;
      product[k] = fma(g, load(x + p * step[2] + i, span) - mean[k], product[k]);
    }
  for (int k = 0; k < K; ++k) {
    put(out.plain + c + k * kLanes, plain[k], span, false);
    put(out.product + c + k * kLanes, product[k], span, false);
  }
}

template <class TX, class TG>
void sum_pixels(const void* grad_, const void* y_, const void* x_, const int64_t (&step)[3],
                int64_t n, const float* mean, const GradSums& out, int64_t C) {
  const TG *grad = static_cast<const TG*>(grad_), *y = static_cast<const TG*>(y_);
  const TX* x = static_cast<const TX*>(x_);
  int64_t c = 0;
  for (; c + 4 * kLanes <= C; c += 4 * kLanes)
    sum_column<TX, TG, 4>(grad, y, x, step, n, mean, out, c, Whole{});
  for (; c + kLanes <= C; c += kLanes)
    sum_column<TX, TG, 1>(grad, y, x, step, n, mean, out, c, Whole{});
  if (c < C)
    sum_column<TX, TG, 1>(grad, y, x, step, n, mean, out, c, Part{static_cast<int>(C - c)});
}

template <class TX, class TG>
void sum_plane(const void* grad_, const void* y_, const void* x_, int64_t n, const float* mean_,
               const GradSums& out, int64_t c) {
  const TG *grad = static_cast<const TG*>(grad_), *y = static_cast<const TG*>(y_);
  const TX* x = static_cast<const TX*>(x_);
  const vf mean = splat(mean_[c]);
  Sums plain, product;
  over(n, [&](int64_t p, int slot, auto span) VITFAST_INLINE {
    const vf g = behind_relu(grad, y, p, span);
    plain.v[slot] = plain.v[slot] + g;
    product.v[slot] = fma(g, keep(load(x + p, span) - mean, span), product.v[slot]);
  });
  out.plain[c] = static_cast<float>(plain.total());
  out.product[c] = static_cast<float>(product.total());
}

// Per channel: dx = g scale - constant - (x - mean) slope.
struct Gradient {
  float *mean, *scale, *constant, *slope;
};

template <class TX, class TG, class TR>
void apply_pixel(const void* grad_, const void* y_, const void* x_, void* dx_, void* dresidual_,
                 const Gradient& f, bool past, int64_t C) {
  const TG *grad = static_cast<const TG*>(grad_), *y = static_cast<const TG*>(y_);
  const TX* x = static_cast<const TX*>(x_);
  TX* dx = static_cast<TX*>(dx_);
  TR* dresidual = static_cast<TR*>(dresidual_);
  over(C, [&](int64_t c, int, auto span) VITFAST_INLINE {
    const vf g = behind_relu(grad, y, c, span);
    if (dresidual != nullptr) put(dresidual + c, g, span, past);
    const vf flat = fma(load(x + c, span) - load(f.mean + c, span), load(f.slope + c, span),
                        load(f.constant + c, span));
    put(dx + c, fma(g, load(f.scale + c, span), -flat), span, past);
  });
}

template <class TX, class TG, class TR>
void apply_plane(const void* grad_, const void* y_, const void* x_, void* dx_, void* dresidual_,
                 const Gradient& f, bool past, int64_t c, int64_t n) {
  const TG *grad = static_cast<const TG*>(grad_), *y = static_cast<const TG*>(y_);
  const TX* x = static_cast<const TX*>(x_);
  TX* dx = static_cast<TX*>(dx_);
  TR* dresidual = static_cast<TR*>(dresidual_);
  const vf mean = splat(f.mean[c]), slope = splat(f.slope[c]);
  const vf constant = splat(f.constant[c]), scale = splat(f.scale[c]);
  over(n, [&](int64_t p, int, auto span) VITFAST_INLINE {
    const vf g = behind_relu(grad, y, p, span);
    if (dresidual != nullptr) put(dresidual + p, g, span, past);
    const vf flat = fma(load(x + p, span) - mean, slope, constant);
    put(dx + p, fma(g, scale, -flat), span, past);
  });
}

struct Passes {
  void (*sum_pixels)(const void*, const void*, const void*, const int64_t (&)[3], int64_t,
                     const float*, const GradSums&, int64_t);
  void (*sum_plane)(const void*, const void*, const void*, int64_t, const float*, const GradSums&,
                    int64_t);
  void (*pixel)(const void*, const void*, const void*, void*, void*, const Gradient&, bool,
                int64_t);
  void (*plane)(const void*, const void*, const void*, void*, void*, const Gradient&, bool, int64_t,
                int64_t);
};
template <class TX, class TG, class TR>
Passes passes() {
  return {sum_pixels<TX, TG>, sum_plane<TX, TG>, apply_pixel<TX, TG, TR>, apply_plane<TX, TG, TR>};
}
template <class TX, class TG>
Passes passes_to(DType residual) {
  return residual == DType::f32 ? passes<TX, TG, float>() : passes<TX, TG, bf16_t>();
}
Passes passes_for(DType x, DType grad, DType residual) {
  if (x == DType::f32)
    return grad == DType::f32 ? passes_to<float, float>(residual)
                              : passes_to<float, bf16_t>(residual);
  return grad == DType::f32 ? passes_to<bf16_t, float>(residual)
                            : passes_to<bf16_t, bf16_t>(residual);
}

// Where a sample begins; null for a map that is absent.
char* sample(const FeatureMap& m, int64_t b) {
  return m.ptr == nullptr ? nullptr : static_cast<char*>(m.ptr) + b * m.sample * size_of(m.dtype);
}
char* moved(char* p, const FeatureMap& m, int64_t elements) {
  return p == nullptr ? nullptr : p + elements * size_of(m.dtype);
}

}  // namespace

void group_norm_backward(const GroupNormBackward& a) {
  const GroupNormShape& s = a.shape;
  const Blocks blocks(s);
  const int64_t C = s.C, width = C / s.groups;
  const int64_t vector = padded(C);
  const int threads = team_size(s.B * blocks.pixels * C, s.threads);
  // Sums of every sample, as doubles; a slot: the blocks' sums, and what a pixel needs.
  const int64_t slot = vector * (2 * blocks.count + 4);
  const int64_t slots = s.B < threads ? 1 : threads;
  const Scratch scratch(4 * (vector * (1 + 4 * s.B) + slots * slot));
  double* const totals = scratch.as<double>();
  float* const shared = scratch.as<float>() + 4 * s.B * vector;
  const float* weight = floats(a.weight, shared, C, 1.f);
  const auto base = [&](int i) { return shared + vector + i * slot; };
  const auto sums = [&](int i, int64_t block) {
    float* const p = base(i) + 2 * vector * block;
    return GradSums{p, p + vector};
  };
  const auto gradient = [&](int i) {
    float* const p = base(i) + 2 * vector * blocks.count;
    return Gradient{p, p + vector, p + 2 * vector, p + 3 * vector};
  };
  const Passes passes = passes_for(a.x.dtype, a.grad.dtype, a.dresidual.dtype);
  int64_t call_bytes = 0;
  const FeatureMap* const maps[] = {&a.grad, &a.x, &a.y, &a.dx, &a.dresidual};
  for (const FeatureMap* m : maps) call_bytes += map_bytes(*m, s);
  const bool past = past_caches(a.dx, s, call_bytes) &&
                    (a.dresidual.ptr == nullptr || past_caches(a.dresidual, s, call_bytes));

  const auto spread_mean = [&](int64_t b, float* mean) {
    for (int64_t c = 0; c < C; ++c) mean[c] = a.stats[2 * (b * s.groups + c / width)];
  };

  const auto first = [&](int64_t b, int64_t i, int at) {
    char *grad = sample(a.grad, b), *y = sample(a.y, b), *x = sample(a.x, b);
    const float* mean = gradient(at).mean;
    if (s.channels_last) {
      const int64_t p = blocks.begin(i), step[3] = {a.grad.pixel, a.y.pixel, a.x.pixel};
      passes.sum_pixels(moved(grad, a.grad, p * step[0]), moved(y, a.y, p * step[1]),
                        moved(x, a.x, p * step[2]), step, blocks.length(i), mean, sums(at, i), C);
      return;
    }
    for (int64_t k = 0; k < blocks.count; ++k) {
      const int64_t p = blocks.begin(k);
      passes.sum_plane(moved(grad, a.grad, i * a.grad.channel + p),
                       moved(y, a.y, i * a.y.channel + p), moved(x, a.x, i * a.x.channel + p),
                       blocks.length(k), mean, sums(at, k), i);
    }
  };

  const auto middle = [&](int64_t b, int64_t g0, int64_t g1, int at) {
    const int64_t begin = g0 * width, end = g1 * width;
    const Gradient f = gradient(at);
    double* const plain = totals + 2 * b * vector;
    double* const product = plain + vector;
    for (int64_t c = begin; c < end; ++c) plain[c] = product[c] = 0.;
    for (int64_t i = 0; i < blocks.count; ++i) {
      const GradSums t = sums(at, i);
      for (int64_t c = begin; c < end; ++c) {
        plain[c] += static_cast<double>(t.plain[c]);
        product[c] += static_cast<double>(t.product[c]);
      }
    }
    const double n = static_cast<double>(blocks.pixels) * static_cast<double>(width);
    for (int64_t g = g0; g < g1; ++g) {
      const double rstd = static_cast<double>(a.stats[2 * (b * s.groups + g) + 1]);
      double mean = 0., mean_x = 0.;
      for (int64_t c = g * width; c < (g + 1) * width; ++c) {
        const double w = static_cast<double>(weight[c]);
        product[c] *= rstd;
        mean += w * plain[c];
        mean_x += w * product[c];
      }
      mean /= n;
      mean_x /= n;
      for (int64_t c = g * width; c < (g + 1) * width; ++c) {
        f.scale[c] = static_cast<float>(rstd * static_cast<double>(weight[c]));
        f.constant[c] = static_cast<float>(rstd * mean);
        f.slope[c] = static_cast<float>(rstd * rstd * mean_x);
      }
    }
  };

  const auto last = [&](int64_t b, int64_t i, int at) {
    char *grad = sample(a.grad, b), *y = sample(a.y, b), *x = sample(a.x, b);
    char *dx = sample(a.dx, b), *dresidual = sample(a.dresidual, b);
    const Gradient f = gradient(at);
    if (!s.channels_last) {
      passes.plane(moved(grad, a.grad, i * a.grad.channel), moved(y, a.y, i * a.y.channel),
                   moved(x, a.x, i * a.x.channel), moved(dx, a.dx, i * a.dx.channel),
                   moved(dresidual, a.dresidual, i * a.dresidual.channel), f, past, i,
                   blocks.pixels);
    } else {
      const int64_t begin = blocks.begin(i), end = begin + blocks.length(i);
      for (int64_t p = begin; p < end; ++p)
        passes.pixel(moved(grad, a.grad, p * a.grad.pixel), moved(y, a.y, p * a.y.pixel),
                     moved(x, a.x, p * a.x.pixel), moved(dx, a.dx, p * a.dx.pixel),
                     moved(dresidual, a.dresidual, p * a.dresidual.pixel), f, past, C);
    }
    if (past) stream_fence();
  };
  over_samples(
      s, blocks, threads, [&](int64_t b, int at) { spread_mean(b, gradient(at).mean); }, first,
      middle, last);

  parallel_for(C, team_size(s.B * C, s.threads), [&](int64_t begin, int64_t end, int) {
    for (int64_t c = begin; c < end; ++c) {
      double dweight = 0., dbias = 0.;
      for (int64_t b = 0; b < s.B; ++b) {
        dbias += totals[2 * b * vector + c];
        dweight += totals[(2 * b + 1) * vector + c];
      }
      if (a.dweight.ptr != nullptr) put(a.dweight, c, static_cast<float>(dweight));
      if (a.dbias.ptr != nullptr) put(a.dbias, c, static_cast<float>(dbias));
    }
  });
}

}  // namespace VITFAST_ISA
}  // namespace vitfast
