// Bindings of linear_act: products, packed weights, the backward of bias and activation.
#include "cpu/gemm.h"
#include "arguments.h"
#include "cpu/linear_backward.h"
#include "module.h"
#include "replay.h"

namespace py = pybind11;

namespace vitfast {
namespace {

using GemmRowsArg = std::optional<std::tuple<uintptr_t, int, int64_t, int64_t, int64_t>>;

GemmRows gemm_rows(const GemmRowsArg& arg, int64_t m) {
  if (!arg) return {};
  const auto& [address, dtype, rows, outer, inner] = *arg;
  require(address != 0, "gemm: null address");
  require(rows > 0 && m % rows == 0, "gemm: rows must come in whole groups");
  return {reinterpret_cast<void*>(address), float_dtype(dtype, "gemm"), rows, outer, inner};
}

GemmVector gemm_vector(const ChannelsArg& arg) {
  const Channels found = channels(arg, "gemm");
  return {found.ptr, found.dtype};
}

Act gemm_act(int act) {
  require(act >= 0 && act <= static_cast<int>(Act::sigmoid), "gemm: unknown activation");
  return static_cast<Act>(act);
}

// address, address of the gate's, dtype, n, k, stride of n, stride of k
using GemmBArg = std::tuple<uintptr_t, uintptr_t, int, int64_t, int64_t, int64_t, int64_t>;

GemmB gemm_b(const GemmBArg& arg) {
  const auto& [b, gate, dtype, n, k, n_stride, k_stride] = arg;
  require(b != 0, "gemm: null address");
  require(n > 0 && k > 0, "gemm: sizes must be positive");
  return {reinterpret_cast<const void*>(b),
          reinterpret_cast<const void*>(gate),
          float_dtype(dtype, "gemm"),
          n,
          k,
          n_stride,
          k_stride};
}

void gemm_checked(int64_t m, int compute, const GemmRowsArg& a, bool a_transposed,
                  const GemmBArg& b, uintptr_t packed, const ChannelsArg& bias,
                  const ChannelsArg& gate_bias, int act, const GemmRowsArg& z,
                  const GemmRowsArg& gate_z, const ChannelsArg& gamma, const GemmRowsArg& residual,
                  const GemmRowsArg& out, int threads) {
  require(m > 0, "gemm: sizes must be positive");
  require(threads > 0, "gemm: threads must be positive");
  const Gemm g = {m,
                  float_dtype(compute, "gemm"),
                  gemm_rows(a, a_transposed ? 1 : m),
                  a_transposed,
                  gemm_b(b),
                  reinterpret_cast<const void*>(packed),
                  gemm_vector(bias),
                  gemm_vector(gate_bias),
                  gemm_act(act),
                  gemm_rows(z, m),
                  gemm_rows(gate_z, m),
                  gemm_vector(gamma),
                  gemm_rows(residual, m),
                  gemm_rows(out, m),
                  threads};
  require(g.a.ptr != nullptr && g.out.ptr != nullptr, "gemm: a or out is missing");
  require(g.a.dtype == g.compute, "gemm: a must have the dtype of the products");
  require(g.b.gate != nullptr || (g.gate_bias.ptr == nullptr && g.gate_z.ptr == nullptr),
          "gemm: gate_bias and gate_z go with a gate");
  gemm(g);
}

void gemm_pack_checked(const GemmBArg& b, int compute, uintptr_t packed, int threads) {
  require(packed != 0, "gemm_pack: null address");
  require(threads > 0, "gemm_pack: threads must be positive");
  gemm_pack(gemm_b(b), float_dtype(compute, "gemm"), reinterpret_cast<void*>(packed), threads);
}

void linear_backward_checked(int64_t m, int64_t n, int act, const GemmRowsArg& grad,
                             const GemmRowsArg& z, const GemmRowsArg& gate_z, const GemmRowsArg& dz,
                             const GemmRowsArg& dgate_z, uintptr_t dbias, uintptr_t dgate_bias,
                             int threads) {
  require(m > 0 && n > 0, "linear_backward: sizes must be positive");
  require(threads > 0, "linear_backward: threads must be positive");
  const LinearBackward a = {m,
                            n,
                            gemm_act(act),
                            gemm_rows(grad, m),
                            gemm_rows(z, m),
                            gemm_rows(gate_z, m),
                            gemm_rows(dz, m),
                            gemm_rows(dgate_z, m),
                            mutable_floats(dbias),
                            mutable_floats(dgate_bias),
                            threads};
  require(a.grad.ptr != nullptr, "linear_backward: grad is missing");
  for (const GemmRows& r : {a.z, a.gate_z, a.dz, a.dgate_z})
    require(r.ptr == nullptr || r.dtype == a.grad.dtype, "linear_backward: dtypes differ");
  require(a.z.ptr != nullptr || (a.act == Act::none && a.gate_z.ptr == nullptr),
          "linear_backward: z goes with an activation or a gate");
  require((a.gate_z.ptr == nullptr) == (a.dgate_z.ptr == nullptr),
          "linear_backward: dgate_z goes with gate_z");
  require(a.gate_z.ptr != nullptr || a.dgate_bias == nullptr,
          "linear_backward: dgate_bias goes with gate_z");
  linear_backward(a);
}

}  // namespace

void bind_gemm(py::module_& m, py::class_<Replay>& replay) {
  m.def("gemm", &gemm_checked, Release(),
        "See csrc/cpu/gemm.h. Rows are (address, dtype, rows of a group, outer stride, inner "
        "stride), vectors (address, dtype); None where absent. B is (address, address of the "
        "gate's or 0, dtype, n, k, stride of n, stride of k).");
  m.def("gemm_pack", &gemm_pack_checked, Release(), "See csrc/cpu/gemm.h.");
  m.def(
      "gemm_packed_bytes",
      [](const GemmBArg& b, int compute) {
        return gemm_packed_bytes(gemm_b(b), float_dtype(compute, "gemm"));
      },
      "Size of what gemm_pack writes.");
  m.def("linear_backward", &linear_backward_checked, Release(), "See csrc/cpu/linear_backward.h.");
  replay.def("gemm", recorded(&gemm_checked));
}

}  // namespace vitfast
