// Types that the arguments of all kernels share.
#pragma once
#include <cstdint>

namespace tf {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2 };

struct Philox {  // dropout randomness: see philox.hpp
  uint64_t seed = 0, offset = 0;
  uint32_t threshold = 0;  // of 65536: an element is dropped when its 16 random bits are below
  float keep_scale = 1.f;  // 65536 / (65536 - threshold)
};

}  // namespace tf
