// Bindings of grn.
#include <initializer_list>

#include "arguments.h"
#include "cpu/grn.h"
#include "module.h"
#include "replay.h"

namespace py = pybind11;

namespace vitfast {
namespace {

void check_grn(std::initializer_list<Rows> maps) {
  for (const Rows& r : maps) {
    require(r.ptr != nullptr, "grn: a tensor is missing");
    require(r.H == 0, "grn: rows must be plain");
  }
}

void grn_forward_checked(bool planar, int64_t B, int64_t N, int64_t C, const RowsArg& x,
                         const RowsArg& y, const ChannelsArg& weight, const ChannelsArg& bias,
                         float eps, uintptr_t norms, int threads) {
  check_norm_sizes(B, N, C, threads);
  require(norms != 0, "grn_forward: norms are missing");
  const GrnForward a = {planar,
                        B,
                        N,
                        C,
                        rows(x),
                        rows(y),
                        channels(weight),
                        channels(bias),
                        eps,
                        reinterpret_cast<float*>(norms),
                        threads};
  check_grn({a.x, a.y});
  grn_forward(a);
}

void grn_backward_checked(bool planar, int64_t B, int64_t N, int64_t C, const RowsArg& grad,
                          const RowsArg& x, const RowsArg& dx, const ChannelsArg& weight,
                          const ChannelsArg& dweight, const ChannelsArg& dbias, float eps,
                          uintptr_t norms, int threads) {
  check_norm_sizes(B, N, C, threads);
  const GrnBackward a = {planar,
                         B,
                         N,
                         C,
                         rows(grad),
                         rows(x),
                         rows(dx),
                         channels(weight),
                         channels(dweight),
                         channels(dbias),
                         eps,
                         reinterpret_cast<const float*>(norms),
                         threads};
  check_grn({a.grad, a.x, a.dx});
  require(norms != 0 && a.dweight.ptr != nullptr && a.dbias.ptr != nullptr,
          "grn_backward: norms, dweight or dbias are missing");
  require(a.dx.dtype == a.x.dtype, "grn_backward: dx must have x's dtype");
  grn_backward(a);
}

void grn_accumulate_checked(int64_t N, int64_t C, const RowsArg& x, uintptr_t sums, bool adds,
                            int threads) {
  check_norm_sizes(1, N, C, threads);
  const GrnAccumulate a = {N, C, rows(x), reinterpret_cast<double*>(sums), adds, threads};
  check_grn({a.x});
  require(sums != 0, "grn_accumulate: sums are missing");
  grn_accumulate(a);
}

void grn_scale_checked(int64_t B, int64_t C, uintptr_t sums, const ChannelsArg& weight, float eps,
                       uintptr_t scale) {
  check_norm_sizes(B, 1, C, 1);
  require(sums != 0 && scale != 0, "grn_scale: sums or scale are missing");
  grn_scale({B, C, reinterpret_cast<const double*>(sums), channels(weight), eps,
             reinterpret_cast<float*>(scale)});
}

}  // namespace

void bind_grn(py::module_& m, py::class_<Replay>& replay) {
  m.def("grn_forward", &grn_forward_checked, Release(),
        "See csrc/cpu/grn.h. Rows and channel vectors as for norm_forward.");
  m.def("grn_backward", &grn_backward_checked, Release(), "See csrc/cpu/grn.h.");
  m.def("grn_accumulate", &grn_accumulate_checked, Release(), "See csrc/cpu/grn.h.");
  m.def("grn_scale", &grn_scale_checked, Release(), "See csrc/cpu/grn.h.");
  replay.def("grn_accumulate", recorded(&grn_accumulate_checked));
  replay.def("grn_scale", recorded(&grn_scale_checked));
}

}  // namespace vitfast
