// How TMA and wgmma spread rows over the banks of shared memory: in every address, the index of the 16-byte chunk in
// the span is xor-ed with the index of the 128-byte line, modulo the chunks of the span.
#pragma once
#include <cstdint>

namespace tf::cuda {

enum class Swizzle : int32_t { none = 0, b32 = 1, b64 = 2, b128 = 3 };  // the span: bytes of a row

constexpr uint32_t swizzle_span(Swizzle s) { return s == Swizzle::none ? 16 : 16u << int32_t(s); }

}  // namespace tf::cuda
