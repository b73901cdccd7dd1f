// Backward of grn: x and the gradient are read twice.
//
// With P = sum of grad * x over positions, m = mean of g + eps and n = g / m:
//   dweight = n P and dbias = sum of grad, over images; dn = weight P;
//   dx = grad (1 + weight n) + x / g (dn / m - mean of (dn g) over channels / m^2).
#include "grn_rows.h"

namespace vitfast {
namespace VITFAST_ISA {
namespace {

// products[c] = P and plain[c] = the sum of grad, over rows [begin, end) of image b.
template <class TG, class TX>
void sums_of_rows(const Rows& grad, const Rows& x, int64_t b, int64_t begin, int64_t end,
                  float* products, float* plain, int64_t C) {
  for (int64_t c = 0; c < C; ++c) products[c] = plain[c] = 0.f;
  int64_t n = begin;
  for (; n + 4 <= end; n += 4) {
    const TG* const grads = at<TG>(grad, b, n);
    const TX* const rows = at<TX>(x, b, n);
    over(C, [&](int64_t c, int, auto span) VITFAST_INLINE {
      vf g[4], v[4];
      for (int k = 0; k < 4; ++k) {
        g[k] = load(grads + k * grad.inner + c, span);
        v[k] = load(rows + k * x.inner + c, span);
      }
      const vf product = fma(g[0], v[0], g[1] * v[1]) + fma(g[2], v[2], g[3] * v[3]);
      store(products + c, load(products + c, span) + product, span);
      store(plain + c, load(plain + c, span) + ((g[0] + g[1]) + (g[2] + g[3])), span);
    });
  }
  for (; n < end; ++n) {
    const TG* const grads = at<TG>(grad, b, n);
    const TX* const rows = at<TX>(x, b, n);
    over(C, [&](int64_t c, int, auto span) VITFAST_INLINE {
      const vf g = load(grads + c, span);
      store(products + c, fma(g, load(rows + c, span), load(products + c, span)), span);
      store(plain + c, load(plain + c, span) + g, span);
    });
  }
}

// The same of one planar row.
template <class TG, class TX>
void sums_of_row(const TG* grad, const TX* x, float* product, float* plain, int64_t N) {
  double products = 0., plains = 0.;
  for (int64_t n = 0; n < N; n += kStretch) {
    Sums of_products, of_grads;
    over(min(N - n, kStretch), [&](int64_t i, int slot, auto span) VITFAST_INLINE {
      const vf g = load(grad + n + i, span);
      of_products.v[slot] = fma(g, load(x + n + i, span), of_products.v[slot]);
      of_grads.v[slot] = of_grads.v[slot] + g;
    });
    products += of_products.total();
    plains += of_grads.total();
  }
  *product = static_cast<float>(products);
  *plain = static_cast<float>(plains);
}

// dx = grad + (grad * scale + x * along), where scale = weight n and along is x's factor.
template <class TG, class TX>
void write_row(const TG* grad, const TX* x, const float* scale, const float* along, TX* dx,
               bool past, int64_t C) {
  over(C, [&](int64_t c, int, auto span) VITFAST_INLINE {
    const vf g = load(grad + c, span);
    const vf through = load(x + c, span) * load(along + c, span);
    put(dx + c, g + fma(g, load(scale + c, span), through), span, past);
  });
}
template <class TG, class TX>
void write_planar_row(const TG* grad, const TX* x, float scale_, float along_, TX* dx, bool past,
                      int64_t N) {
  const vf scale = splat(scale_), along = splat(along_);
  over(N, [&](int64_t n, int, auto span) VITFAST_INLINE {
    const vf g = load(grad + n, span);
    put(dx + n, g + fma(g, scale, load(x + n, span) * along), span, past);
  });
}

// The factors of dx in one image, from P.
void factors(const float* norms, const float* weight, const double* products, float eps,
             float* scale, float* along, float* dweight, int64_t C) {
  const double reciprocal = reciprocal_mean(norms, eps, C);
  double mean = 0.;
  for (int64_t c = 0; c < C; ++c) {
    const double g = static_cast<double>(norms[c]);
    mean += static_cast<double>(weight[c]) * products[c] * g;
    scale[c] = weight[c] * static_cast<float>(g * reciprocal);
    dweight[c] = static_cast<float>(g * reciprocal * products[c]);
  }
  mean *= reciprocal / static_cast<double>(C);
  for (int64_t c = 0; c < C; ++c) {
    const double g = static_cast<double>(norms[c]);
    const double dn = static_cast<double>(weight[c]) * products[c];
    along[c] = g == 0. ? 0.f : static_cast<float>((dn - mean) * reciprocal / g);
  }
}

// out[c] = sum over images of sums[b * step + c].
void over_images(const float* sums, int64_t B, int64_t step, double* scratch, const Channels& out,
                 int64_t C) {
  add_up(sums, B, step, scratch, false, C);
  for (int64_t c = 0; c < C; ++c) put(out, c, static_cast<float>(scratch[c]));
}

template <class TG, class TX>
void backward(const GrnBackward& a) {
  const int64_t C = a.C;
  const Cut cut(a.planar, a.N, C);
  const int64_t elements = a.N * C, read = size_of(a.grad.dtype) + size_of(a.x.dtype);
  const bool past = past_cache(a.dx, a.B * elements * (read + size_of(a.dx.dtype)));
  const int threads = team_size(a.B * elements, a.threads);
  // A slot: partial sums, scale, along, and P in double.
  const int64_t vector = padded(C), slot_size = (2 * cut.partials + 4) * vector;
  const Scratch scratch((vector * (1 + 2 * a.B) + threads * slot_size) * 4);
  float* const shared = scratch.as<float>();
  float* const of_images = shared + vector;  // [B, 2, vector]: each one's dweight and dbias
  const float* weight = floats(a.weight, shared, C, 1.f);
  const auto of_slot = [&](int slot) { return shared + (1 + 2 * a.B) * vector + slot * slot_size; };

  each_image(
      a.B, cut.units, elements * read, threads, past,
      [&](int64_t b, int64_t unit, int slot) {
        float* const partials = of_slot(slot);
        if (a.planar)
          return sums_of_row(at<TG>(a.grad, b, unit), at<TX>(a.x, b, unit), partials + unit,
                             partials + vector + unit, a.N);
        float* const mine = partials + 2 * unit * vector;
        sums_of_rows<TG, TX>(a.grad, a.x, b, cut.begin(unit), cut.end(unit), mine, mine + vector,
                             C);
      },
      [&](int64_t b, int slot) {
        const float* const partials = of_slot(slot);
        float* const scale = of_slot(slot) + 2 * cut.partials * vector;
        double* const sums = reinterpret_cast<double*>(scale + 2 * vector);
        float* const dweight = of_images + 2 * b * vector;
        add_up(partials + vector, cut.partials, 2 * vector, sums, false, C);
        for (int64_t c = 0; c < C; ++c) dweight[vector + c] = static_cast<float>(sums[c]);
        add_up(partials, cut.partials, 2 * vector, sums, false, C);
        factors(a.norms + b * C, weight, sums, a.eps, scale, scale + vector, dweight, C);
      },
      [&](int64_t b, int64_t unit, int slot) {
        const float* const scale = of_slot(slot) + 2 * cut.partials * vector;
        const float* const along = scale + vector;
        if (a.planar)
          return write_planar_row(at<TG>(a.grad, b, unit), at<TX>(a.x, b, unit), scale[unit],
                                  along[unit], at<TX>(a.dx, b, unit), past, a.N);
        for (int64_t n = cut.begin(unit); n < cut.end(unit); ++n)
          write_row(at<TG>(a.grad, b, n), at<TX>(a.x, b, n), scale, along, at<TX>(a.dx, b, n), past,
                    C);
      });
  double* const sums = reinterpret_cast<double*>(of_slot(0));
  over_images(of_images, a.B, 2 * vector, sums, a.dweight, C);
  over_images(of_images + vector, a.B, 2 * vector, sums, a.dbias, C);
}

}  // namespace

void grn_backward(const GrnBackward& a) {
  const bool of_float = a.grad.dtype == DType::f32;
  if (a.x.dtype == DType::f32)
    of_float ? backward<float, float>(a) : backward<bf16_t, float>(a);
  else
    of_float ? backward<float, bf16_t>(a) : backward<bf16_t, bf16_t>(a);
}

}  // namespace VITFAST_ISA
}  // namespace vitfast
