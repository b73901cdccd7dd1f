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

template <class TY>
void write_row(const float* row, const Moments& m, const float* weight, const float* bias, void* y_,
               bool stream_out, int64_t C) {
  TY* y = static_cast<TY*>(y_);
  const vf mean = splat(m.mean), rstd = splat(m.rstd), shift = splat(m.shift);
  over(C, [&](int64_t c, int, auto span) VITFAST_INLINE {
    const vf normal = fma(load(row + c, span) - mean, rstd, shift);
    put(y + c, fma(normal, load(weight + c, span), load(bias + c, span)), span, stream_out);
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
  const auto write = a.normed.dtype == DType::f32 ? write_row<float> : write_row<bf16_t>;

  const auto bytes = [](const Rows& r) { return r.ptr != nullptr ? size_of(r.dtype) : 0; };
  const int64_t call_bytes =
      rows * C * (bytes(a.x) + bytes(a.branch) + bytes(a.residual) + bytes(a.normed));
  const bool stream_residual = past_cache(a.residual, call_bytes);
  const bool stream_normed = past_cache(a.normed, call_bytes);
  // A float residual is read back from the row just written, unless that went past the caches.
  const bool copy = norm && add && (stream_residual || a.residual.dtype != DType::f32);

  const int64_t vector = align64(C * 4) / 4;
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
      const float* row;
      double sum = 0.;
      if (add) {
        void* residual = at(a.residual, b, n);
        sum = add_row(at(a.x, b, n), at(a.branch, b, n), scale, residual,
                      copy ? row_scratch : nullptr, stream_residual, C);
        row = copy ? row_scratch : static_cast<const float*>(residual);
      } else {
        row = floats(at(a.x, b, n), a.x.dtype, row_scratch, C);
        sum = row_sum(row, C, rms);
      }
      if (norm) {
        const Moments m = moments(row, C, sum, rms, a.eps);
        write(row, m, weight, bias, at(a.normed, b, n), stream_normed, C);
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
