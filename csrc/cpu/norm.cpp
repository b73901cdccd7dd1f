// Forward of the norms: one pass over memory, the row staying in the first-level cache.
#include "norm_rows.h"

namespace vitfast {
namespace VITFAST_ISA {
namespace {

// residual = x + scale * branch. Leaves its floats in `copy` where that is given, and returns their
// sum, or their sum of squares.
template <class TX, class TB, class TR, bool Square>
double add_row(const void* x_, const void* branch_, const float* scale, void* residual_,
               float* copy, bool stream_out, int64_t C) {
  const TX* x = static_cast<const TX*>(x_);
  const TB* branch = static_cast<const TB*>(branch_);
  TR* residual = static_cast<TR*>(residual_);
  Sums sums;
  over(C, [&](int64_t c, int slot, auto span) VITFAST_INLINE {
    const vf add = load(branch + c, span), base = load(x + c, span);
    const vf exact = scale != nullptr ? fma(add, load(scale + c, span), base) : base + add;
    const vf r = keep(put(residual + c, exact, span, stream_out), span);
    if (copy != nullptr) store(copy + c, r, span);
    sums.v[slot] = Square ? fma(r, r, sums.v[slot]) : sums.v[slot] + r;
  });
  return sums.total();
}

// y = normal * weight + bias, or base + scale times that.
template <class TY, bool Based>
void write_row(const float* row, const Moments& m, const float* weight, const float* bias,
               const float* base, float scale_, void* y_, bool stream_out, int64_t C) {
  TY* y = static_cast<TY*>(y_);
  const vf mean = splat(m.mean), rstd = splat(m.rstd), shift = splat(m.shift);
  const vf scale = splat(scale_);
  over(C, [&](int64_t c, int, auto span) VITFAST_INLINE {
    const vf normal = fma(load(row + c, span) - mean, rstd, shift);
    vf exact = fma(normal, load(weight + c, span), load(bias + c, span));
    if constexpr (Based) exact = fma(exact, scale, load(base + c, span));
    put(y + c, exact, span, stream_out);
  });
}

using WriteRow = void (*)(const float*, const Moments&, const float*, const float*, const float*,
                          float, void*, bool, int64_t);

WriteRow write_row_for(DType y, bool based) {
  if (y == DType::f32) return based ? write_row<float, true> : write_row<float, false>;
  return based ? write_row<bf16_t, true> : write_row<bf16_t, false>;
}

// The row as it is, in another dtype and place.
void copy_row(const Rows& from, const Rows& to, int64_t b, int64_t n, bool stream_out, int64_t C) {
  const Convert copy = convert_for(from.dtype, to.dtype);
  char* const row = at(to, b, n);
  stretches(from, b, n, C, [&](const void* pixel, int64_t c, int64_t length) {
    if (pixel != nullptr)
      copy(pixel, row + c * size_of(to.dtype), stream_out, length);
    else
      std::memset(row + c * size_of(to.dtype), 0, length * size_of(to.dtype));
  });
}

using AddRow = double (*)(const void*, const void*, const float*, void*, float*, bool, int64_t);

template <bool Square>
AddRow add_row_for(DType x, DType branch, DType residual) {
  const bool xf = x == DType::f32, bf = branch == DType::f32;
  if (residual != DType::f32) return add_row<bf16_t, bf16_t, bf16_t, Square>;
  if (xf && bf) return add_row<float, float, float, Square>;
  if (xf) return add_row<float, bf16_t, float, Square>;
  if (bf) return add_row<bf16_t, float, float, Square>;
  return add_row<bf16_t, bf16_t, float, Square>;
}

}  // namespace

void norm_forward(const NormForward& a) {
  const int64_t C = a.C, rows = a.B * a.N;
  const bool add = a.branch.ptr != nullptr, rms = a.kind == NormKind::rms;
  const bool norm = a.kind != NormKind::none;
  const AddRow add_row = rms ? add_row_for<true>(a.x.dtype, a.branch.dtype, a.residual.dtype)
                             : add_row_for<false>(a.x.dtype, a.branch.dtype, a.residual.dtype);
  const WriteRow write = write_row_for(a.normed.dtype, a.base.ptr != nullptr);

  const auto bytes = [](const Rows& r) { return r.ptr != nullptr ? size_of(r.dtype) : 0; };
  const int64_t call_bytes =
      rows * C *
      (bytes(a.x) + bytes(a.branch) + bytes(a.base) + bytes(a.residual) + bytes(a.normed));
  // A patch's row is written in four parts.
  const bool whole_parts = a.x.H == 0 || C / 4 % kLanes == 0;
  const bool stream_residual = whole_parts && past_cache(a.residual, call_bytes);
  const bool stream_normed = past_cache(a.normed, call_bytes);
  // A float residual is read back from the row just written, unless that went past the caches.
  const bool copy = norm && add && (stream_residual || a.residual.dtype != DType::f32);

  const int64_t vector = padded(C);
  const int threads = team_size(rows * C, a.threads);
  const Scratch scratch(vector * 4 * (3 + 2 * threads));
  float* const shared = scratch.as<float>();
  const float* gamma = a.gamma.ptr != nullptr ? floats(a.gamma, shared, C, 1.f) : nullptr;
  const float* weight = norm ? floats(a.weight, shared + vector, C, 1.f) : nullptr;
  const float* bias = norm ? floats(a.bias, shared + 2 * vector, C, 0.f) : nullptr;

  parallel_for(rows, threads, [&](int64_t begin, int64_t end, int thread) {
    float* const row_scratch = shared + vector * (3 + 2 * thread);
    float* const scale_scratch = row_scratch + vector;
    const float* scale = gamma;
    int64_t b = begin / a.N, n = begin % a.N;
    bool new_sample = true;
    for (int64_t i = begin; i < end; ++i) {
      if (new_sample && a.drop_scale != nullptr)
        scale = sample_scale(gamma, a.drop_scale[b], scale_scratch, C);
      const float* row = nullptr;
      double sum = 0.;
      if (add) {
        void* residual = at(a.residual, b, n);
        sum = add_row(at(a.x, b, n), at(a.branch, b, n), scale, residual,
                      copy ? row_scratch : nullptr, stream_residual, C);
        row = copy ? row_scratch : static_cast<const float*>(residual);
      } else if (norm) {
        row = floats(a.x, b, n, row_scratch, C);
        sum = row_sum(row, C, rms);
      } else {
        copy_row(a.x, a.residual, b, n, stream_residual, C);
      }
      if (norm) {
        const Moments m = moments(row, C, sum, rms, a.eps, padded_quarters(a.x, n));
        const float* base =
            a.base.ptr != nullptr ? floats(a.base, b, n, scale_scratch, C) : nullptr;
        const float scale_of_norm = a.normed_scale != nullptr ? a.normed_scale[b] : 1.f;
        write(row, m, weight, bias, base, scale_of_norm, at(a.normed, b, n), stream_normed, C);
        if (a.stats != nullptr) {
          a.stats[2 * i] = m.mean - m.shift / m.rstd;
          a.stats[2 * i + 1] = m.rstd;
        }
      }
      new_sample = ++n == a.N;
      if (new_sample) n = 0, ++b;
    }
    if (stream_residual || stream_normed) stream_fence();
  });
}

}  // namespace VITFAST_ISA
}  // namespace vitfast
