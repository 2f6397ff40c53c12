// New queries and keys of a decoder are normed and rotated, keys and values appended to the cache, all in one launch.
//
// A row is one head of one token; the rows of a token are its queries, keys, then values. Up to 32 threads share a row.
// A norm reads its row twice, the second time from the L1 cache.
#include "rotary_append.hpp"

#include <algorithm>

#include "norm_row.cuh"

namespace tf::cuda {
namespace {

constexpr int kThreads = 128;  // a decoding step has few rows: small blocks reach more multiprocessors

template <class T, int kWidth>
struct AppendRow {
  const RotaryAppend& p;
  const T* x;
  T* y;
  Parameter weight;  // null for no norm
  float scale;       // of the norm

  // Loads kWidth columns, normed if there is a norm.
  TF_DEVICE void read(int column, float (&f)[kWidth]) const {
    Vector<T, kWidth> vector;
    vector.read(x + column);
    vector.get(f);
    if (!weight.data) return;
    float w[kWidth];
    read_parameter<T>(weight, column, w);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) f[i] *= scale * w[i];
  }
  TF_DEVICE void write(int column, const float (&f)[kWidth]) const {
    Vector<T, kWidth> vector;
    vector.set(f);
    vector.write(y + column);
  }
  // This thread's share of the sum of squares.
  TF_DEVICE float squares() const {
    float total = 0.f;
    for (int column = threadIdx.x * kWidth; column < p.width; column += blockDim.x * kWidth) {
      float f[kWidth];
      Vector<T, kWidth> vector;
      vector.read(x + column);
      vector.get(f);
#pragma unroll
      for (float v : f) total += v * v;
    }
    return total;
  }
  TF_DEVICE void copy(int64_t begin) const {
    for (int64_t column = begin + threadIdx.x * kWidth; column < p.width; column += blockDim.x * kWidth) {
      float f[kWidth];
      read(int(column), f);
      write(int(column), f);
    }
  }
  TF_DEVICE void rotate(int64_t position) const {
    const float *cos = p.cos + position * p.half, *sin = p.sin + position * p.half;
    for (int pair = threadIdx.x * kWidth; pair < p.half; pair += blockDim.x * kWidth) {
      const bool neighbours = kWidth == 1 && p.interleaved;
      const int first = neighbours ? 2 * pair : pair, second = neighbours ? 2 * pair + 1 : int(p.half) + pair;
      float c[kWidth], s[kWidth], x1[kWidth], x2[kWidth], y1[kWidth], y2[kWidth];
      read_parameter<T>({cos, true}, pair, c);
      read_parameter<T>({sin, true}, pair, s);
      read(first, x1);
      read(second, x2);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        y1[i] = x1[i] * c[i] - x2[i] * s[i];
        y2[i] = x2[i] * c[i] + x1[i] * s[i];
      }
      write(first, y1);
      write(second, y2);
    }
    copy(2 * p.half);
  }
};

template <class T>
TF_DEVICE T* head_of(const HeadRows& rows, int64_t b, int64_t token, int64_t h) {
  return static_cast<T*>(rows.data) + b * rows.batch + token * rows.token + h * rows.head;
}

// threadIdx.x runs over the columns of a head, threadIdx.y over heads. blockDim.x is a power of two up to 32.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, 6) rotary_append_kernel(const RotaryAppend p) {
  const int64_t of_token = p.heads + 2 * p.key_heads, rows = p.batch * p.length * of_token;
  for (int64_t first = int64_t(blockIdx.x) * blockDim.y; first < rows; first += int64_t(gridDim.x) * blockDim.y) {
    const int64_t row = first + threadIdx.y;
    const bool exists = row < rows;  // no early exit: the threads of a warp add squares together
    const int64_t token = exists ? row / of_token : 0, h = exists ? row - token * of_token : 0;
    const int64_t b = token / p.length, t = token - b * p.length;
    const int64_t used = p.long_lengths ? load(static_cast<const int64_t*>(p.lengths) + b * p.length_stride)
                                        : load(static_cast<const int32_t*>(p.lengths) + b * p.length_stride);
    const int64_t stored = used + t;
    const bool query = h < p.heads, value = h >= p.heads + p.key_heads;
    const int64_t of_part = query ? h : h - p.heads - (value ? p.key_heads : 0);
    const HeadNorm norm = query ? p.query_norm : value ? HeadNorm{} : p.key_norm;
    AppendRow<T, kWidth> head{p, head_of<const T>(query ? p.query : value ? p.value : p.key, b, t, of_part), nullptr,
                              {norm.weight, norm.wide}, 1.f};
    head.y = query ? head_of<T>(p.y, b, t, h) : head_of<T>(value ? p.value_cache : p.key_cache, b, stored, of_part);
    if (p.query_norm.weight || p.key_norm.weight) {
      float total = exists && head.weight.data ? head.squares() : 0.f;
#pragma unroll
      for (int offset = 16; offset; offset /= 2) {
        if (offset < int(blockDim.x)) total += __shfl_xor_sync(0xffffffffu, total, offset);
      }
      head.scale = 1.f / sqrtf(total / float(p.width) + p.eps);
    }
    // Past the end of a cache nothing is written.
    if (!exists || (!query && (stored < 0 || stored >= p.capacity))) continue;
    if (value) {
      head.copy(0);
    } else {
      head.rotate(p.positions ? load(p.positions + b * p.position_batch + t * p.position_token) : stored);
    }
  }
}

template <class T>
void launch(const RotaryAppend& p, Stream stream) {
  constexpr int kWidth = 16 / sizeof(T);
  bool vectors = !p.interleaved && p.half % kWidth == 0 && p.width % kWidth == 0 && aligned(p.cos) && aligned(p.sin) &&
                 aligned(p.query_norm.weight) && aligned(p.key_norm.weight);
  for (const HeadRows* rows : {&p.query, &p.key, &p.value, &p.y, &p.key_cache, &p.value_cache})
    vectors = vectors && aligned(rows->data) && rows->batch % kWidth == 0 && rows->token % kWidth == 0 &&
              rows->head % kWidth == 0;
  const int64_t columns = std::max(p.half, p.width - 2 * p.half) / (vectors ? kWidth : 1);
  int threads = 1;
  while (threads < columns && threads < 32) threads *= 2;
  const dim3 block(threads, kThreads / threads);
  const int64_t rows = p.batch * p.length * (p.heads + 2 * p.key_heads), blocks = (rows + block.y - 1) / block.y;
  const dim3 grid(unsigned(std::min<int64_t>(blocks, int64_t(1) << 30)));
  if (vectors) {
    TF_LAUNCH((rotary_append_kernel<T, kWidth>), grid, block, 0, stream, p);
  } else {
    TF_LAUNCH((rotary_append_kernel<T, 1>), grid, block, 0, stream, p);
  }
}

}  // namespace

void rotary_append(const RotaryAppend& p, Stream stream) {
  switch (p.dtype) {
    case DType::f32: return launch<float>(p, stream);
    case DType::bf16: return launch<bf16_t>(p, stream);
    case DType::f16: return launch<half_t>(p, stream);
  }
}

}  // namespace tf::cuda
