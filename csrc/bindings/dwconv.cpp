// Bindings of dwconv_norm.
#include <array>

#include "arguments.h"
#include "cpu/dwconv.h"
#include "module.h"
#include "replay.h"

namespace py = pybind11;

namespace vitfast {
namespace {

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
  return {reinterpret_cast<const void*>(address),
          float_dtype(dtype, "dwconv"),
          strides[0],
          strides[1],
          strides[2],
          strides[3],
          rounded};
}

void dwconv_forward_checked(const DwconvSizesArg& sizes, int kind, const DwconvMapArg& x,
                            const ChannelsArg& weight, bool rounded, bool flipped,
                            const ChannelsArg& bias, const ChannelsArg& norm_weight,
                            const ChannelsArg& norm_bias, float eps,
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
  dwconv_weight_grad(
      {dwconv_sizes(sizes), dwconv_map(x), dwconv_map(grad), channels(weight), channels(bias)});
}

}  // namespace

void bind_dwconv(py::module_& m, py::class_<Replay>& replay) {
  m.def("dwconv_forward", &dwconv_forward_checked, Release(),
        "See csrc/cpu/dwconv.h. Sizes are ((B, H, W, C), (kh, kw), threads), maps (address, "
        "dtype, strides, rounded), vectors, weight and y (address, dtype); None where absent.");
  m.def("dwconv_weight_grad", &dwconv_weight_grad_checked, Release(), "See csrc/cpu/dwconv.h.");
  replay.def("dwconv_forward", recorded(&dwconv_forward_checked));
}

}  // namespace vitfast
