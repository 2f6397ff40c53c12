// What kernels use of torch, for a program without it: one thread, and scratch allocated to the byte, filled with NaN.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>

static int threads = 1;  // that the kernels share the work out for
extern "C" void tf_parallel_for(int64_t n, int64_t, void (*body)(int64_t, int64_t, void*), void* context) {
  for (int64_t i = 0; i < n; ++i) body(i, i + 1, context);
}
extern "C" int tf_num_threads() { return threads; }
extern "C" void* tf_scratch(int slot, int64_t bytes) {
  static void* buffers[8];
  std::free(buffers[slot]);
  buffers[slot] = std::aligned_alloc(64, size_t((bytes + 63) / 64 * 64));
  std::memset(buffers[slot], 0xff, size_t(bytes));
  return buffers[slot];
}
