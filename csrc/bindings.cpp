// vitfast._native: with the files beside it all that knows pybind11. One `bind_<op>` section per op.
//
// Tensors arrive as addresses (uintptr_t), sizes and strides in elements; the Python side has
// checked them. Kernels run without the GIL: what Python passes for an address (address.h) keeps
// what lies there for as long as the call lasts.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "address.h"
#include "common/pages.h"
#include "common/scratch.h"
#include "cpu/attention.h"
#include "cpu/dwconv.h"
#include "cpu/gemm.h"
#include "cpu/grn.h"
#include "cpu/group_norm.h"
#include "cpu/isa.h"
#include "cpu/linear_backward.h"
#include "cpu/norm.h"
#include "cpu/patchify.h"
#include "cpu/window.h"
#include "state.h"

namespace py = pybind11;
using namespace vitfast;

namespace {

using Release = py::call_guard<py::gil_scoped_release>;

// ---- isa and build facts ------------------------------------------------------------------------

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = std::string("Clang ") + __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = std::string("GCC ") + __VERSION__;
#elif defined(_MSC_VER)
  info["compiler"] = "MSVC " + std::to_string(_MSC_VER);
#endif
#if defined(VITFAST_X86)
  info["isas"] = std::vector<std::string>{"baseline", "avx2", "avx512", "avx512_bf16"};
#else
  info["isas"] = std::vector<std::string>{"baseline"};
#endif
#if defined(_OPENMP)
  info["openmp"] = _OPENMP;
#else
  info["openmp"] = py::none();
#endif
  info["cuda"] = false;
  return info;
}

void bind_isa(py::module_& m) {
  m.def("best_isa", [] { return static_cast<int>(best_isa()); },
        "Highest instruction set of this CPU and build, as an index into ISA_LEVELS.");
  m.def("selected_isa", [] { return static_cast<int>(selected_isa()); },
        "Instruction set that kernels run with.");
  m.def(
      "select_isa",
      [](int level) {
        if (level < 0) throw std::invalid_argument("instruction set levels start at 0");
        select_isa(static_cast<Isa>(level));
      },
      py::arg("level"), "Lower the instruction set; ValueError above best_isa().");
  m.def("build_info", &build_info, "Compiler, instruction sets, OpenMP version, CUDA or not.");
}

// ---- norm ---------------------------------------------------------------------------------------

// address, dtype, outer, inner; of a map moreover H, W, column
using PlainArg = std::tuple<uintptr_t, int, int64_t, int64_t>;
using MapArg = std::tuple<uintptr_t, int, int64_t, int64_t, int64_t, int64_t, int64_t>;
using RowsArg = std::optional<std::variant<PlainArg, MapArg>>;
using ChannelsArg = std::optional<std::tuple<uintptr_t, int>>;

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

DType float_dtype(int code) {
  require(code == static_cast<int>(DType::f32) || code == static_cast<int>(DType::bf16),
          "norm: dtype code must be that of float32 or bfloat16");
  return static_cast<DType>(code);
}

Rows rows(const RowsArg& arg) {
  if (!arg) return {};
  if (const PlainArg* plain = std::get_if<PlainArg>(&*arg)) {
    const auto& [address, dtype, outer, inner] = *plain;
    require(address != 0, "norm: null address");
    return {reinterpret_cast<void*>(address), float_dtype(dtype), outer, inner};
  }
  const auto& [address, dtype, outer, inner, H, W, column] = std::get<MapArg>(*arg);
  require(address != 0, "norm: null address");
  require(H > 0 && W > 0, "norm: a map's sizes must be positive");
  return {reinterpret_cast<void*>(address), float_dtype(dtype), outer, inner, H, W, column};
}

// Whether these rows are patches of a map, as many as there are rows.
bool are_patches(const Rows& r, int64_t N, int64_t C) {
  if (r.H == 0) return false;
  require(N == (r.H + 1) / 2 * ((r.W + 1) / 2) && C % 4 == 0, "norm: rows do not fit the map");
  return true;
}

Channels channels(const ChannelsArg& arg) {
  if (!arg) return {};
  const auto& [address, dtype] = *arg;
  require(address != 0, "norm: null address");
  return {reinterpret_cast<void*>(address), float_dtype(dtype)};
}

NormKind norm_kind(int kind) {
  require(kind >= 0 && kind <= 2, "norm: kind must be 0 (layer), 1 (rms) or 2 (none)");
  return static_cast<NormKind>(kind);
}

void check_norm_sizes(int64_t B, int64_t N, int64_t C, int threads) {
  require(B > 0 && N > 0 && C > 0, "norm: sizes must be positive");
  require(threads > 0, "norm: threads must be positive");
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

void bind_norm(py::module_& m) {
  m.def("norm_forward", &norm_forward_checked, Release(),
        "See csrc/cpu/norm.h. Rows are (address, dtype, outer stride, inner stride), of a map "
        "moreover (..., H, W, column stride), channel vectors (address, dtype); None where absent, "
        "0 for an absent address.");
  m.def("norm_backward", &norm_backward_checked, Release(), "See csrc/cpu/norm.h.");
}

// ---- grn ----------------------------------------------------------------------------------------

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
  const GrnForward a = {planar,         B,   N, C, rows(x), rows(y), channels(weight),
                        channels(bias), eps, reinterpret_cast<float*>(norms), threads};
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

void bind_grn(py::module_& m) {
  m.def("grn_forward", &grn_forward_checked, Release(),
        "See csrc/cpu/grn.h. Rows and channel vectors as for norm_forward.");
  m.def("grn_backward", &grn_backward_checked, Release(), "See csrc/cpu/grn.h.");
  m.def("grn_accumulate", &grn_accumulate_checked, Release(), "See csrc/cpu/grn.h.");
  m.def("grn_scale", &grn_scale_checked, Release(), "See csrc/cpu/grn.h.");
}

// ---- dwconv_norm --------------------------------------------------------------------------------

// (B, H, W, C), (kh, kw), threads
using DwconvSizesArg = std::tuple<std::array<int64_t, 4>, std::array<int64_t, 2>, int>;
// address, dtype, strides of B, H, W, C, rounded
using DwconvMapArg = std::tuple<uintptr_t, int, std::array<int64_t, 4>, bool>;

DwconvSizes dwconv_sizes(const DwconvSizesArg& arg) {
  const auto& [sizes, kernel, threads] = arg;
  for (const int64_t size : sizes) require(size > 0, "dwconv: sizes must be positive");
  for (const int64_t k : kernel)
    require(k > 0 && k <= kDwconvWidest && k % 2 == 1, "dwconv: kernel out of range");
  require(threads > 0, "dwconv: threads must be positive");
  return {sizes[0], sizes[1], sizes[2], sizes[3], kernel[0], kernel[1], threads};
}

DwconvMap dwconv_map(const DwconvMapArg& arg) {
  const auto& [address, dtype, strides, rounded] = arg;
  require(address != 0, "dwconv: null address");
  return {reinterpret_cast<const void*>(address), float_dtype(dtype), strides[0], strides[1],
          strides[2], strides[3], rounded};
}

void dwconv_forward_checked(const DwconvSizesArg& sizes, int kind, const DwconvMapArg& x,
                            const ChannelsArg& weight, bool rounded, bool flipped, const ChannelsArg& bias,
                            const ChannelsArg& norm_weight, const ChannelsArg& norm_bias, float eps,
                            const std::array<int64_t, 2>& lines, const ChannelsArg& y,
                            uintptr_t stats) {
  const Channels out = channels(y);
  const DwconvForward a = {dwconv_sizes(sizes),
                           norm_kind(kind),
                           dwconv_map(x),
                           channels(weight),
                           rounded,
                           flipped,
                           channels(bias),
                           channels(norm_weight),
                           channels(norm_bias),
                           eps,
                           lines[0],
                           lines[1],
                           out.ptr,
                           out.dtype,
                           reinterpret_cast<float*>(stats)};
  require(a.weight.ptr != nullptr && a.y != nullptr, "dwconv_forward: weight or y is missing");
  require(0 <= a.first && a.first < a.last && a.last <= a.size.H,
          "dwconv_forward: lines out of range");
  dwconv_forward(a);
}

void dwconv_weight_grad_checked(const DwconvSizesArg& sizes, const DwconvMapArg& x,
                                const DwconvMapArg& grad, const ChannelsArg& weight,
                                const ChannelsArg& bias) {
  dwconv_weight_grad({dwconv_sizes(sizes), dwconv_map(x), dwconv_map(grad), channels(weight),
                      channels(bias)});
}

void bind_dwconv(py::module_& m) {
  m.def("dwconv_forward", &dwconv_forward_checked, Release(),
        "See csrc/cpu/dwconv.h. Sizes are ((B, H, W, C), (kh, kw), threads), maps (address, "
        "dtype, strides, rounded), vectors, weight and y (address, dtype); None where absent.");
  m.def("dwconv_weight_grad", &dwconv_weight_grad_checked, Release(), "See csrc/cpu/dwconv.h.");
}

// ---- group_norm ---------------------------------------------------------------------------------

// address, dtype, strides of sample, channel, line, pixel
using FeatureMapArg = std::optional<std::tuple<uintptr_t, int, int64_t, int64_t, int64_t, int64_t>>;
// (B, C, H, W, groups), channels_last, relu, eps, threads
using GroupNormArg = std::tuple<std::array<int64_t, 5>, bool, bool, double, int>;

GroupNormShape group_norm_shape(const GroupNormArg& arg) {
  const auto& [sizes, channels_last, relu, eps, threads] = arg;
  for (const int64_t size : sizes) require(size > 0, "group_norm: sizes must be positive");
  const auto [B, C, H, W, groups] = sizes;
  require(C % groups == 0, "group_norm: groups must divide the channels");
  require(threads > 0, "group_norm: threads must be positive");
  return {B, C, H, W, groups, channels_last, relu, eps, threads};
}

FeatureMap feature_map(const FeatureMapArg& arg, const GroupNormShape& s, bool loose_lines) {
  if (!arg) return {};
  const auto& [address, dtype, sample, channel, line, pixel] = *arg;
  require(address != 0, "group_norm: null address");
  require(sample >= 0 && channel >= 0 && line >= 0 && pixel >= 0, "group_norm: negative stride");
  require(s.channels_last ? channel == 1 : pixel == 1, "group_norm: a map of another layout");
  require(line == s.W * pixel || (s.channels_last && loose_lines),
          "group_norm: lines of this map must follow each other");
  return {reinterpret_cast<void*>(address), float_dtype(dtype), sample, channel, line, pixel};
}

void group_norm_forward_checked(const GroupNormArg& shape, const FeatureMapArg& x,
                                const FeatureMapArg& residual, const FeatureMapArg& y,
                                const ChannelsArg& weight, const ChannelsArg& bias,
                                uintptr_t stats) {
  const GroupNormShape s = group_norm_shape(shape);
  require(x && y, "group_norm_forward: x or y is missing");
  group_norm_forward({s, feature_map(x, s, false), feature_map(residual, s, false),
                      feature_map(y, s, true), channels(weight), channels(bias),
                      reinterpret_cast<float*>(stats)});
}

void group_norm_backward_checked(const GroupNormArg& shape, const FeatureMapArg& grad,
                                 const FeatureMapArg& x, const FeatureMapArg& y,
                                 const FeatureMapArg& dx, const FeatureMapArg& dresidual,
                                 const ChannelsArg& weight, const ChannelsArg& dweight,
                                 const ChannelsArg& dbias, uintptr_t stats) {
  const GroupNormShape s = group_norm_shape(shape);
  require(grad && x && dx && stats != 0, "group_norm_backward: grad, x, dx or stats are missing");
  require(s.relu == y.has_value(), "group_norm_backward: y goes with ReLU");
  const GroupNormBackward a = {s,
                               feature_map(grad, s, false),
                               feature_map(x, s, false),
                               feature_map(y, s, false),
                               feature_map(dx, s, false),
                               feature_map(dresidual, s, false),
                               channels(weight),
                               channels(dweight),
                               channels(dbias),
                               reinterpret_cast<const float*>(stats)};
  require(a.y.ptr == nullptr || a.y.dtype == a.grad.dtype,
          "group_norm_backward: y and grad must have one dtype");
  require(a.dx.dtype == a.x.dtype, "group_norm_backward: dx must have x's dtype");
  group_norm_backward(a);
}

void bind_group_norm(py::module_& m) {
  m.def("group_norm_forward", &group_norm_forward_checked, Release(),
        "See csrc/cpu/group_norm.h. Maps are (address, dtype, strides of sample, channel, line, "
        "pixel), channel vectors (address, dtype); None where absent, 0 for an absent address.");
  m.def("group_norm_backward", &group_norm_backward_checked, Release(),
        "See csrc/cpu/group_norm.h.");
}

// ---- attention ----------------------------------------------------------------------------------

using AttnView = std::tuple<uintptr_t, int64_t, int64_t, int64_t, int64_t>;  // sb, sn, sh, sd
using AttnAddend = std::optional<std::tuple<uintptr_t, int, int64_t, int64_t, int64_t, int64_t>>;
// dtype, (B, H, Nq, Nk, D), scale, causal, q, k, v, mask, bias
using AttnProblem = std::tuple<int, std::array<int64_t, 5>, float, bool, AttnView, AttnView,
                               AttnView, AttnAddend, AttnAddend>;
// norm, eps, (q_weight, q_bias, k_weight, k_bias), rope, (rope_sb, rope_sh, rope_sn), prefix, half
using AttnFour = std::array<uintptr_t, 4>;
using AttnQk = std::optional<
    std::tuple<int, float, AttnFour, uintptr_t, std::array<int64_t, 3>, int64_t, bool>>;

const float* floats(uintptr_t address) { return reinterpret_cast<const float*>(address); }
float* mutable_floats(uintptr_t address) { return reinterpret_cast<float*>(address); }

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
  return {norm, eps, floats(qw), floats(qb), floats(kw), floats(kb), floats(rope), sb, sh, sn,
          prefix, half};
}

AttnArgs attn_args(const AttnProblem& problem, const AttnQk& prologue, const AttnView& out,
                   uintptr_t stats, int threads) {
  const auto& [dtype, sizes, scale, causal, q, k, v, mask, bias] = problem;
  require(dtype == static_cast<int>(DType::f32) || dtype == static_cast<int>(DType::bf16),
          "attention: dtype must be float32 or bfloat16");
  require(threads > 0, "attention: threads must be positive");
  for (const int64_t size : sizes) require(size > 0, "attention: sizes must be positive");
  AttnArgs a{};
  a.dtype = static_cast<DType>(dtype);
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

void bind_attention(py::module_& m) {
  m.def("attention_forward", &attention_forward_checked, Release(),
        "See csrc/cpu/attention.h. Tensors are (address, strides of B, N, H, D), mask and bias "
        "(address, dtype, strides of B, H, Nq, Nk); None where absent, 0 for an absent address.");
  m.def("attention_backward", &attention_backward_checked, Release(),
        "See csrc/cpu/attention.h. dbias is [H, Nq, Nk], contiguous.");
}

// ---- windowed attention --------------------------------------------------------------------------

// dtype, (B, H, W, heads, D), (wh, ww, sh, sw), roll_first, grid, cosine, qkv, its strides of
// (B, H, W, 3, heads), scale, table, pad; (first, last) of a stripe or None
using WindowProblem =
    std::tuple<int, std::array<int64_t, 5>, std::array<int64_t, 4>, bool, bool, bool, uintptr_t,
               std::array<int64_t, 5>, uintptr_t, uintptr_t, uintptr_t,
               std::optional<std::array<int64_t, 2>>>;

WindowArgs window_args(const WindowProblem& problem, uintptr_t out, uintptr_t stats, int threads) {
  const auto& [dtype, sizes, window, roll_first, spread, cosine, qkv, strides, scale, table, pad,
               stripe] = problem;
  require(dtype == static_cast<int>(DType::f32) || dtype == static_cast<int>(DType::bf16),
          "window_attention: dtype must be float32 or bfloat16");
  require(threads > 0, "window_attention: threads must be positive");
  require(qkv != 0 && scale != 0, "window_attention: null address");
  for (const int64_t size : sizes) require(size > 0, "window_attention: sizes must be positive");
  for (const int64_t stride : strides) require(stride >= 0, "window_attention: negative stride");
  const auto& [wh, ww, sh, sw] = window;
  require(wh > 0 && ww > 0 && wh * ww <= 1 << 16, "window_attention: window out of range");
  require(0 <= sh && sh < wh && 0 <= sw && sw < ww, "window_attention: shift out of range");
  require(sizes[4] <= 256, "window_attention: head dim must be at most 256");
  WindowArgs a{};
  a.dtype = static_cast<DType>(dtype);
  a.B = sizes[0];
  a.H = sizes[1];
  a.W = sizes[2];
  a.heads = sizes[3];
  a.D = sizes[4];
  a.wh = wh;
  a.ww = ww;
  a.sh = sh;
  a.sw = sw;
  const int64_t high = (a.H + wh - 1) / wh;
  a.stripe = stripe.has_value();
  a.first = stripe ? (*stripe)[0] : 0;
  a.last = stripe ? (*stripe)[1] : high;
  require(0 <= a.first && a.first < a.last && a.last <= high, "window_attention: stripe out of range");
  require(!a.stripe || (a.B == 1 && roll_first && stats == 0), "window_attention: not for stripes");
  require(!spread || (sh == 0 && sw == 0 && a.H % wh == 0 && a.W % ww == 0 && !stripe),
          "window_attention: a grid divides the map, without shift or stripe");
  a.roll_first = roll_first;
  a.spread = spread;
  a.cosine = cosine;
  a.qkv = reinterpret_cast<const void*>(qkv);
  a.sb = strides[0];
  a.sy = strides[1];
  a.sx = strides[2];
  a.s3 = strides[3];
  a.shead = strides[4];
  a.out = reinterpret_cast<void*>(out);
  a.scale = floats(scale);
  a.table = floats(table);
  a.pad = floats(pad);
  a.stats = mutable_floats(stats);
  a.threads = threads;
  return a;
}

void window_forward_checked(const WindowProblem& problem, uintptr_t out, uintptr_t stats, int threads) {
  require(out != 0, "window_forward: null address");
  window_forward(window_args(problem, out, stats, threads));
}

void window_backward_checked(const WindowProblem& problem, uintptr_t stats, uintptr_t dout,
                             uintptr_t dqkv, uintptr_t dtable, uintptr_t dpad, uintptr_t dscale,
                             int threads) {
  const WindowArgs a = window_args(problem, 0, stats, threads);
  require(stats != 0, "window_backward: stats are missing");
  require(dout != 0 && dqkv != 0, "window_backward: null address");
  require(dtable == 0 || a.table != nullptr, "window_backward: dtable without a table");
  require(dpad == 0 || a.pad != nullptr, "window_backward: dpad without pad");
  require(dscale == 0 || a.cosine, "window_backward: dscale needs attention by cosine");
  window_backward(a, {reinterpret_cast<const void*>(dout), reinterpret_cast<void*>(dqkv),
                      mutable_floats(dtable), mutable_floats(dpad), mutable_floats(dscale)});
}

void bind_window(py::module_& m) {
  m.def("window_backward", &window_backward_checked, Release(),
        "See csrc/cpu/window.h. Addresses are 0 where a gradient is not wanted.");
  m.def("window_forward", &window_forward_checked, Release(),
        "See csrc/cpu/window.h. Addresses are 0 where a tensor is absent.");
}

// ---- linear_act ---------------------------------------------------------------------------------

using GemmRowsArg = std::optional<std::tuple<uintptr_t, int, int64_t, int64_t, int64_t>>;

DType gemm_dtype(int code) {
  require(code == static_cast<int>(DType::f32) || code == static_cast<int>(DType::bf16),
          "gemm: dtype code must be that of float32 or bfloat16");
  return static_cast<DType>(code);
}

GemmRows gemm_rows(const GemmRowsArg& arg, int64_t m) {
  if (!arg) return {};
  const auto& [address, dtype, rows, outer, inner] = *arg;
  require(address != 0, "gemm: null address");
  require(rows > 0 && m % rows == 0, "gemm: rows must come in whole groups");
  return {reinterpret_cast<void*>(address), gemm_dtype(dtype), rows, outer, inner};
}

GemmVector gemm_vector(const ChannelsArg& arg) {
  if (!arg) return {};
  const auto& [address, dtype] = *arg;
  require(address != 0, "gemm: null address");
  return {reinterpret_cast<const void*>(address), gemm_dtype(dtype)};
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
  return {reinterpret_cast<const void*>(b), reinterpret_cast<const void*>(gate),
          gemm_dtype(dtype),                n,
          k,                                n_stride,
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
                  gemm_dtype(compute),
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
  gemm_pack(gemm_b(b), gemm_dtype(compute), reinterpret_cast<void*>(packed), threads);
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

void bind_linear_act(py::module_& m) {
  m.def("gemm", &gemm_checked, Release(),
        "See csrc/cpu/gemm.h. Rows are (address, dtype, rows of a group, outer stride, inner "
        "stride), vectors (address, dtype); None where absent. B is (address, address of the "
        "gate's or 0, dtype, n, k, stride of n, stride of k).");
  m.def("gemm_pack", &gemm_pack_checked, Release(), "See csrc/cpu/gemm.h.");
  m.def(
      "gemm_packed_bytes",
      [](const GemmBArg& b, int compute) {
        return gemm_packed_bytes(gemm_b(b), gemm_dtype(compute));
      },
      "Size of what gemm_pack writes.");
  m.def("linear_backward", &linear_backward_checked, Release(), "See csrc/cpu/linear_backward.h.");
}

// ---- pages --------------------------------------------------------------------------------------

void bind_pages(py::module_& m) {
  m.def("ask_for_large_pages",
        [](uintptr_t begin, int64_t bytes) {
          ask_for_large_pages(reinterpret_cast<void*>(begin), bytes);
        },
        "See csrc/common/pages.h.");
}

// ---- patch_embed --------------------------------------------------------------------------------

void patchify_checked(uintptr_t image, int dtype, const std::array<int64_t, 4>& strides,
                      const std::array<int64_t, 5>& sizes, uintptr_t scale, uintptr_t shift,
                      int64_t first, int64_t count, uintptr_t out, int out_dtype, int threads) {
  require(image != 0 && out != 0, "patchify: null address");
  require(dtype == 0 || dtype == 1 || dtype == 3, "patchify: unknown dtype of image");
  for (const int64_t size : sizes) require(size > 0, "patchify: sizes must be positive");
  require(first >= 0 && count >= 0, "patchify: negative row");
  require(threads > 0, "patchify: threads must be positive");
  patchify({reinterpret_cast<const void*>(image), static_cast<DType>(dtype), strides[0], strides[1],
            strides[2], strides[3], sizes[0], sizes[1], sizes[2], sizes[3], sizes[4],
            floats(scale), floats(shift), first, count, reinterpret_cast<void*>(out),
            gemm_dtype(out_dtype), threads});
}

void bind_patch_embed(py::module_& m) {
  m.def("patchify", &patchify_checked, Release(),
        "See csrc/cpu/patchify.h. Strides of B, C, H, W; sizes are channels, grid, patch.");
}

// ---- tape ---------------------------------------------------------------------------------------

// Addresses of a tape: bit 62, a buffer's number, and how far into it. No address of memory and no
// size or stride is as large.
constexpr int64_t kOnTape = int64_t{1} << 62, kReach = int64_t{1} << 44;

using Bases = std::vector<uintptr_t>;

// Puts the addresses in an argument at where the buffers lie now.
struct Relocate {
  const Bases& bases;

  template <class T>
  void operator()(std::optional<T>& value) const {
    if (value) (*this)(*value);
  }
  template <class... T>
  void operator()(std::variant<T...>& value) const {
    std::visit(*this, value);
  }
  template <class... T>
  void operator()(std::tuple<T...>& values) const {
    std::apply([this](auto&... each) { ((*this)(each), ...); }, values);
  }
  template <class T, size_t n>
  void operator()(std::array<T, n>& values) const {
    for (T& value : values) (*this)(value);
  }
  template <class T>
  void operator()(T& value) const {
    static_assert(std::is_arithmetic_v<T>, "a tape must know how to look into this argument");
    if constexpr (std::is_integral_v<T> && sizeof(T) == 8) {
      const auto v = static_cast<int64_t>(value);
      if (v >= kOnTape) value = static_cast<T>(bases.at((v - kOnTape) / kReach) + v % kReach);
    }
  }
};

// Calls of kernels in a row, to be run again on other tensors. Its first buffers are what it is
// given; the others it takes itself.
class Tape {
 public:
  Tape(int64_t bytes, std::vector<int64_t> offsets) : bytes_(bytes), offsets_(std::move(offsets)) {
    for (const int64_t offset : offsets_) require(offset >= 0 && offset < bytes, "tape: offset");
  }

  template <class... Args>
  void add(void (*kernel)(Args...), std::tuple<std::decay_t<Args>...> args) {
    calls_.push_back([kernel, args = std::move(args)](const Bases& bases) {
      auto now = args;
      Relocate{bases}(now);
      std::apply(kernel, now);
    });
  }

  void run(Bases bases) const {
    const common::Scratch scratch(bytes_);
    const auto own = reinterpret_cast<uintptr_t>(scratch.ptr);
    for (const int64_t offset : offsets_) bases.push_back(own + offset);
    for (const auto& call : calls_) call(bases);
  }

 private:
  int64_t bytes_;
  std::vector<int64_t> offsets_;
  std::vector<std::function<void(const Bases&)>> calls_;
};

template <class... Args>
auto recorded(void (*kernel)(Args...)) {
  return [kernel](Tape& tape, std::decay_t<Args>... args) {
    tape.add(kernel, std::tuple<std::decay_t<Args>...>(std::move(args)...));
  };
}

void bind_tape(py::module_& m) {
  py::class_<Tape>(m, "Tape")
      .def(py::init<int64_t, std::vector<int64_t>>(),
           "Bytes of its own, and where its own buffers lie there.")
      .def("run", &Tape::run, Release(), "All calls, on the addresses of the first buffers.")
      .def("gemm", recorded(&gemm_checked))
      .def("grn_accumulate", recorded(&grn_accumulate_checked))
      .def("grn_scale", recorded(&grn_scale_checked))
      .def("norm_forward", recorded(&norm_forward_checked))
      .def("dwconv_forward", recorded(&dwconv_forward_checked))
      .def("attention_forward", recorded(&attention_forward_checked))
      .def("window_forward", recorded(&window_forward_checked));
}

}  // namespace

PYBIND11_MODULE(_native, m, py::mod_gil_not_used()) {
  m.doc() = "Native kernels of vitfast";
  bind_isa(m);
  bind_address(m);
  bind_pages(m);
  bind_name_state(m);
  bind_module_state(m);
  bind_tensor_state(m);
  bind_unwatched(m);
  bind_tape(m);
  bind_attention(m);
  bind_window(m);
  bind_linear_act(m);
  bind_norm(m);
  bind_grn(m);
  bind_dwconv(m);
  bind_group_norm(m);
  bind_patch_embed(m);
}
