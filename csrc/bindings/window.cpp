// Bindings of window_attention.
#include <array>

#include "arguments.h"
#include "common/math.h"
#include "cpu/window.h"
#include "module.h"
#include "replay.h"

namespace py = pybind11;

namespace vitfast {
namespace {

// dtype, (B, H, W, heads, D), (wh, ww, sh, sw), roll_first, grid, cosine, qkv, its strides of
// (B, H, W, 3, heads), scale, table, pad; (first, last) of a stripe or None
using WindowProblem = std::tuple<int, std::array<int64_t, 5>, std::array<int64_t, 4>, bool, bool,
                                 bool, uintptr_t, std::array<int64_t, 5>, uintptr_t, uintptr_t,
                                 uintptr_t, std::optional<std::array<int64_t, 2>>>;

WindowArgs window_args(const WindowProblem& problem, uintptr_t out, uintptr_t stats, int threads) {
  const auto& [dtype, sizes, window, roll_first, spread, cosine, qkv, strides, scale, table, pad,
               stripe] = problem;
  require(threads > 0, "window_attention: threads must be positive");
  require(qkv != 0 && scale != 0, "window_attention: null address");
  for (const int64_t size : sizes) require(size > 0, "window_attention: sizes must be positive");
  for (const int64_t stride : strides) require(stride >= 0, "window_attention: negative stride");
  const auto& [wh, ww, sh, sw] = window;
  require(wh > 0 && ww > 0 && wh * ww <= 1 << 16, "window_attention: window out of range");
  require(0 <= sh && sh < wh && 0 <= sw && sw < ww, "window_attention: shift out of range");
  require(sizes[4] <= 256, "window_attention: head dim must be at most 256");
  WindowArgs a{};
  a.dtype = float_dtype(dtype, "window_attention");
  a.B = sizes[0];
  a.H = sizes[1];
  a.W = sizes[2];
  a.heads = sizes[3];
  a.D = sizes[4];
  a.wh = wh;
  a.ww = ww;
  a.sh = sh;
  a.sw = sw;
  const int64_t high = common::ceil_div(a.H, wh);
  a.stripe = stripe.has_value();
  a.first = stripe ? (*stripe)[0] : 0;
  a.last = stripe ? (*stripe)[1] : high;
  require(0 <= a.first && a.first < a.last && a.last <= high,
          "window_attention: stripe out of range");
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

void window_forward_checked(const WindowProblem& problem, uintptr_t out, uintptr_t stats,
                            int threads) {
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

}  // namespace

void bind_window(py::module_& m, py::class_<Replay>& replay) {
  m.def("window_backward", &window_backward_checked, Release(),
        "See csrc/cpu/window.h. Addresses are 0 where a gradient is not wanted.");
  m.def("window_forward", &window_forward_checked, Release(),
        "See csrc/cpu/window.h. Addresses are 0 where a tensor is absent.");
  replay.def("window_forward", recorded(&window_forward_checked));
}

}  // namespace vitfast
