// Backward of the norms: each row is read once; gradients of [C] vectors go through partial sums.
#include "norm_rows.h"

namespace vitfast {
namespace VITFAST_ISA {
namespace {

// One row as floats, and what the second pass needs of the first.
struct RowView {
  const float *grad, *residual, *grad_residual, *branch;  // null: absent
  float mean, rstd;
  float mean_grad, mean_grad_x;  // means of g * weight and of g * weight * normal
  float drop;

  // The same from channel c on.
  RowView from(int64_t c) const {
    const auto moved = [c](const float* p) { return p != nullptr ? p + c : nullptr; };
    RowView v = *this;
    v.grad = moved(grad), v.residual = moved(residual);
    v.grad_residual = moved(grad_residual), v.branch = moved(branch);
    return v;
  }
};

// grad * scale, in `to`.
const float* scaled(const float* grad, float scale, float* to, int64_t C) {
  const vf factor = splat(scale);
  over(C, [&](int64_t c, int, auto span)
              VITFAST_INLINE { store(to + c, load(grad + c, span) * factor, span); });
  return to;
}

// Means over the row; adds the row to the sums for weight and bias.
void first_pass(RowView& v, const float* weight, bool rms, float* dweight, float* dbias,
                int64_t C) {
  const vf mean = splat(v.mean), rstd = splat(v.rstd);
  Sums plain, product;
  over(C, [&](int64_t c, int slot, auto span) VITFAST_INLINE {
    const vf g = load(v.grad + c, span), gw = g * load(weight + c, span);
    const vf normal = keep((load(v.residual + c, span) - mean) * rstd, span);
    plain.v[slot] = plain.v[slot] + gw;
    product.v[slot] = fma(gw, normal, product.v[slot]);
    if (dweight != nullptr) store(dweight + c, fma(g, normal, load(dweight + c, span)), span);
    if (dbias != nullptr) store(dbias + c, load(dbias + c, span) + g, span);
  });
  v.mean_grad = rms ? 0.f : static_cast<float>(plain.total() / static_cast<double>(C));
  v.mean_grad_x = static_cast<float>(product.total() / static_cast<double>(C));
}

// Writes dx and dbranch; adds the row to the sum for gamma.
template <class TX, class TB>
void second_pass(const RowView& v, const float* weight, const float* scale, void* dx_,
                 void* dbranch_, float* dgamma, bool stream_x, bool stream_branch, int64_t C) {
  TX* dx = static_cast<TX*>(dx_);
  TB* dbranch = static_cast<TB*>(dbranch_);
  const vf mean = splat(v.mean), rstd = splat(v.rstd), drop = splat(v.drop);
  const vf mean_grad = splat(v.mean_grad), mean_grad_x = splat(v.mean_grad_x);
  over(C, [&](int64_t c, int, auto span) VITFAST_INLINE {
    vf d = v.grad_residual != nullptr ? load(v.grad_residual + c, span) : zero();
    if (v.grad != nullptr) {
      const vf gw = load(v.grad + c, span) * load(weight + c, span);
      const vf normal = (load(v.residual + c, span) - mean) * rstd;
      d = fma(rstd, gw - mean_grad - normal * mean_grad_x, d);
    }
    if (dx != nullptr) put(dx + c, d, span, stream_x);
    if (dbranch != nullptr)
      put(dbranch + c, scale != nullptr ? d * load(scale + c, span) : d, span, stream_branch);
    if (dgamma != nullptr)
      store(dgamma + c, fma(d * drop, load(v.branch + c, span), load(dgamma + c, span)), span);
  });
}

using SecondPass = void (*)(const RowView&, const float*, const float*, void*, void*, float*, bool,
                            bool, int64_t);

SecondPass second_pass_for(DType x, DType branch) {
  if (x == DType::f32)
    return branch == DType::f32 ? second_pass<float, float> : second_pass<float, bf16_t>;
  return branch == DType::f32 ? second_pass<bf16_t, float> : second_pass<bf16_t, bf16_t>;
}

// out[c] = sum of partials[block * step + c] over the blocks.
template <class T>
void reduce(const float* partials, int64_t blocks, int64_t step, T* out, int64_t C) {
  over(C, [&](int64_t c, int, auto span) VITFAST_INLINE {
    put(out + c, sum_blocks(partials + c, blocks, step, span), span, false);
  });
}

}  // namespace

void norm_backward(const NormBackward& a) {
  const int64_t C = a.C, rows = a.B * a.N;
  const bool norm = a.kind != NormKind::none, rms = a.kind == NormKind::rms;
  const SecondPass second_pass = second_pass_for(a.dx.dtype, a.dbranch.dtype);
  // The gradient of patches that no norm came after is the gradient itself, in another place.
  const Convert scatter =
      !norm && a.dx.H > 0 ? convert_for(a.grad_residual.dtype, a.dx.dtype) : nullptr;
  const bool branch_scaled = a.gamma.ptr != nullptr || a.drop_scale != nullptr;

  const auto bytes = [](const Rows& r) { return r.ptr != nullptr ? size_of(r.dtype) : 0; };
  const int64_t call_bytes = rows * C *
                             (bytes(a.grad_normed) + bytes(a.grad_residual) + bytes(a.residual) +
                              bytes(a.branch) + bytes(a.dx) + bytes(a.dbranch));
  const bool stream_x = past_cache(a.dx, call_bytes),
             stream_branch = past_cache(a.dbranch, call_bytes);

  const int64_t block_rows = block_of(rows), blocks = ceil_div(rows, block_rows);
  const Channels outputs[3] = {a.dgamma, a.dweight, a.dbias};
  int64_t slot[3], slots = 0;
  for (int k = 0; k < 3; ++k) slot[k] = outputs[k].ptr != nullptr ? slots++ : -1;

  const int64_t vector = padded(C);
  const int threads = team_size(rows * C, a.threads);
  const Scratch scratch(vector * 4 * (2 + 5 * threads + slots * blocks));
  float* const shared = scratch.as<float>();
  float* const partials = shared + vector * (2 + 5 * threads);
  const float* gamma = a.gamma.ptr != nullptr ? floats(a.gamma, shared, C, 1.f) : nullptr;
  const float* weight = norm ? floats(a.weight, shared + vector, C, 1.f) : nullptr;

  parallel_for(blocks, threads, [&](int64_t first, int64_t last, int thread) {
    float* const mine = shared + vector * (2 + 5 * thread);
    const float* scale = gamma;
    for (int64_t block = first; block < last; ++block) {
      float* const sums = partials + block * slots * vector;
      for (int64_t c = 0; c < slots * vector; ++c) sums[c] = 0.f;
      float* sum_of[3];
      for (int k = 0; k < 3; ++k) sum_of[k] = slot[k] >= 0 ? sums + slot[k] * vector : nullptr;
      const int64_t begin = block * block_rows, end = min(begin + block_rows, rows);
      int64_t b = begin / a.N, n = begin % a.N;
      bool new_sample = true;
      for (int64_t i = begin; i < end; ++i) {
        if (new_sample && a.drop_scale != nullptr)
          scale = sample_scale(gamma, a.drop_scale[b], mine + 4 * vector, C);
        const auto row = [&](const Rows& r, int k) {
          return r.ptr != nullptr ? floats(r, b, n, mine + k * vector, C) : nullptr;
        };
        RowView v = {};
        v.drop = a.drop_scale != nullptr ? a.drop_scale[b] : 1.f;
        if (scatter == nullptr) v.grad_residual = row(a.grad_residual, 0);
        if (a.dgamma.ptr != nullptr) v.branch = row(a.branch, 1);
        if (norm) {
          v.grad = row(a.grad_normed, 2);
          if (a.normed_scale != nullptr)
            v.grad = scaled(v.grad, a.normed_scale[b], mine + 2 * vector, C);
          v.residual = row(a.residual, 3);
          if (a.stats != nullptr) {
            v.mean = rms ? 0.f : a.stats[2 * i];
            v.rstd = a.stats[2 * i + 1];
          } else {
            const Moments m = moments(v.residual, C, row_sum(v.residual, C, rms), rms, a.eps,
                                      padded_quarters(a.residual, n));
            v.mean = m.mean - m.shift / m.rstd;
            v.rstd = m.rstd;
          }
          first_pass(v, weight, rms, sum_of[1], sum_of[2], C);
        }
        if (a.dx.H > 0) {
          const char* grad = scatter != nullptr ? at(a.grad_residual, b, n) : nullptr;
          stretches(a.dx, b, n, C, [&](void* pixel, int64_t c, int64_t length) {
            if (pixel == nullptr) return;
            if (scatter != nullptr)
              scatter(grad + c * size_of(a.grad_residual.dtype), pixel, stream_x, length);
            else
              second_pass(v.from(c), weight + c, nullptr, pixel, nullptr, nullptr, stream_x, false,
                          length);
          });
        } else {
          void* dx = a.dx.ptr != nullptr ? at(a.dx, b, n) : nullptr;
          void* dbranch = a.dbranch.ptr != nullptr ? at(a.dbranch, b, n) : nullptr;
          second_pass(v, weight, branch_scaled ? scale : nullptr, dx, dbranch, sum_of[0], stream_x,
                      stream_branch, C);
        }
        new_sample = ++n == a.N;
        if (new_sample) n = 0, ++b;
      }
    }
    if (stream_x || stream_branch) stream_fence();
  });

  // Columns are shared out in groups of whole cache lines.
  const int64_t group = 64, groups = ceil_div(C, group);
  const int team = team_size(slots * blocks * C, a.threads);
  for (int k = 0; k < 3; ++k) {
    if (slot[k] < 0) continue;
    const float* sums = partials + slot[k] * vector;
    parallel_for(groups, team, [&](int64_t first, int64_t last, int) {
      const int64_t c = first * group, size = min(last * group, C) - c;
      if (outputs[k].dtype == DType::f32)
        reduce(sums + c, blocks, slots * vector, static_cast<float*>(outputs[k].ptr) + c, size);
      else
        reduce(sums + c, blocks, slots * vector, static_cast<bf16_t*>(outputs[k].ptr) + c, size);
    });
  }
}

}  // namespace VITFAST_ISA
}  // namespace vitfast
