// What the bindings of several ops take, and how it is checked.
//
// Tensors arrive as addresses (uintptr_t), sizes and strides in elements; the Python side has
// checked them. Kernels run without the GIL: what Python passes for an address (address.h) keeps
// what lies there for as long as the call lasts.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <variant>

#include "cpu/norm.h"

namespace vitfast {

using Release = pybind11::call_guard<pybind11::gil_scoped_release>;

// address, dtype, outer, inner; of a map moreover H, W, column
using PlainArg = std::tuple<uintptr_t, int, int64_t, int64_t>;
using MapArg = std::tuple<uintptr_t, int, int64_t, int64_t, int64_t, int64_t, int64_t>;
using RowsArg = std::optional<std::variant<PlainArg, MapArg>>;
using ChannelsArg = std::optional<std::tuple<uintptr_t, int>>;

inline void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

inline DType float_dtype(int code) {
  require(code == static_cast<int>(DType::f32) || code == static_cast<int>(DType::bf16),
          "dtype code must be that of float32 or bfloat16");
  return static_cast<DType>(code);
}

inline Rows rows(const RowsArg& arg) {
  if (!arg) return {};
  if (const PlainArg* plain = std::get_if<PlainArg>(&*arg)) {
    const auto& [address, dtype, outer, inner] = *plain;
    require(address != 0, "null address of a tensor");
    return {reinterpret_cast<void*>(address), float_dtype(dtype), outer, inner};
  }
  const auto& [address, dtype, outer, inner, H, W, column] = std::get<MapArg>(*arg);
  require(address != 0, "null address of a tensor");
  require(H > 0 && W > 0, "norm: a map's sizes must be positive");
  return {reinterpret_cast<void*>(address), float_dtype(dtype), outer, inner, H, W, column};
}

inline Channels channels(const ChannelsArg& arg) {
  if (!arg) return {};
  const auto& [address, dtype] = *arg;
  require(address != 0, "null address of a tensor");
  return {reinterpret_cast<void*>(address), float_dtype(dtype)};
}

inline NormKind norm_kind(int kind) {
  require(kind >= 0 && kind <= 2, "norm: kind must be 0 (layer), 1 (rms) or 2 (none)");
  return static_cast<NormKind>(kind);
}

inline void check_norm_sizes(int64_t B, int64_t N, int64_t C, int threads) {
  require(B > 0 && N > 0 && C > 0, "norm: sizes must be positive");
  require(threads > 0, "norm: threads must be positive");
}

inline const float* floats(uintptr_t address) { return reinterpret_cast<const float*>(address); }
inline float* mutable_floats(uintptr_t address) { return reinterpret_cast<float*>(address); }

}  // namespace vitfast
