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
#include <string>
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

// Messages begin with the op's name.
inline DType float_dtype(int code, const char* op) {
  if (code != static_cast<int>(DType::f32) && code != static_cast<int>(DType::bf16))
    throw std::invalid_argument(std::string(op) + ": dtype must be float32 or bfloat16");
  return static_cast<DType>(code);
}

inline void* not_null(uintptr_t address, const char* op) {
  if (address == 0) throw std::invalid_argument(std::string(op) + ": null address");
  return reinterpret_cast<void*>(address);
}

inline Rows rows(const RowsArg& arg, const char* op = "norm") {
  if (!arg) return {};
  if (const PlainArg* plain = std::get_if<PlainArg>(&*arg)) {
    const auto& [address, dtype, outer, inner] = *plain;
    return {not_null(address, op), float_dtype(dtype, op), outer, inner};
  }
  const auto& [address, dtype, outer, inner, H, W, column] = std::get<MapArg>(*arg);
  require(H > 0 && W > 0, "norm: a map's sizes must be positive");
  return {not_null(address, op), float_dtype(dtype, op), outer, inner, H, W, column};
}

inline Channels channels(const ChannelsArg& arg, const char* op = "norm") {
  if (!arg) return {};
  const auto& [address, dtype] = *arg;
  return {not_null(address, op), float_dtype(dtype, op)};
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
