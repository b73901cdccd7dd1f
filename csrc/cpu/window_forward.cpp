// Windowed attention, forward. Floor: 4 B heads windows N^2 D flops at the machine's product rate and
// 4 reads and writes of [B, H, W, heads, D], whichever takes longer: at 7 x 7 windows, the traffic.
#include "../common/parallel.h"
#include "../common/scratch.h"
#include "attention_block.h"
#include "window_rows.h"

namespace vitfast {
namespace VITFAST_ISA {
namespace {

// One (batch, window, head).
template <class M>
struct Window {
  typedef typename M::Row Row;
  const WindowArgs& a;
  int64_t batch, index, head, D;
  float scale;
  bool terms;
  const int64_t* token;  // [N]
  const float* bands;    // [N], or null where all are the same
  const float* bias;     // [N][ld], or null
  int64_t ld_bias, N;

  int64_t last_key(int64_t) const { return N; }
  bool hidden(int64_t, int64_t, int64_t) const { return false; }
  const Row* rows(int part, int64_t begin, int64_t count, int64_t width, const Workspace<M>& w, int64_t* ld) const {
    gather(a, batch, head, part, token + begin, count, width, w.row, w.rows);
    *ld = width;
    return w.rows;
  }
  const Row* queries(int64_t begin, int64_t count, int64_t width, const Workspace<M>& w, int64_t* ld) const {
    return rows(0, begin, count, width, w, ld);
  }
  const Row* keys(int64_t begin, int64_t count, int64_t width, const Workspace<M>& w, int64_t* ld) const {
    return rows(1, begin, count, width, w, ld);
  }
  const Row* values(int64_t begin, int64_t count, int64_t width, const Workspace<M>& w, int64_t* ld) const {
    return rows(2, begin, count, width, w, ld);
  }
  void add(int64_t first, int64_t count, int64_t k0, int64_t keys, float* s) const {
    for (int64_t k = 0; k < keys; ++k) {
      float* row = s + k * kBlock;
      if (bias) {
        const float* from = bias + (k0 + k) * ld_bias + first;
        for (int64_t m = 0; m < count; m += kLanes) store(row + m, load(row + m) + load(from + m));
      }
      if (bands) {
        const vf mine = splat(bands[k0 + k]);
        for (int64_t m = 0; m < count; m += kLanes)
          store(row + m, load(row + m) + select(load(bands + first + m) == mine, zero(), splat(kHidden)));
      }
    }
  }
  template <class T>
  void write_as(int64_t first, int64_t count, const float* o, const float* sum) const {
    T* out = static_cast<T*>(a.out) + (batch * a.H * a.W * a.heads + head) * D;
    write_output<T>(o, sum, count, D, 1, [&](int64_t m) -> T* {
      return token[first + m] < 0 ? nullptr : out + token[first + m] * a.heads * D;
    });
  }
  void write(int64_t first, int64_t count, const float* o, const float* sum, const float* max, float c) const {
    if (a.dtype == DType::f32)
      write_as<float>(first, count, o, sum);
    else
      write_as<bf16_t>(first, count, o, sum);
    if (!a.stats) return;
    const Grid g = grid(a);
    float* shift = a.stats + ((batch * g.high * g.wide + index) * a.heads + head) * N + first;
    float* total = shift + a.B * g.high * g.wide * a.heads * N;
    for (int64_t m = 0; m < count; ++m) {
      shift[m] = (max[m] == -kInf ? 0.f : max[m]) * c;
      total[m] = sum[m];
    }
  }
};

// What a thread holds of a window beside the workspace.
struct Map {
  int64_t* token;
  float *bands, *bias;

  static int64_t bytes(int64_t N, bool biased) { return Map().carve(nullptr, N, biased); }
  int64_t carve(char* base, int64_t N, bool biased) {
    const int64_t ld = ceil_div(N, kBlock) * kBlock;
    int64_t used = 0;
    used = take(base, used, token, ld);
    used = take(base, used, bands, ld);
    return take(base, used, bias, biased ? N * ld : 0);
  }
};

template <class M>
void forward(const WindowArgs& a) {
  const int threads = a.threads < 1 ? 1 : a.threads;
  const Grid g = grid(a);
  const int64_t N = g.tokens, blocks = ceil_div(N, kBlock), windows = (a.last - a.first) * g.wide;
  const int64_t work = Workspace<M>::bytes(blocks, a.D), bytes = work + Map::bytes(N, a.table);
  Scratch scratch(bytes * threads);
  parallel_for(a.heads * a.B * windows, threads, [&](int64_t begin, int64_t end, int thread) {
    char* base = scratch.as<char>(thread * bytes);
    Workspace<M> w;
    w.carve(base, blocks, a.D);
    Map map;
    map.carve(base + work, N, a.table);
    for (int64_t i = N; i < blocks * kBlock; ++i) map.bands[i] = 0.f;
    int64_t head = -1;
    for (int64_t task = begin; task < end; ++task) {
      if (task / (a.B * windows) != head) {
        head = task / (a.B * windows);
        if (a.table) fill_bias(a, head, blocks * kBlock, map.bias);
      }
      const int64_t batch = task / windows % a.B, index = a.first * g.wide + task % windows;
      const bool several = map_window(a, index, map.token, map.bands);
      const Window<M> window{a,
                             batch,
                             index,
                             head,
                             a.D,
                             a.scale[head],
                             a.table || several,
                             map.token,
                             several ? map.bands : nullptr,
                             a.table ? map.bias : nullptr,
                             blocks * kBlock,
                             N};
      attend<M>(window, 0, N, w);
    }
  });
}

}  // namespace

void window_forward(const WindowArgs& a) {
  if (a.B == 0 || a.H == 0 || a.W == 0 || a.heads == 0) return;
#if defined(VITFAST_HAS_BF16_DOT)
  if (a.dtype == DType::bf16) return forward<Bf16>(a);
#endif
  forward<F32>(a);
}

}  // namespace VITFAST_ISA
}  // namespace vitfast
