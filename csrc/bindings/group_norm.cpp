// Bindings of group_norm_act.
#include <array>

#include "arguments.h"
#include "cpu/group_norm.h"
#include "module.h"

namespace py = pybind11;

namespace vitfast {
namespace {

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
  return {reinterpret_cast<void*>(address),
          float_dtype(dtype, "group_norm"),
          sample,
          channel,
          line,
          pixel};
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

}  // namespace

void bind_group_norm(py::module_& m) {
  m.def("group_norm_forward", &group_norm_forward_checked, Release(),
        "See csrc/cpu/group_norm.h. Maps are (address, dtype, strides of sample, channel, line, "
        "pixel), channel vectors (address, dtype); None where absent, 0 for an absent address.");
  m.def("group_norm_backward", &group_norm_backward_checked, Release(),
        "See csrc/cpu/group_norm.h.");
}

}  // namespace vitfast
