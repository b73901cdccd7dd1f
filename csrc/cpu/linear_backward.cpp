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

// Columns [c, end), at most kVectors vectors, of `rows` rows.
template <Act A>
void block(const LinearBackward& a, const Offsets& o, int64_t rows, int64_t c, int64_t end,
           const Sums& bias, const Sums& gate_bias) {
  vf sum[kVectors] = {}, gate_sum[kVectors] = {};
  for (int64_t i = 0; i < rows; ++i) {
    for (int v = 0; v < kVectors && c + v * kLanes < end; ++v) {
      const int64_t at = c + v * kLanes;
      const int n = static_cast<int>(smaller(kLanes, end - at));
      vf dz = get(a.grad.ptr, a.grad.dtype, o.grad[i] + at, n);
      if (a.gate_z.ptr != nullptr) {
        const Derived f = differentiate<A>(get(a.z.ptr, a.z.dtype, o.z[i] + at, n));
        const vf gate = get(a.gate_z.ptr, a.gate_z.dtype, o.gate_z[i] + at, n);
        const vf dgate = dz * f.y;
        dz = dz * gate * f.d;
        put(a.dgate_z, o.dgate_z[i] + at, dgate, n);
        gate_sum[v] = gate_sum[v] + dgate;
      } else if (A != Act::none) {
        dz = dz * differentiate<A>(get(a.z.ptr, a.z.dtype, o.z[i] + at, n)).d;
      }
      if (a.dz.ptr != nullptr) put(a.dz, o.dz[i] + at, dz, n);
      sum[v] = sum[v] + dz;
    }
  }
  for (int v = 0; v < kVectors && c + v * kLanes < end; ++v) {
    const int64_t at = c + v * kLanes;
    const int n = static_cast<int>(smaller(kLanes, end - at));
    if (bias.block != nullptr) add(bias.block + at, sum[v], n);
    if (gate_bias.block != nullptr) add(gate_bias.block + at, gate_sum[v], n);
  }
}

inline void flush(const Sums& s, int64_t begin, int64_t end) {
  if (s.block == nullptr) return;
  for (int64_t c = begin; c < end; ++c) {
    s.total[c] += s.block[c];
    s.block[c] = 0.f;
  }
}

template <Act A>
void columns(const LinearBackward& a, int64_t begin, int64_t end, const Sums& bias,
             const Sums& gate_bias) {
  Offsets o;
  const auto fill = [](const GemmRows& r, int64_t first, int64_t rows, int64_t* to) {
    if (r.ptr != nullptr)
      for (int64_t i = 0; i < rows; ++i) to[i] = offset(r, first + i);
  };
  int64_t pending = 0;
  for (int64_t first = 0; first < a.m; first += kRows) {
    const int64_t rows = smaller(kRows, a.m - first);
    fill(a.grad, first, rows, o.grad);
    fill(a.z, first, rows, o.z);
    fill(a.gate_z, first, rows, o.gate_z);
    fill(a.dz, first, rows, o.dz);
    fill(a.dgate_z, first, rows, o.dgate_z);
    for (int64_t c = begin; c < end; c += kVectors * kLanes)
      block<A>(a, o, rows, c, smaller(c + kVectors * kLanes, end), bias, gate_bias);
    if (++pending == kBlocks || first + kRows >= a.m) {
      flush(bias, begin, end);
      flush(gate_bias, begin, end);
      pending = 0;
    }
  }
}

using Columns = void (*)(const LinearBackward&, int64_t, int64_t, const Sums&, const Sums&);

Columns columns_of(Act act) {
  switch (act) {
    case Act::relu: return columns<Act::relu>;
    case Act::gelu: return columns<Act::gelu>;
    case Act::gelu_tanh: return columns<Act::gelu_tanh>;
    case Act::quick_gelu: return columns<Act::quick_gelu>;
    case Act::silu: return columns<Act::silu>;
    case Act::sigmoid: return columns<Act::sigmoid>;
    default: return columns<Act::none>;
  }
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
  const Columns columns = columns_of(a.act);
  parallel_for(ceil_div(a.n, kLanes), a.threads, [&](int64_t begin, int64_t end, int) {
    columns(a, begin * kLanes, smaller(end * kLanes, a.n), bias, gate_bias);
  });
}

}  // namespace VITFAST_ISA
}  // namespace vitfast
