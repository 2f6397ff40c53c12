// What each wrapper of csrc/cuda/ptx.cuh does, as the PTX ISA describes it.
#pragma once
#include "async.hpp"

namespace tf::cuda {

inline float flush(float x) { return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.f, x) : x; }
inline float exp2_approx(float x) { return flush(std::exp2(flush(x))); }
inline float rcp_approx(float x) { return flush(1.f / flush(x)); }

// Dynamic shared memory begins at 1024 on a GPU too: the first kilobyte is the system's.
inline uint32_t shared_address(const void* shared) {
  const auto offset = reinterpret_cast<uintptr_t>(shared) - reinterpret_cast<uintptr_t>(emulator::block->shared);
  if (offset > emulator::block->shared_bytes) emulator::fail_shared(reinterpret_cast<uintptr_t>(shared), 0);
  return uint32_t(offset) + emulator::kSharedBase;
}

inline void cp_async_16(void* shared, const void* global, bool valid = true) {
  emulator::cp_async(shared, global, 16, valid);
}
inline void cp_async_commit() { emulator::cp_async_commit(); }
template <int N>
inline void cp_async_wait() {
  emulator::cp_async_wait(N);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row) { emulator::ldmatrix(r, 4, false, shared_row); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row) { emulator::ldmatrix(r, 4, true, shared_row); }
inline void ldmatrix_x2(uint32_t (&r)[2], const void* shared_row) { emulator::ldmatrix(r, 2, false, shared_row); }
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* shared_row) { emulator::ldmatrix(r, 2, true, shared_row); }

template <class T>
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::mma_m16n8k16(std::is_same_v<T, half_t>, d, a, b);
}

}  // namespace tf::cuda

#include "ptx_sm90_model.hpp"
