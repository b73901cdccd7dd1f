// Bindings of attention.
#include <array>

#include "arguments.h"
#include "cpu/attention.h"
#include "module.h"
#include "replay.h"

namespace py = pybind11;

namespace vitfast {
namespace {

using AttnView = std::tuple<uintptr_t, int64_t, int64_t, int64_t, int64_t>;  // sb, sn, sh, sd
using AttnAddend = std::optional<std::tuple<uintptr_t, int, int64_t, int64_t, int64_t, int64_t>>;
// dtype, (B, H, Nq, Nk, D), scale, causal, q, k, v, mask, bias
using AttnProblem = std::tuple<int, std::array<int64_t, 5>, float, bool, AttnView, AttnView,
                               AttnView, AttnAddend, AttnAddend>;
// norm, eps, (q_weight, q_bias, k_weight, k_bias), rope, (rope_sb, rope_sh, rope_sn), prefix, half
using AttnFour = std::array<uintptr_t, 4>;
using AttnQk = std::optional<
    std::tuple<int, float, AttnFour, uintptr_t, std::array<int64_t, 3>, int64_t, bool>>;

AttnTensor attn_tensor(const AttnView& v) {
  const auto& [address, sb, sn, sh, sd] = v;
  require(address != 0, "attention: null address");
  require(sb >= 0 && sn >= 0 && sh >= 0 && sd >= 0, "attention: negative stride");
  return {reinterpret_cast<void*>(address), sb, sn, sh, sd};
}

AttnTensor attn_gradient(const AttnView& v) {
  require(std::get<4>(v) == 1, "attention: the last stride of a gradient must be 1");
  return attn_tensor(v);
}

AttnAdd attn_addend(const AttnAddend& a) {
  if (!a) return {};
  const auto& [address, dtype, sb, sh, sq, sk] = *a;
  require(address != 0, "attention: null address of mask or bias");
  require(dtype == 0 || dtype == 1 || dtype == 3, "attention: unknown dtype of mask or bias");
  require(sb >= 0 && sh >= 0 && sq >= 0 && sk >= 0, "attention: negative stride");
  return {reinterpret_cast<const void*>(address), dtype, sb, sh, sq, sk};
}

AttnPrologue attn_prologue(const AttnQk& arg, const AttnArgs& a) {
  if (!arg) return {};
  const auto& [norm, eps, affine, rope, strides, prefix, half] = *arg;
  const auto& [qw, qb, kw, kb] = affine;
  const auto& [sb, sh, sn] = strides;
  require(norm >= 0 && norm <= 2, "attention: unknown q/k norm");
  require(norm == 0 || eps > 0, "attention: eps must be positive");
  require(norm != 0 || (qw | qb | kw | kb) == 0, "attention: norm weights without a norm");
  require(norm != 2 || (qb | kb) == 0, "attention: an RMS norm has no bias");
  require(rope == 0 || a.D % 2 == 0, "attention: rope needs an even head dim");
  require(rope == 0 || a.Nq == a.Nk, "attention: rope needs as many queries as keys");
  require(prefix >= 0 && prefix <= a.Nq, "attention: rope prefix out of range");
  require(sb >= 0 && sh >= 0 && sn >= 0, "attention: negative stride of rope");
  return {norm,         eps, floats(qw), floats(qb), floats(kw), floats(kb),
          floats(rope), sb,  sh,         sn,         prefix,     half};
}

AttnArgs attn_args(const AttnProblem& problem, const AttnQk& prologue, const AttnView& out,
                   uintptr_t stats, int threads) {
  const auto& [dtype, sizes, scale, causal, q, k, v, mask, bias] = problem;
  require(threads > 0, "attention: threads must be positive");
  for (const int64_t size : sizes) require(size > 0, "attention: sizes must be positive");
  AttnArgs a{};
  a.dtype = float_dtype(dtype, "attention");
  a.B = sizes[0];
  a.H = sizes[1];
  a.Nq = sizes[2];
  a.Nk = sizes[3];
  a.D = sizes[4];
  require(a.D <= 256, "attention: head dim must be at most 256");
  a.scale = scale;
  a.causal = causal;
  a.q = attn_tensor(q);
  a.k = attn_tensor(k);
  a.v = attn_tensor(v);
  a.out = attn_tensor(out);
  a.stats = mutable_floats(stats);
  a.mask = attn_addend(mask);
  a.bias = attn_addend(bias);
  a.pro = attn_prologue(prologue, a);
  a.threads = threads;
  return a;
}

void attention_forward_checked(const AttnProblem& problem, const AttnQk& prologue,
                               const AttnView& out, uintptr_t stats, int threads) {
  attention_forward(attn_args(problem, prologue, out, stats, threads));
}

void attention_backward_checked(const AttnProblem& problem, const AttnQk& prologue,
                                const AttnView& out, uintptr_t stats, const AttnView& dout,
                                const AttnView& dq, const AttnView& dk, const AttnView& dv,
                                uintptr_t dbias, const AttnFour& daffine, int threads) {
  const AttnArgs a = attn_args(problem, prologue, out, stats, threads);
  require(stats != 0, "attention_backward: stats are missing");
  require(dbias == 0 || a.bias.ptr != nullptr, "attention_backward: dbias without a bias");
  const AttnGrads g = {attn_tensor(dout),
                       attn_gradient(dq),
                       attn_gradient(dk),
                       attn_gradient(dv),
                       mutable_floats(dbias),
                       a.Nq * a.Nk,
                       a.Nk,
                       1,
                       mutable_floats(daffine[0]),
                       mutable_floats(daffine[1]),
                       mutable_floats(daffine[2]),
                       mutable_floats(daffine[3])};
  attention_backward(a, g);
}

}  // namespace

void bind_attention(py::module_& m, py::class_<Replay>& replay) {
  m.def("attention_forward", &attention_forward_checked, Release(),
        "See csrc/cpu/attention.h. Tensors are (address, strides of B, N, H, D), mask and bias "
        "(address, dtype, strides of B, H, Nq, Nk); None where absent, 0 for an absent address.");
  m.def("attention_backward", &attention_backward_checked, Release(),
        "See csrc/cpu/attention.h. dbias is [H, Nq, Nk], contiguous.");
  replay.def("attention_forward", recorded(&attention_forward_checked));
}

}  // namespace vitfast
