// Bindings of the norms, norm_forward and norm_backward.
#include "cpu/norm.h"
#include "arguments.h"
#include "common/math.h"
#include "module.h"
#include "replay.h"

namespace py = pybind11;

namespace vitfast {
namespace {

// Whether these rows are patches of a map, as many as there are rows.
bool are_patches(const Rows& r, int64_t N, int64_t C) {
  if (r.H == 0) return false;
  require(N == common::ceil_div(r.H, 2) * common::ceil_div(r.W, 2) && C % 4 == 0,
          "norm: rows do not fit the map");
  return true;
}

void norm_forward_checked(int kind, int64_t B, int64_t N, int64_t C, const RowsArg& x,
                          const RowsArg& branch, const RowsArg& residual, const RowsArg& normed,
                          const ChannelsArg& gamma, const ChannelsArg& weight,
                          const ChannelsArg& bias, uintptr_t drop_scale, const RowsArg& base,
                          uintptr_t normed_scale, float eps, uintptr_t stats, int threads) {
  check_norm_sizes(B, N, C, threads);
  const NormForward a = {norm_kind(kind),
                         B,
                         N,
                         C,
                         rows(x),
                         rows(branch),
                         rows(residual),
                         rows(normed),
                         rows(base),
                         channels(gamma),
                         channels(weight),
                         channels(bias),
                         reinterpret_cast<const float*>(drop_scale),
                         reinterpret_cast<const float*>(normed_scale),
                         eps,
                         reinterpret_cast<float*>(stats),
                         threads};
  const bool add = a.branch.ptr != nullptr;
  require(a.x.ptr != nullptr, "norm_forward: x is missing");
  const bool none = a.kind == NormKind::none, map = are_patches(a.x, N, C);
  require((add || none) == (a.residual.ptr != nullptr),
          "norm_forward: residual goes with branch, or with no norm");
  require((a.kind == NormKind::none) == (a.normed.ptr == nullptr),
          "norm_forward: normed goes with a kind of norm");
  require(a.base.ptr == nullptr || !(add || none), "norm_forward: base goes with a norm of x");
  require(a.normed_scale == nullptr || a.base.ptr != nullptr,
          "norm_forward: normed_scale goes with base");
  require(!(map && add) && a.branch.H + a.residual.H + a.normed.H + a.base.H == 0,
          "norm_forward: a map may be x alone");
  require(!add || a.residual.dtype == DType::f32 ||
              (a.x.dtype == DType::bf16 && a.branch.dtype == DType::bf16),
          "norm_forward: residual must have the promoted dtype of x and branch");
  norm_forward(a);
}

void norm_backward_checked(int kind, int64_t B, int64_t N, int64_t C, const RowsArg& grad_normed,
                           const RowsArg& grad_residual, const RowsArg& residual,
                           const RowsArg& branch, const RowsArg& dx, const RowsArg& dbranch,
                           const ChannelsArg& gamma, const ChannelsArg& weight,
                           const ChannelsArg& dgamma, const ChannelsArg& dweight,
                           const ChannelsArg& dbias, uintptr_t drop_scale, uintptr_t normed_scale,
                           float eps, uintptr_t stats, int threads) {
  check_norm_sizes(B, N, C, threads);
  const NormBackward a = {norm_kind(kind),
                          B,
                          N,
                          C,
                          rows(grad_normed),
                          rows(grad_residual),
                          rows(residual),
                          rows(branch),
                          rows(dx),
                          rows(dbranch),
                          channels(gamma),
                          channels(weight),
                          channels(dgamma),
                          channels(dweight),
                          channels(dbias),
                          reinterpret_cast<const float*>(drop_scale),
                          reinterpret_cast<const float*>(normed_scale),
                          eps,
                          reinterpret_cast<const float*>(stats),
                          threads};
  const bool norm = a.kind != NormKind::none;
  require(norm == (a.grad_normed.ptr != nullptr) && norm == (a.residual.ptr != nullptr),
          "norm_backward: grad_normed and residual go with a kind of norm");
  require(norm || a.grad_residual.ptr != nullptr, "norm_backward: no incoming gradient");
  require(norm || (a.dweight.ptr == nullptr && a.dbias.ptr == nullptr),
          "norm_backward: dweight and dbias go with a kind of norm");
  require(a.dgamma.ptr == nullptr || a.branch.ptr != nullptr,
          "norm_backward: dgamma needs the branch");
  require(norm || a.normed_scale == nullptr, "norm_backward: normed_scale goes with a norm");
  const bool map = are_patches(a.dx, N, C);
  require(!norm || map == are_patches(a.residual, N, C), "norm_backward: dx is no map of residual");
  require(!map || (a.dbranch.ptr == nullptr && a.dgamma.ptr == nullptr),
          "norm_backward: a map has no branch");
  require(a.grad_normed.H + a.grad_residual.H + a.branch.H + a.dbranch.H == 0,
          "norm_backward: only residual and dx may be maps");
  norm_backward(a);
}

}  // namespace

void bind_norm(py::module_& m, py::class_<Replay>& replay) {
  m.def("norm_forward", &norm_forward_checked, Release(),
        "See csrc/cpu/norm.h. Rows are (address, dtype, outer stride, inner stride), of a map "
        "moreover (..., H, W, column stride), channel vectors (address, dtype); None where absent, "
        "0 for an absent address.");
  m.def("norm_backward", &norm_backward_checked, Release(), "See csrc/cpu/norm.h.");
  replay.def("norm_forward", recorded(&norm_forward_checked));
}

}  // namespace vitfast
