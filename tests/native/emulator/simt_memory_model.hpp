// load, store and the rest of csrc/cuda/simt.cuh, on the CPU.
#pragma once

#define TF_SHARED(name) unsigned char* const name = ::tf::emulator::block->shared

namespace tf::cuda {

inline float to_float(float x) { return x; }
inline float to_float(half_t x) { return float(emulator::bits<_Float16>(x.bits)); }
inline float to_float(bf16_t x) { return emulator::bits<float>(uint32_t(x.bits) << 16); }

template <class T>
inline T from_float(float x) {
  if constexpr (std::is_same_v<T, half_t>) {
    return {emulator::bits<uint16_t>(_Float16(x))};
  } else if constexpr (std::is_same_v<T, bf16_t>) {
    const uint32_t u = emulator::bits<uint32_t>(x);
    return {x != x ? uint16_t(0x7fff) : uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
  } else {
    return x;
  }
}

template <class T>
inline uint32_t pair_of(float lo, float hi) {
  return uint32_t(from_float<T>(lo).bits) | uint32_t(from_float<T>(hi).bits) << 16;
}
template <class T>
inline float2 floats_of_pair(uint32_t r) {
  return {to_float(T{uint16_t(r)}), to_float(T{uint16_t(r >> 16)})};
}

template <class T>
inline T load(const T* global) {
  emulator::check_global(global, sizeof(T), sizeof(T), false);
  return *global;
}
template <class T>
inline void store(T* global, T value) {
  emulator::check_global(global, sizeof(T), sizeof(T), true);
  *global = value;
}
template <int N, class T>
inline Vec<T, N> load_vec(const T* global) {
  using V = Vec<T, N>;
  static_assert(sizeof(V) == 16 || sizeof(V) == 8 || sizeof(V) == 4 || sizeof(V) == 2);
  emulator::check_global(global, sizeof(V), sizeof(V), false);
  V value;
  std::memcpy(&value, global, sizeof value);
  return value;
}
template <class T, int N>
inline void store_vec(T* global, const Vec<T, N>& value) {
  static_assert(sizeof value == 16 || sizeof value == 8 || sizeof value == 4 || sizeof value == 2);
  emulator::check_global(global, sizeof value, sizeof value, true);
  std::memcpy(global, &value, sizeof value);
}

template <class T>
inline T load_shared(const T* shared) {
  emulator::check_shared(shared, sizeof(T), sizeof(T), false);
  return *shared;
}
template <class T>
inline void store_shared(T* shared, T value) {
  emulator::check_shared(shared, sizeof(T), sizeof(T), true, &value);
  *shared = value;
}
template <int N, class T>
inline Vec<T, N> load_shared_vec(const T* shared) {
  using V = Vec<T, N>;
  emulator::check_shared(shared, sizeof(V), sizeof(V), false);
  V value;
  std::memcpy(&value, shared, sizeof value);
  return value;
}
template <class T, int N>
inline void store_shared_vec(T* shared, const Vec<T, N>& value) {
  emulator::check_shared(shared, sizeof value, sizeof value, true, &value);
  std::memcpy(shared, &value, sizeof value);
}

template <class T>
inline T load_acquire(const T* global) {
  emulator::spin();
  return load(global);
}
template <class T>
inline void store_release(T* global, T value) {
  store(global, value);
}

inline int multiprocessors() { return emulator::settings.multiprocessors; }
inline int compute_capability() { return emulator::settings.compute_capability; }
inline void fill_zero(void* global, size_t bytes, Stream) {
  emulator::find_range(reinterpret_cast<uintptr_t>(global), bytes, true);
  std::memset(global, 0, bytes);
}

}  // namespace tf::cuda

#define TF_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ((void)(stream), ::tf::cuda::detail::launch(#kernel, kernel, grid, block, shared_bytes, __VA_ARGS__))

namespace tf::cuda::detail {
template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, const A&... args) {
  emulator::launch(name, grid, block, shared, [&] { kernel(args...); });
}
}  // namespace tf::cuda::detail
