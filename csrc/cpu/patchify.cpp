// Threads share out rows of patches; a line of the image is read once for all patches along it.
#include "patchify.h"

#include "../common/math.h"
#include "../common/parallel.h"
#include "simd.h"

namespace vitfast {
namespace VITFAST_ISA {
namespace {

inline vf load_n(const uint8_t* p, int n) {
  uint8_t tmp[kLanes] = {};
  std::memcpy(tmp, p, static_cast<size_t>(n));
  return load(tmp);
}

template <class T, class Out>
inline void line(const T* from, int64_t stride, float scale, float shift, int64_t n, Out* to) {
  if (stride == 1) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
      store(to + i, fma(load(from + i), splat(scale), splat(shift)));
    if (i < n) {
      const int rest = static_cast<int>(n - i);
      store_n(to + i, fma(load_n(from + i, rest), splat(scale), splat(shift)), rest);
    }
    return;
  }
  for (int64_t i = 0; i < n; ++i) from_float(to_float(from[i * stride]) * scale + shift, to + i);
}

// Patches [j0, j1) of one row of patches; `to` is the first one's output.
template <class T, class Out>
void patches(const Patchify& a, const T* corner, int64_t j0, int64_t j1, Out* to) {
  const int64_t width = a.channels * a.p * a.q;
  for (int64_t c = 0; c < a.channels; ++c) {
    const float scale = a.scale != nullptr ? a.scale[c] : 1.f;
    const float shift = a.shift != nullptr ? a.shift[c] : 0.f;
    for (int64_t r = 0; r < a.p; ++r) {
      const T* const from = corner + c * a.c_stride + r * a.h_stride;
      Out* const column = to + (c * a.p + r) * a.q;
      for (int64_t j = j0; j < j1; ++j)
        line(from + j * a.q * a.w_stride, a.w_stride, scale, shift, a.q, column + (j - j0) * width);
    }
  }
}

template <class T, class Out>
void run(const Patchify& a) {
  const int64_t width = a.channels * a.p * a.q, last = a.first + a.count;
  const int64_t begin_line = a.first / a.grid_w, end_line = ceil_div(last, a.grid_w);
  parallel_for(end_line - begin_line, a.threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t l = begin_line + begin; l < begin_line + end; ++l) {
      const int64_t row = l * a.grid_w;
      const int64_t j0 = max(a.first - row, 0);
      const int64_t j1 = min(last - row, a.grid_w);
      const T* const corner = static_cast<const T*>(a.image) + l / a.grid_h * a.b_stride +
                              l % a.grid_h * a.p * a.h_stride;
      patches(a, corner, j0, j1, static_cast<Out*>(a.out) + (row + j0 - a.first) * width);
    }
  });
}

template <class T>
void run_to(const Patchify& a) {
  a.out_dtype == DType::f32 ? run<T, float>(a) : run<T, bf16_t>(a);
}

}  // namespace

void patchify(const Patchify& a) {
  if (a.count == 0) return;
  switch (a.dtype) {
    case DType::f32: return run_to<float>(a);
    case DType::bf16: return run_to<bf16_t>(a);
    default: return run_to<uint8_t>(a);
  }
}

}  // namespace VITFAST_ISA
}  // namespace vitfast
