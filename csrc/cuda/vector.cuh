// The elements that one thread reads and writes in one access.
#pragma once
#include "ptx.cuh"
#include "simt.cuh"

namespace tf::cuda {

// 16 bytes, or one element where rows are not aligned to 16; kept as stored, two 16-bit elements per register.
template <class T, int kWidth>
struct Vector {
  static_assert(kWidth == 1 || kWidth * sizeof(T) == 16);
  static constexpr int kColumns = kWidth;
  uint32_t word[kWidth == 1 ? 1 : 4];

  TF_DEVICE void clear() {
#pragma unroll
    for (uint32_t& w : word) w = 0;
  }
  TF_DEVICE void read(const T* from) {
    if constexpr (kWidth == 1) {
      word[0] = float_bits(to_float(load(from)));
    } else {
      const Vec<uint32_t, 4> four = load_vec<4>(reinterpret_cast<const uint32_t*>(from));
#pragma unroll
      for (int i = 0; i < 4; ++i) word[i] = four.v[i];
    }
  }
  TF_DEVICE void write(T* to) const {
    if constexpr (kWidth == 1) {
      store(to, from_float<T>(bits_float(word[0])));
    } else {
      store_vec(reinterpret_cast<uint32_t*>(to), Vec<uint32_t, 4>{{word[0], word[1], word[2], word[3]}});
    }
  }
  TF_DEVICE void get(float (&f)[kWidth]) const {
    if constexpr (kWidth == 8) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 two = floats_of_pair<T>(word[i]);
        f[2 * i] = two.x;
        f[2 * i + 1] = two.y;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) f[i] = bits_float(word[i]);
    }
  }
  // Makes the compiler unpack the words again: it would keep the floats of get(), twice the registers, over a barrier.
  TF_DEVICE void forget() {
#ifndef TF_EMULATE
#pragma unroll
    for (uint32_t& w : word) asm volatile("" : "+r"(w));
#endif
  }
  // Rounds to T.
  TF_DEVICE void set(const float (&f)[kWidth]) {
    if constexpr (kWidth == 8) {
#pragma unroll
      for (int i = 0; i < 4; ++i) word[i] = pair_of<T>(f[2 * i], f[2 * i + 1]);
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) word[i] = float_bits(to_float(from_float<T>(f[i])));
    }
  }

 private:
  static TF_DEVICE float bits_float(uint32_t bits) { return __uint_as_float(bits); }
  static TF_DEVICE uint32_t float_bits(float f) { return __float_as_uint(f); }
};

}  // namespace tf::cuda
