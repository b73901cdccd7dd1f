// Forward of grn: x is read twice, from the caches the second time where an image fits them.
#include "grn_rows.h"

namespace vitfast {
namespace VITFAST_ISA {
namespace {

// out[c] = sum of squares of channel c over rows [begin, end) of image b.
template <class T>
void squares(const Rows& x, int64_t b, int64_t begin, int64_t end, float* out, int64_t C) {
  for (int64_t c = 0; c < C; ++c) out[c] = 0.f;
  int64_t n = begin;
  for (; n + 8 <= end; n += 8) {
    const T* const rows = at<T>(x, b, n);
    over(C, [&](int64_t c, int, auto span) VITFAST_INLINE {
      vf sum[4];
      for (int k = 0; k < 4; ++k) {
        const vf v = load(rows + k * x.inner + c, span);
        const vf w = load(rows + (k + 4) * x.inner + c, span);
        sum[k] = fma(v, v, w * w);
      }
      store(out + c, load(out + c, span) + ((sum[0] + sum[1]) + (sum[2] + sum[3])), span);
    });
  }
  for (; n < end; ++n) {
    const T* const row = at<T>(x, b, n);
    over(C, [&](int64_t c, int, auto span) VITFAST_INLINE {
      const vf v = load(row + c, span);
      store(out + c, fma(v, v, load(out + c, span)), span);
    });
  }
}

// The same of one planar row.
template <class T>
float squares_of_row(const T* row, int64_t N) {
  double total = 0.;
  for (int64_t n = 0; n < N; n += kStretch) {
    Sums sums;
    over(min(N - n, kStretch), [&](int64_t i, int slot, auto span) VITFAST_INLINE {
      const vf v = load(row + n + i, span);
      sums.v[slot] = fma(v, v, sums.v[slot]);
    });
    total += sums.total();
  }
  return static_cast<float>(total);
}

// y = x + (x * scale + bias).
template <class TX, class TY>
void write_row(const TX* x, const float* scale, const float* bias, TY* y, bool past, int64_t C) {
  over(C, [&](int64_t c, int, auto span) VITFAST_INLINE {
    const vf v = load(x + c, span);
    put(y + c, v + fma(v, load(scale + c, span), load(bias + c, span)), span, past);
  });
}
template <class TX, class TY>
void write_planar_row(const TX* x, float scale_, float bias_, TY* y, bool past, int64_t N) {
  const vf scale = splat(scale_), bias = splat(bias_);
  over(N, [&](int64_t n, int, auto span) VITFAST_INLINE {
    const vf v = load(x + n, span);
    put(y + n, v + fma(v, scale, bias), span, past);
  });
}

template <class TX, class TY>
void forward(const GrnForward& a) {
  const int64_t C = a.C;
  const Cut cut(a.planar, a.N, C);
  const int64_t elements = a.N * C, bytes = size_of(a.x.dtype) + size_of(a.y.dtype);
  const bool past = past_cache(a.y, a.B * elements * bytes);
  const int threads = team_size(a.B * elements, a.threads);
  const int64_t vector = padded(C), slot_size = (cut.partials + 3) * vector;
  const Scratch scratch((2 * vector + threads * slot_size) * 4);
  float* const shared = scratch.as<float>();
  const float* weight = floats(a.weight, shared, C, 1.f);
  const float* bias = floats(a.bias, shared + vector, C, 0.f);
  const auto of_slot = [&](int slot) { return shared + 2 * vector + slot * slot_size; };

  each_image(
      a.B, cut.units, elements * size_of(a.x.dtype), threads, past,
      [&](int64_t b, int64_t unit, int slot) {
        float* const partials = of_slot(slot);
        if (a.planar)
          partials[unit] = squares_of_row(at<TX>(a.x, b, unit), a.N);
        else
          squares<TX>(a.x, b, cut.begin(unit), cut.end(unit), partials + unit * vector, C);
      },
      [&](int64_t b, int slot) {
        float* const scale = of_slot(slot) + cut.partials * vector;
        double* const sums = reinterpret_cast<double*>(scale + vector);
        float* const norms = a.norms + b * C;
        add_up(of_slot(slot), cut.partials, vector, sums, false, C);
        for (int64_t c = 0; c < C; ++c) norms[c] = static_cast<float>(__builtin_sqrt(sums[c]));
        const float reciprocal = static_cast<float>(reciprocal_mean(norms, a.eps, C));
        for (int64_t c = 0; c < C; ++c) scale[c] = weight[c] * (norms[c] * reciprocal);
      },
      [&](int64_t b, int64_t unit, int slot) {
        const float* const scale = of_slot(slot) + cut.partials * vector;
        if (a.planar)
          return write_planar_row(at<TX>(a.x, b, unit), scale[unit], bias[unit],
                                  at<TY>(a.y, b, unit), past, a.N);
        for (int64_t n = cut.begin(unit); n < cut.end(unit); ++n)
          write_row(at<TX>(a.x, b, n), scale, bias, at<TY>(a.y, b, n), past, C);
      });
}

}  // namespace

void grn_forward(const GrnForward& a) {
  const bool to_float = a.y.dtype == DType::f32;
  if (a.x.dtype == DType::f32)
    to_float ? forward<float, float>(a) : forward<float, bf16_t>(a);
  else
    to_float ? forward<bf16_t, float>(a) : forward<bf16_t, bf16_t>(a);
}

void grn_accumulate(const GrnAccumulate& a) {
  const Cut cut(false, a.N, a.C);
  const int64_t vector = padded(a.C);
  const Scratch scratch(cut.units * vector * 4);
  float* const partials = scratch.as<float>();
  parallel_for(cut.units, team_size(a.N * a.C, a.threads), [&](int64_t begin, int64_t end, int) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first = cut.begin(unit), last = cut.end(unit);
      if (a.x.dtype == DType::f32)
        squares<float>(a.x, 0, first, last, partials + unit * vector, a.C);
      else
        squares<bf16_t>(a.x, 0, first, last, partials + unit * vector, a.C);
    }
  });
  add_up(partials, cut.units, vector, a.sums, a.adds, a.C);
}

void grn_scale(const GrnScale& a) {
  const Scratch scratch(a.C * 4);
  const float* weight = floats(a.weight, scratch.as<float>(), a.C, 1.f);
  for (int64_t b = 0; b < a.B; ++b) {
    float* const scale = a.scale + b * a.C;
    const double* const sums = a.sums + b * a.C;
    for (int64_t c = 0; c < a.C; ++c) scale[c] = static_cast<float>(__builtin_sqrt(sums[c]));
    const float reciprocal = static_cast<float>(reciprocal_mean(scale, a.eps, a.C));
    for (int64_t c = 0; c < a.C; ++c) scale[c] = 1.f + weight[c] * (scale[c] * reciprocal);
  }
}

}  // namespace VITFAST_ISA
}  // namespace vitfast
