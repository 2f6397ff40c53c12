// What each wrapper of csrc/cuda/ptx_sm90.cuh and ptx_wgmma.cuh does.
#pragma once
#include "async.hpp"
#include "simt.cuh"
#include "swizzle.hpp"

namespace tf::cuda {

inline void mbarrier_init(uint64_t* bar, uint32_t count) { emulator::mbarrier_init(bar, count); }
inline void mbarrier_fence_init() { emulator::mbarrier_fence_init(); }
inline void mbarrier_expect_tx(uint64_t* bar, uint32_t bytes) { emulator::mbarrier_arrive(bar, bytes); }
inline void mbarrier_arrive(uint64_t* bar) { emulator::mbarrier_arrive(bar, 0); }
inline void mbarrier_wait(uint64_t* bar, uint32_t parity) { emulator::mbarrier_wait(bar, parity); }

using TensorMap = emulator::TensorMap;

inline void tma_prefetch(const TensorMap*) {}
template <class... C>
inline void tma_load(void* shared, const TensorMap* map, uint64_t* bar, C... c) {
  emulator::tma_load(shared, *map, bar, {int(c)...}, sizeof...(c));
}
template <class... C>
inline void tma_store(const TensorMap* map, const void* shared, C... c) {
  emulator::tma_store(*map, shared, {int(c)...}, sizeof...(c), false);
}
template <class... C>
inline void tma_reduce_add(const TensorMap* map, const void* shared, C... c) {
  emulator::tma_store(*map, shared, {int(c)...}, sizeof...(c), true);
}
inline void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* bar) {
  emulator::bulk_load(shared, global, bytes, bar);
}
inline void bulk_reduce_add(float* global, const void* shared, uint32_t bytes) {
  emulator::bulk_reduce_add(global, shared, bytes);
}
inline void bulk_commit() { emulator::bulk_commit(); }
template <int N>
inline void bulk_wait() {
  emulator::bulk_wait(N, false);
}
template <int N>
inline void bulk_wait_read() {
  emulator::bulk_wait(N, true);
}
inline void fence_async_shared() { emulator::fence_async_shared(); }

inline void named_barrier_sync(int id, int threads) { emulator::barrier(id, unsigned(threads), true); }
inline void named_barrier_arrive(int id, int threads) { emulator::barrier(id, unsigned(threads), false); }

template <int N>
inline void registers_increase() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256);
  emulator::warp_instruction("setmaxnreg.inc", ~0u, nullptr, emulator::no_payload);
}
template <int N>
inline void registers_decrease() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256);
  emulator::warp_instruction("setmaxnreg.dec", ~0u, nullptr, emulator::no_payload);
}

inline void stmatrix_x4(void* shared_row, const uint32_t (&r)[4]) { emulator::stmatrix(r, 4, false, shared_row); }
inline void stmatrix_x4_trans(void* shared_row, const uint32_t (&r)[4]) { emulator::stmatrix(r, 4, true, shared_row); }

inline void warpgroup_fence() { emulator::warpgroup_fence(); }
inline void warpgroup_commit() { emulator::warpgroup_commit(); }
template <int N>
inline void warpgroup_wait() {
  emulator::warpgroup_wait(N);
}
template <int n>
inline void register_fence(float (&)[n]) {}
template <int n>
inline void register_fence(uint32_t (&)[n][4]) {}

template <class T, int N, bool ATrans = false, bool BTrans = false>
inline void wgmma_ss(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256);
  emulator::wgmma({std::is_same_v<T, half_t>, N, ATrans, BTrans, accumulate, true, a, b}, d, nullptr);
}
template <class T, int N, bool BTrans = false>
inline void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256);
  emulator::wgmma({std::is_same_v<T, half_t>, N, false, BTrans, accumulate, false, 0, b}, d, a);
}

using emulator::make_tensor_map;

}  // namespace tf::cuda

#include "descriptor.cuh"
