// Bindings of patch_embed.
#include <array>

#include "arguments.h"
#include "cpu/patchify.h"
#include "module.h"

namespace py = pybind11;

namespace vitfast {
namespace {

void patchify_checked(uintptr_t image, int dtype, const std::array<int64_t, 4>& strides,
                      const std::array<int64_t, 5>& sizes, uintptr_t scale, uintptr_t shift,
                      int64_t first, int64_t count, uintptr_t out, int out_dtype, int threads) {
  require(image != 0 && out != 0, "patchify: null address");
  require(dtype == 0 || dtype == 1 || dtype == 3, "patchify: unknown dtype of image");
  for (const int64_t size : sizes) require(size > 0, "patchify: sizes must be positive");
  require(first >= 0 && count >= 0, "patchify: negative row");
  require(threads > 0, "patchify: threads must be positive");
  patchify({reinterpret_cast<const void*>(image), static_cast<DType>(dtype), strides[0], strides[1],
            strides[2], strides[3], sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], floats(scale),
            floats(shift), first, count, reinterpret_cast<void*>(out),
            float_dtype(out_dtype, "patchify"), threads});
}

}  // namespace

void bind_patchify(py::module_& m) {
  m.def("patchify", &patchify_checked, Release(),
        "See csrc/cpu/patchify.h. Strides of B, C, H, W; sizes are channels, grid, patch.");
}

}  // namespace vitfast
