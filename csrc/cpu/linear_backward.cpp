// Threads share out the columns, so that a column's sum never depends on their number.
#include "linear_backward.h"

#include "../common/parallel.h"
#include "../common/scratch.h"
#include "activation.h"
#include "gemm_rows.h"

namespace vitfast {
namespace VITFAST_ISA {
namespace {

// Rows summed in registers, and such blocks summed before they are added to the total.
constexpr int64_t kRows = 16, kBlocks = 32;
constexpr int kVectors = 4;

struct Sums {
  float *block, *total;  // [n] each; null: not wanted
};

inline void add(float* to, vf v, int n) {
  n == kLanes ? store(to, load(to) + v) : store_n(to, load_n(to, n) + v, n);
}

struct Offsets {
  int64_t grad[kRows], z[kRows], gate_z[kRows], dz[kRows], dgate_z[kRows];
};

template <class T>
inline vf take(const T* p, int n) {
  return n == kLanes ? load(p) : load_n(p, n);
}
template <class T>
inline void give(T* p, vf v, int n) {
  n == kLanes ? store(p, v) : store_n(p, v, n);
}

// Vectors of columns from c on, of `rows` rows; the last of them has n lanes.
template <class T, Act A, int Vectors>
inline void block(const LinearBackward& a, const Offsets& o, int64_t rows, int64_t c, int n,
                  const Sums& bias, const Sums& gate_bias) {
  const T* const grad = static_cast<const T*>(a.grad.ptr) + c;
  const T* const z = static_cast<const T*>(a.z.ptr) + c;
  const T* const gate_z = static_cast<const T*>(a.gate_z.ptr) + c;
  T* const dz_out = static_cast<T*>(a.dz.ptr) + c;
  T* const dgate_out = static_cast<T*>(a.dgate_z.ptr) + c;
  const bool gated = a.gate_z.ptr != nullptr, stored = a.dz.ptr != nullptr;
  vf sum[Vectors] = {}, gate_sum[Vectors] = {};
  for (int64_t i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      const int64_t at = v * kLanes;
      const int lanes = v + 1 < Vectors ? kLanes : n;
      vf dz = take(grad + o.grad[i] + at, lanes);
      if (gated) {
        const Derived f = differentiate<A>(take(z + o.z[i] + at, lanes));
        const vf gate = take(gate_z + o.gate_z[i] + at, lanes), dgate = dz * f.y;
        dz = dz * gate * f.d;
        give(dgate_out + o.dgate_z[i] + at, dgate, lanes);
        gate_sum[v] = gate_sum[v] + dgate;
      } else if (A != Act::none) {
        dz = dz * differentiate<A>(take(z + o.z[i] + at, lanes)).d;
      }
      if (stored) give(dz_out + o.dz[i] + at, dz, lanes);
      sum[v] = sum[v] + dz;
    }
  }
  for (int v = 0; v < Vectors; ++v) {
    const int64_t at = c + v * kLanes;
    const int lanes = v + 1 < Vectors ? kLanes : n;
    if (bias.block != nullptr) add(bias.block + at, sum[v], lanes);
    if (gate_bias.block != nullptr) add(gate_bias.block + at, gate_sum[v], lanes);
  }
}

inline void flush(const Sums& s, int64_t begin, int64_t end) {
  if (s.block == nullptr) return;
  for (int64_t c = begin; c < end; ++c) {
    s.total[c] += s.block[c];
    s.block[c] = 0.f;
  }
}

template <class T, Act A>
void columns(const LinearBackward& a, int64_t begin, int64_t end, const Sums& bias,
             const Sums& gate_bias) {
  Offsets o;
  const auto fill = [](const GemmRows& r, int64_t first, int64_t rows, int64_t* to) {
    if (r.ptr != nullptr)
      for (int64_t i = 0; i < rows; ++i) to[i] = offset(r, first + i);
  };
  int64_t pending = 0;
  for (int64_t first = 0; first < a.m; first += kRows) {
    const int64_t rows = min(kRows, a.m - first);
    fill(a.grad, first, rows, o.grad);
    fill(a.z, first, rows, o.z);
    fill(a.gate_z, first, rows, o.gate_z);
    fill(a.dz, first, rows, o.dz);
    fill(a.dgate_z, first, rows, o.dgate_z);
    int64_t c = begin;
    for (; c + kVectors * kLanes <= end; c += kVectors * kLanes)
      block<T, A, kVectors>(a, o, rows, c, kLanes, bias, gate_bias);
    for (; c < end; c += kLanes)
      block<T, A, 1>(a, o, rows, c, static_cast<int>(min(kLanes, end - c)), bias, gate_bias);
    if (++pending == kBlocks || first + kRows >= a.m) {
      flush(bias, begin, end);
      flush(gate_bias, begin, end);
      pending = 0;
    }
  }
}

using Columns = void (*)(const LinearBackward&, int64_t, int64_t, const Sums&, const Sums&);

template <class T>
Columns columns_of(Act act) {
  return with_act(act, [](auto kind) -> Columns { return columns<T, decltype(kind)::value>; });
}

}  // namespace

void linear_backward(const LinearBackward& a) {
  const Scratch scratch(2 * a.n * 4);
  float* const blocks = scratch.as<float>();
  std::memset(blocks, 0, static_cast<size_t>(2 * a.n) * sizeof(float));
  const auto sums = [&](float* total, float* block) -> Sums {
    if (total == nullptr) return {nullptr, nullptr};
    std::memset(total, 0, static_cast<size_t>(a.n) * sizeof(float));
    return {block, total};
  };
  const Sums bias = sums(a.dbias, blocks), gate_bias = sums(a.dgate_bias, blocks + a.n);
  const Columns columns =
      a.grad.dtype == DType::f32 ? columns_of<float>(a.act) : columns_of<bf16_t>(a.act);
  parallel_for(ceil_div(a.n, kLanes), a.threads, [&](int64_t begin, int64_t end, int) {
    columns(a, begin * kLanes, min(end * kLanes, a.n), bias, gate_bias);
  });
}

}  // namespace VITFAST_ISA
}  // namespace vitfast
