// Depthwise convolution of maps [B, H, W, C] with a norm over C, and the gradients of map and taps.
//
// Floor: x read and the result written once, against K * K multiply-adds an element in float32 (the
// products of a channel are no matrix product: tensor cores would multiply zeros). With K = 7 in
// half precision an A100 needs 2.3 times as long for the multiply-adds as for the memory.
//
// A thread has one channel and walks down a strip of kAcross columns. It holds the taps, and the
// sums of the K lines of results that a line of x adds to: a line is loaded once, for K * K *
// kAcross multiply-adds, and neighbouring threads read neighbouring channels. There is no shared
// memory and no barrier in the convolution; lines that strips share come from the first-level
// cache.
#include "intrinsics.h"

namespace vitfast {

struct ConvolveArguments {
  const void* x;       // [B, H, W, C], channels side by side
  const void* taps;    // [K * K, C], of `taps_type`
  const void* bias;    // [C] or null, of `taps_type`
  const void* weight;  // [C] or null: the norm's, of `affine_type`
  const void* shift;   // [C] or null: its bias
  void* out;           // [B, H, W, C], contiguous, of `out_type`
  float* stats;        // [B * H * W, 2]: mean and 1 / deviation; or null
  i64 sb, sy, sx;      // of x, in elements
  int batch, height, width, channels;
  int segments, rows;  // a strip is cut into `segments` of `rows` lines
  int slots;           // strips of a block
  int chunks;          // warps of a strip, 32 channels each
  int groups;          // blocks that share a strip's channels: one where there is a norm
  int lanes;           // of a warp, that share a pixel's norm: a power of two
  int norm;            // of enum Norm
  int operand;         // what x in float32 is rounded to; kFloat: nothing
  int taps_type, affine_type, out_type;
  int flipped;  // taps in the opposite order
  float eps;
};

enum Norm : int { kLayer = 0, kRms = 1, kNone = 2 };

struct GradientArguments {
  const void* grad;  // [B, H, W, C], channels side by side, of `grad_type`
  const void* x;     // the same, of the kernel's type
  float* sums;       // [blocks / groups, K * K + 1, C]: of the taps, then of the bias
  i64 gb, gy, gx, sb, sy, sx;
  int batch, height, width, channels;
  int segments, rows, slots, chunks, groups;  // as above
  int operand, grad_type;
};

// A strip of results, or none, where image is the batch's size.
struct Place {
  int image, y, x;  // the first line and column
  int end;          // past the last line
};

template <class A>
VITFAST_DEVICE Place place(const A& a, int across, i64 unit) {
  const int strips = (a.width + across - 1) / across;
  const i64 segment = unit / strips, image = segment / a.segments;
  const int y = static_cast<int>(segment % a.segments) * a.rows;
  const int end = y + a.rows < a.height ? y + a.rows : a.height;
  if (image >= a.batch) return Place{a.batch, 0, 0, 0};
  return Place{static_cast<int>(image), y, static_cast<int>(unit % strips) * across, end};
}

// The strip and the channel of a thread: its place in the block, and the channel or none, C.
struct Share {
  int slot, channel;
  i64 block;  // number of the block among those of the same channels
};
template <class A>
VITFAST_DEVICE Share share(const A& a) {
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  const int group = static_cast<int>(block_index() % a.groups);
  const int channel = (group * a.chunks + warp % a.chunks) * 32 + lane;
  return Share{warp / a.chunks, channel < a.channels ? channel : a.channels,
               block_index() / a.groups};
}

// A line of one channel. T is void where `type` says what the elements are.
template <class T>
struct Line {
  const T* row;  // column 0 of the channel
  i64 step;      // from one column to the next
  VITFAST_DEVICE float operator[](int column) const { return to_float(row[column * step]); }
};
template <>
struct Line<void> {
  const void* row;
  i64 first, step;
  int type;
  VITFAST_DEVICE float operator[](int column) const {
    return load(row, type, first + column * step);
  }
};

// Columns [first, first + N) of a line, zero beside the map.
template <int N, class L>
VITFAST_DEVICE void read(const L& line, int first, int width, float (&values)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int column = first + i;
    values[i] = column >= 0 && column < width ? line[column] : 0.f;
  }
}
// The same of x, rounded.
template <class T, int N>
VITFAST_DEVICE void read_x(const T* row, i64 step, int first, int width, int operand,
                           float (&values)[N]) {
  read(Line<T>{row, step}, first, width, values);
  if (sizeof(T) < sizeof(float) || operand == kFloat) return;
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = rounded_to(operand, values[i]);
}

// Norms a line of results of all strips of a block: places, [slots], and rows, [slots][kAcross]
// [stride], in shared memory.
template <int kAcross>
VITFAST_DEVICE void normalise(const ConvolveArguments& a, const Place* places, const float* rows,
                              int stride, int line) {
  const int C = a.channels, lane = thread_index() % a.lanes;
  const int pixels = a.slots * kAcross, groups = threads_of_block() / a.lanes;
  for (int first = 0; first < pixels; first += groups) {  // the same for all lanes of a warp
    const int pixel = first + thread_index() / a.lanes;
    const Place at = pixel < pixels ? places[pixel / kAcross] : Place{a.batch, 0, 0, 0};
    const int y = at.y + line, x = at.x + pixel % kAcross;
    const bool mine = y < at.end && x < a.width;
    const float* row = rows + pixel * stride;
    const int count = mine ? C : 0;
    float mean = 0.f, squares = 0.f;
    if (a.norm == kLayer) {
      for (int c = lane; c < count; c += a.lanes) mean += row[c];
      for (int mask = 1; mask < a.lanes; mask *= 2) mean += shuffle_xor(mean, mask);
      mean /= static_cast<float>(C);
    }
    for (int c = lane; c < count; c += a.lanes)
      squares = fma(row[c] - mean, row[c] - mean, squares);
    for (int mask = 1; mask < a.lanes; mask *= 2) squares += shuffle_xor(squares, mask);
    if (!mine) continue;
    const float scale = inverse_root(squares / static_cast<float>(C) + a.eps);
    const i64 token = (static_cast<i64>(at.image) * a.height + y) * a.width + x;
    const auto value = [&](int c) {
      const float normed = (row[c] - mean) * scale;
      const float weighted = a.weight ? normed * load(a.weight, a.affine_type, c) : normed;
      return a.shift ? weighted + load(a.shift, a.affine_type, c) : weighted;
    };
    if (C % 2 == 0) {
      for (int c = 2 * lane; c < C; c += 2 * a.lanes)
        store_two(a.out, a.out_type, token * C + c, value(c), value(c + 1));
    } else {
      for (int c = lane; c < C; c += a.lanes) store(a.out, a.out_type, token * C + c, value(c));
    }
    if (a.stats && lane == 0) {
      a.stats[2 * token] = mean;
      a.stats[2 * token + 1] = scale;
    }
  }
}

template <class T, int K, int kAcross>
VITFAST_DEVICE void convolve(const ConvolveArguments& a) {
  constexpr int kReach = K / 2, kColumns = kAcross + 2 * kReach;
  const int C = a.channels;
  const Share my = share(a);
  const Place at = place(a, kAcross, my.block * a.slots + my.slot);
  const int c = my.channel;
  const bool mine = my.slot < a.slots && c < C && at.image < a.batch;
  const int stride = C + 8;  // four pixels that a warp norms at once begin in different banks
  Place* const places = static_cast<Place*>(shared());
  float* const shared_rows = reinterpret_cast<float*>(places + a.slots);
  if (a.norm != kNone && my.slot < a.slots && c == 0) places[my.slot] = at;
  const T* const image = static_cast<const T*>(a.x) + at.image * a.sb + c;

  float tap[K * K], sum[K][kAcross];
#pragma unroll
  for (int i = 0; i < K * K; ++i) {
    const i64 which = a.flipped ? K * K - 1 - i : i;
    tap[i] = mine ? load(a.taps, a.taps_type, which * C + c) : 0.f;
  }
  const float bias = mine && a.bias ? load(a.bias, a.taps_type, c) : 0.f;

  // Line number n of x is at.y - kReach + n; it adds to lines n - 2 kReach to n of the segment,
  // which take turns in the K places of `sum`.
  const int lines = a.rows + 2 * kReach;
  for (int base = 0; base < lines; base += K) {
#pragma unroll
    for (int j = 0; j < K; ++j) {
      const int y = at.y - kReach + base + j;
#pragma unroll
      for (int i = 0; i < kAcross; ++i) sum[j][i] = bias;
      if (mine && y >= 0 && y < a.height && y < at.end + kReach) {
        float values[kColumns];
        read_x(image + y * a.sy, a.sx, at.x - kReach, a.width, a.operand, values);
#pragma unroll
        for (int ky = 0; ky < K; ++ky) {
          const int result = y + kReach - ky;
          if (result < at.y || result >= at.end) continue;
          float (&to)[kAcross] = sum[(j - ky + K) % K];
#pragma unroll
          for (int kx = 0; kx < K; ++kx) {
#pragma unroll
            for (int i = 0; i < kAcross; ++i) to[i] = fma(values[i + kx], tap[ky * K + kx], to[i]);
          }
        }
      }
      const int line = base + j - 2 * kReach;
      if (line < 0 || line >= a.rows) continue;  // the same for the whole block
      float (&done)[kAcross] = sum[(j + 1) % K];
      if (a.norm == kNone) {
        if (mine && at.y + line < at.end) {
          const i64 token = (static_cast<i64>(at.image) * a.height + at.y + line) * a.width + at.x;
#pragma unroll
          for (int i = 0; i < kAcross; ++i)
            if (at.x + i < a.width) store(a.out, a.out_type, (token + i) * C + c, done[i]);
        }
        continue;
      }
      // Two buffers: who is ahead writes the next line while others norm this one.
      float* const rows = shared_rows + line % 2 * (a.slots * kAcross * stride);
      if (mine) {
#pragma unroll
        for (int i = 0; i < kAcross; ++i) rows[(my.slot * kAcross + i) * stride + c] = done[i];
      }
      barrier();
      normalise<kAcross>(a, places, rows, stride, line);
    }
  }
}

// Sums over a part of the map of grad * x, shifted by each tap. A thread adds up one strip of
// `rows` lines at a time, then adds that to its sums in shared memory: chains are short, and no two
// threads share a sum until the block's strips are added in order.
template <class T, int K, int kAcross>
VITFAST_DEVICE void gradient(const GradientArguments& a) {
  constexpr int kReach = K / 2, kColumns = kAcross + 2 * kReach, kSums = K * K + 1;
  const int C = a.channels, threads = threads_of_block();
  const Share my = share(a);
  const int c = my.channel;
  const bool mine = my.slot < a.slots && c < C;
  float* const totals = static_cast<float*>(shared()) + thread_index();  // [kSums][threads]
  for (int i = 0; i < kSums; ++i) totals[i * threads] = 0.f;

  const int strips = (a.width + kAcross - 1) / kAcross;
  const i64 units = mine ? static_cast<i64>(a.batch) * a.segments * strips : 0;
  const i64 step = blocks() / a.groups * a.slots;
  for (i64 unit = my.block * a.slots + my.slot; unit < units; unit += step) {
    const Place at = place(a, kAcross, unit);
    const T* const image = static_cast<const T*>(a.x) + at.image * a.sb + c;
    float sum[K * K] = {}, grads[K][kAcross] = {}, bias = 0.f;
    const int lines = a.rows + 2 * kReach;
    for (int base = 0; base < lines; base += K) {
#pragma unroll
      for (int j = 0; j < K; ++j) {
        const int line = base + j, y = at.y - kReach + line;
        if (at.y + line < at.end) {
          const Line<void> row{a.grad, at.image * a.gb + (at.y + line) * a.gy + c, a.gx,
                               a.grad_type};
          read(row, at.x, a.width, grads[j]);
#pragma unroll
          for (int i = 0; i < kAcross; ++i) bias += grads[j][i];
        }
        if (y < 0 || y >= a.height || y >= at.end + kReach) continue;
        float values[kColumns];
        read_x(image + y * a.sy, a.sx, at.x - kReach, a.width, a.operand, values);
#pragma unroll
        for (int ky = 0; ky < K; ++ky) {
          const int result = y + kReach - ky;
          if (result < at.y || result >= at.end) continue;
          const float (&of)[kAcross] = grads[(j - ky + K) % K];
#pragma unroll
          for (int kx = 0; kx < K; ++kx) {
#pragma unroll
            for (int i = 0; i < kAcross; ++i)
              sum[ky * K + kx] = fma(values[i + kx], of[i], sum[ky * K + kx]);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < K * K; ++i) totals[i * threads] += sum[i];
    totals[K * K * threads] += bias;
  }
  barrier();
  if (my.slot != 0 || c >= C) return;
  for (int i = 0; i < kSums; ++i) {
    float sum = 0.f;
    for (int s = 0; s < a.slots; ++s) sum += totals[i * threads + s * a.chunks * 32];
    a.sums[(my.block * kSums + i) * C + c] = sum;
  }
}

// Columns of a strip, by how many registers its sums and taps may take: of 168 in blocks of up to
// 384 threads; of 96 in those of up to 640, which kernels of at most 7 x 7 have too, for norms over
// more channels; of 255 in those of up to 256, for larger kernels (K = 11 has 121 taps) and where
// the taps' gradient is summed.
VITFAST_CONSTANT int wide(int K) { return K <= 7 ? 7 : K == 9 ? 3 : 1; }
VITFAST_CONSTANT int most_threads(int K) { return K <= 7 ? 384 : 256; }
VITFAST_CONSTANT int narrow(int K) { return K <= 3 ? 7 : K == 5 ? 4 : 2; }

#define VITFAST_DWCONV(name, T, K)                                               \
  VITFAST_KERNEL(dwconv_wide_##name##_##K, most_threads(K), ConvolveArguments) { \
    convolve<T, K, wide(K)>(a);                                                  \
  }                                                                              \
  VITFAST_KERNEL(dwconv_taps_##name##_##K, 256, GradientArguments) { gradient<T, K, wide(K)>(a); }
#define VITFAST_DWCONV_BOTH(name, T, K)                                \
  VITFAST_DWCONV(name, T, K)                                           \
  VITFAST_KERNEL(dwconv_narrow_##name##_##K, 640, ConvolveArguments) { \
    convolve<T, K, narrow(K)>(a);                                      \
  }

// All of them; or of one type and size, which is what a compiler at run time is asked for.
#if defined(VITFAST_TYPE)
#if VITFAST_SIZE <= 7
#define VITFAST_DWCONV_ONE(name, T, K) VITFAST_DWCONV_BOTH(name, T, K)
#else
#define VITFAST_DWCONV_ONE(name, T, K) VITFAST_DWCONV(name, T, K)
#endif
VITFAST_DWCONV_ONE(VITFAST_NAME, VITFAST_TYPE, VITFAST_SIZE)
#else
#define VITFAST_DWCONV_SIZES(name, T) \
  VITFAST_DWCONV_BOTH(name, T, 3)     \
  VITFAST_DWCONV_BOTH(name, T, 5)     \
  VITFAST_DWCONV_BOTH(name, T, 7)     \
  VITFAST_DWCONV(name, T, 9)          \
  VITFAST_DWCONV(name, T, 11)
VITFAST_DWCONV_SIZES(f32, float)
#if !defined(VITFAST_FLOAT_ALONE)
VITFAST_DWCONV_SIZES(f16, half)
VITFAST_DWCONV_SIZES(bf16, bfloat16)
#endif
#endif

}  // namespace vitfast
