// Rotary position embedding of queries or keys: one read and one write, a pair of vectors per thread.
#include "rotary.hpp"

#include <algorithm>

#include "vector.cuh"
#include "simt.cuh"

namespace tf::cuda {
namespace {

constexpr int kThreads = 256;

template <class T, int kWidth>
struct Head {  // one head of one token
  const Rotary& p;
  const T* x;
  T* y;
  const float *cos, *sin;

  TF_DEVICE void angles(int64_t pair, float (&c)[kWidth], float (&s)[kWidth]) const {
    if constexpr (kWidth == 1) {
      c[0] = load(cos + pair);
      s[0] = load(sin + pair);
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; i += 4) {
        const Vec<float, 4> four = load_vec<4>(cos + pair + i), other = load_vec<4>(sin + pair + i);
#pragma unroll
        for (int j = 0; j < 4; ++j) c[i + j] = four.v[j], s[i + j] = other.v[j];
      }
    }
#pragma unroll
    for (float& f : s) f = p.inverse ? -f : f;
  }
  // kWidth pairs; the members of a pair are half a head apart.
  TF_DEVICE void halves(int64_t pair) const {
    float c[kWidth], s[kWidth], x1[kWidth], x2[kWidth], y1[kWidth], y2[kWidth];
    angles(pair, c, s);
    Vector<T, kWidth> first, second;
    first.read(x + pair);
    second.read(x + p.half + pair);
    first.get(x1);
    second.get(x2);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      y1[i] = x1[i] * c[i] - x2[i] * s[i];
      y2[i] = x2[i] * c[i] + x1[i] * s[i];
    }
    first.set(y1);
    second.set(y2);
    first.write(y + pair);
    second.write(y + p.half + pair);
  }
  // A pair is two neighbouring columns.
  TF_DEVICE void interleaved(int64_t pair) const {
    const float c = load(cos + pair), s = p.inverse ? -load(sin + pair) : load(sin + pair);
    const float x1 = to_float(load(x + 2 * pair)), x2 = to_float(load(x + 2 * pair + 1));
    store(y + 2 * pair, from_float<T>(x1 * c - x2 * s));
    store(y + 2 * pair + 1, from_float<T>(x2 * c + x1 * s));
  }
};

// threadIdx.x runs over the pairs of a head, threadIdx.y over heads.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, 2) rotary_kernel(const Rotary p) {
  const int64_t rows = p.batch * p.length * p.heads;
  for (int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; row < rows;
       row += int64_t(gridDim.x) * blockDim.y) {
    const int64_t token = row / p.heads, h = row - token * p.heads, b = token / p.length, t = token - b * p.length;
    const int64_t position = p.positions ? load(p.positions + b * p.position_batch + t * p.position_token) : t;
    const Head<T, kWidth> head{p, static_cast<const T*>(p.x) + b * p.x_batch + t * p.x_token + h * p.x_head,
                               static_cast<T*>(p.y) + row * p.width, p.cos + position * p.half,
                               p.sin + position * p.half};
    for (int64_t pair = threadIdx.x * kWidth; pair < p.half; pair += blockDim.x * kWidth) {
      if (kWidth == 1 && p.interleaved) {
        head.interleaved(pair);
      } else {
        head.halves(pair);
      }
    }
    for (int64_t column = 2 * p.half + threadIdx.x; column < p.width; column += blockDim.x)
      store(head.y + column, load(head.x + column));
  }
}

template <class T>
void launch(const Rotary& p, Stream stream) {
  constexpr int kWidth = 16 / sizeof(T);
  const auto even = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  const bool vectors = !p.interleaved && p.half % kWidth == 0 && p.width % kWidth == 0 && p.x_batch % kWidth == 0 &&
                       p.x_token % kWidth == 0 && p.x_head % kWidth == 0 && even(p.x) && even(p.y) && even(p.cos) &&
                       even(p.sin);
  const int64_t columns = vectors ? p.half / kWidth : std::max(p.half, p.width - 2 * p.half);
  int threads = 1;
  while (threads < columns && threads < 32) threads *= 2;
  const dim3 block(threads, kThreads / threads);
  const int64_t rows = p.batch * p.length * p.heads, blocks = (rows + block.y - 1) / block.y;
  const dim3 grid(unsigned(std::min<int64_t>(blocks, int64_t(1) << 30)));
  if (vectors) {
    TF_LAUNCH((rotary_kernel<T, kWidth>), grid, block, 0, stream, p);
  } else {
    TF_LAUNCH((rotary_kernel<T, 1>), grid, block, 0, stream, p);
  }
}

}  // namespace

void rotary(const Rotary& p, Stream stream) {
  switch (p.dtype) {
    case DType::f32: return launch<float>(p, stream);
    case DType::bf16: return launch<bf16_t>(p, stream);
    case DType::f16: return launch<half_t>(p, stream);
  }
}

}  // namespace tf::cuda
