// CUDA's names on the CPU: what csrc/cuda/simt.cuh includes in place of CUDA's headers.
#pragma once
#include <math.h>

#include <algorithm>
#include <bit>
#include <cassert>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <type_traits>

#include "machine.hpp"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

#define threadIdx (::tf::emulator::block->current->id)
#define blockIdx (::tf::emulator::block->id)
#define blockDim (::tf::emulator::block->shape)
#define gridDim (::tf::emulator::block->grid)
constexpr int warpSize = 32;

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// CUDA has these two in the global namespace, for mixed types.
template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}

namespace tf::emulator {
template <class To, class From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

struct Shuffle {
  uint64_t value;
  unsigned source;
  uint64_t result;
};
void execute_shuffle(void* const* payloads, unsigned mask);

template <class V>
V shuffle(const char* what, unsigned mask, V value, unsigned source) {
  static_assert(sizeof(V) <= 8);
  Shuffle s{0, source, 0};
  std::memcpy(&s.value, &value, sizeof value);
  warp_instruction(what, mask, &s, execute_shuffle);
  std::memcpy(&value, &s.result, sizeof value);
  return value;
}

struct Vote {
  unsigned value, result;
};
void execute_ballot(void* const* payloads, unsigned mask);
inline unsigned ballot(const char* what, unsigned mask, bool value) {
  Vote v{value, 0};
  warp_instruction(what, mask, &v, execute_ballot);
  return v.result;
}
inline void no_payload(void* const*, unsigned) {}

template <class T, class F>
T atomic_update(T* p, F&& f) {
  check_global(p, sizeof(T), alignof(T), true);
  T before = *p;
  *p = f(before);
  return before;
}
}  // namespace tf::emulator

inline void __syncthreads() { tf::emulator::barrier(0, 0, true); }
inline void __syncwarp(unsigned mask = ~0u) {
  tf::emulator::warp_instruction("__syncwarp", mask, nullptr, tf::emulator::no_payload);
}
template <class V>
V __shfl_sync(unsigned mask, V v, int source, int width = 32) {
  const unsigned within = unsigned(width - 1);
  return tf::emulator::shuffle("__shfl_sync", mask, v, (tf::emulator::lane() & ~within) | (unsigned(source) & within));
}
template <class V>
V __shfl_xor_sync(unsigned mask, V v, int flip, int width = 32) {
  const unsigned l = tf::emulator::lane(), source = l ^ unsigned(flip);
  return tf::emulator::shuffle("__shfl_xor_sync", mask, v, source < ((l & ~unsigned(width - 1)) + width) ? source : l);
}
template <class V>
V __shfl_down_sync(unsigned mask, V v, unsigned delta, int width = 32) {
  const unsigned l = tf::emulator::lane();
  return tf::emulator::shuffle("__shfl_down_sync", mask, v, l % width + delta < unsigned(width) ? l + delta : l);
}
template <class V>
V __shfl_up_sync(unsigned mask, V v, unsigned delta, int width = 32) {
  const unsigned l = tf::emulator::lane();
  return tf::emulator::shuffle("__shfl_up_sync", mask, v, l % width >= delta ? l - delta : l);
}
inline unsigned __ballot_sync(unsigned mask, int v) { return tf::emulator::ballot("__ballot_sync", mask, v); }
inline int __any_sync(unsigned mask, int v) { return tf::emulator::ballot("__any_sync", mask, v) != 0; }
inline int __all_sync(unsigned mask, int v) { return tf::emulator::ballot("__all_sync", mask, v) == mask; }

inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) { tf::emulator::spin(); }
[[noreturn]] inline void __trap() { tf::emulator::fail("__trap()"); }

inline float atomicAdd(float* p, float v) {
  return tf::emulator::atomic_update(p, [=](float x) { return x + v; });
}
inline int atomicAdd(int* p, int v) {
  return tf::emulator::atomic_update(p, [=](int x) { return x + v; });
}
inline unsigned atomicAdd(unsigned* p, unsigned v) {
  return tf::emulator::atomic_update(p, [=](unsigned x) { return x + v; });
}
inline int atomicMax(int* p, int v) {
  return tf::emulator::atomic_update(p, [=](int x) { return x < v ? v : x; });
}

inline int __float_as_int(float x) { return tf::emulator::bits<int>(x); }
inline unsigned __float_as_uint(float x) { return tf::emulator::bits<unsigned>(x); }
inline float __int_as_float(int x) { return tf::emulator::bits<float>(x); }
inline float __uint_as_float(unsigned x) { return tf::emulator::bits<float>(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline int __float2int_rn(float x) { return int(std::nearbyint(x)); }

namespace tf::cuda {

struct half_t {
  uint16_t bits;
};
struct bf16_t {
  uint16_t bits;
};

}  // namespace tf::cuda
