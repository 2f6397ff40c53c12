// The machine model of the CUDA kernels: CUDA's own headers under nvcc; under g++ with TF_EMULATE the same names on the
// CPU (tests/native/emulator), where every access is checked.
//
// Rules that let a kernel be tested without a GPU. Global and shared memory are accessed only by load, store and the
// like below, or by a wrapper of ptx.cuh. Shared memory is dynamic and named by TF_SHARED. Kernels are launched by
// TF_LAUNCH.
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "types.hpp"

#ifdef TF_EMULATE
#include "simt_model.hpp"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#define TF_DEVICE __device__ __forceinline__
#define TF_GRID_CONSTANT const __grid_constant__

// 1 where the instructions of sm_90a may be used: guards the bodies of kernels that need them.
#if defined(TF_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define TF_SM90A 1
#else
#define TF_SM90A 0
#endif

namespace tf::cuda {

using Stream = void*;  // cudaStream_t: bindings need no CUDA header

template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  T v[N];
};

#ifndef TF_EMULATE

using half_t = __half;
using bf16_t = __nv_bfloat16;

#define TF_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]

TF_DEVICE float to_float(float x) { return x; }
TF_DEVICE float to_float(half_t x) { return __half2float(x); }
TF_DEVICE float to_float(bf16_t x) { return __bfloat162float(x); }

template <class T>
TF_DEVICE T from_float(float x) {
  if constexpr (std::is_same_v<T, half_t>) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same_v<T, bf16_t>) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

// Two values in one register, lo in the low half, as mma takes them.
template <class T>
TF_DEVICE uint32_t pair_of(float lo, float hi) {
  uint32_t r;
  if constexpr (std::is_same_v<T, half_t>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  }
  return r;
}

template <class T>
TF_DEVICE float2 floats_of_pair(uint32_t r) {
  if constexpr (std::is_same_v<T, half_t>) {
    return __half22float2(*reinterpret_cast<const __half2*>(&r));
  } else {
    return {__uint_as_float(r << 16), __uint_as_float(r & 0xffff0000u)};
  }
}

// Global memory; *_vec: one access of 16, 8 or 4 bytes, aligned to its size.
template <class T>
TF_DEVICE T load(const T* global) {
  return *global;
}
template <class T>
TF_DEVICE void store(T* global, T value) {
  *global = value;
}

namespace detail {
template <int Bytes>
struct Word;
template <>
struct Word<16> {
  using type = uint4;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<4> {
  using type = unsigned;
};
template <>
struct Word<2> {
  using type = unsigned short;
};
}  // namespace detail

template <int N, class T>
TF_DEVICE Vec<T, N> load_vec(const T* global) {
  using W = typename detail::Word<sizeof(Vec<T, N>)>::type;
  const W word = *reinterpret_cast<const W*>(global);
  return *reinterpret_cast<const Vec<T, N>*>(&word);
}
template <class T, int N>
TF_DEVICE void store_vec(T* global, const Vec<T, N>& value) {
  using W = typename detail::Word<sizeof(Vec<T, N>)>::type;
  *reinterpret_cast<W*>(global) = *reinterpret_cast<const W*>(&value);
}

template <class T>
TF_DEVICE T load_shared(const T* shared) {
  return *shared;
}
template <class T>
TF_DEVICE void store_shared(T* shared, T value) {
  *shared = value;
}
template <int N, class T>
TF_DEVICE Vec<T, N> load_shared_vec(const T* shared) {
  return load_vec<N>(shared);
}
template <class T, int N>
TF_DEVICE void store_shared_vec(T* shared, const Vec<T, N>& value) {
  store_vec(shared, value);
}

// For values shared between blocks of one launch: semaphores and counters in global memory.
template <class T>
TF_DEVICE T load_acquire(const T* global) {
  static_assert(sizeof(T) == 4);
  uint32_t r;
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(r) : "l"(__cvta_generic_to_global(global)) : "memory");
  return *reinterpret_cast<const T*>(&r);
}
template <class T>
TF_DEVICE void store_release(T* global, T value) {
  static_assert(sizeof(T) == 4);
  asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(__cvta_generic_to_global(global)),
               "r"(*reinterpret_cast<const uint32_t*>(&value))
               : "memory");
}

// ---- Host.

namespace detail {
inline void check(cudaError_t error, const std::string& what) {
  if (error != cudaSuccess) throw std::runtime_error("transformer_fast: " + what + ": " + cudaGetErrorString(error));
}

template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, Stream stream, A&&... args) {
  const auto text = [&] {
    const auto shape = [](dim3 d) {
      return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
    };
    return std::string("CUDA kernel ") + name + ", grid " + shape(grid) + ", block " + shape(block) + ", " +
           std::to_string(shared) + " bytes of shared memory";
  };
  if (shared > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
    if (error != cudaSuccess) check(error, text());
  }
  kernel<<<grid, block, shared, static_cast<cudaStream_t>(stream)>>>(static_cast<A&&>(args)...);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) check(error, text());
}
}  // namespace detail

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  detail::check(cudaGetDevice(&device), "cudaGetDevice");
  detail::check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}
// Of the current device.
inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }
inline int compute_capability() {  // 80, 90, 100, 120 ...
  return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor) +
         device_attribute(cudaDevAttrComputeCapabilityMinor);
}
inline void fill_zero(void* global, size_t bytes, Stream stream) {
  detail::check(cudaMemsetAsync(global, 0, bytes, static_cast<cudaStream_t>(stream)), "cudaMemsetAsync");
}

// TF_LAUNCH((kernel<a, b>), grid, block, shared_bytes, stream, args...): throws std::runtime_error, naming kernel and
// configuration, when the launch is refused.
#define TF_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::tf::cuda::detail::launch(#kernel, kernel, grid, block, shared_bytes, stream, __VA_ARGS__)

#endif  // TF_EMULATE

}  // namespace tf::cuda

#ifdef TF_EMULATE
#include "simt_memory_model.hpp"
#endif
