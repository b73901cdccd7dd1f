// Calls of kernels that were recorded once, and run again as one.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <functional>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

namespace vitfast {

// Addresses in a replay: bit 62, a buffer's number, and how far into it. No address of memory and
// no size or stride is as large.
constexpr int64_t kInBuffer = int64_t{1} << 62, kReach = int64_t{1} << 44;

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
    static_assert(std::is_arithmetic_v<T>, "a replay must know how to look into this argument");
    if constexpr (std::is_integral_v<T> && sizeof(T) == 8) {
      const auto v = static_cast<int64_t>(value);
      if (v >= kInBuffer) value = static_cast<T>(bases.at((v - kInBuffer) / kReach) + v % kReach);
    }
  }
};

// Calls of kernels in a row, to be run again on other tensors. Its first buffers are what it is
// given; the others it takes itself.
class Replay {
 public:
  Replay(int64_t bytes, std::vector<int64_t> offsets);

  template <class... Args>
  void add(void (*kernel)(Args...), std::tuple<std::decay_t<Args>...> args) {
    calls_.push_back([kernel, args = std::move(args)](const Bases& bases) {
      auto now = args;
      Relocate{bases}(now);
      std::apply(kernel, now);
    });
  }

  void run(Bases bases) const;

 private:
  int64_t bytes_;
  std::vector<int64_t> offsets_;
  std::vector<std::function<void(const Bases&)>> calls_;
};

template <class... Args>
auto recorded(void (*kernel)(Args...)) {
  return [kernel](Replay& replay, std::decay_t<Args>... args) {
    replay.add(kernel, std::tuple<std::decay_t<Args>...>(std::move(args)...));
  };
}

}  // namespace vitfast
