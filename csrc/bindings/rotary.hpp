// Tensors -> the arguments of the rotary kernels, for the CPU and for CUDA.
#pragma once
#include "cpu/rotary.hpp"
#include "tensors.hpp"

namespace tf {

// x, y: (batch, length, heads, width); cos, sin: float32 (positions, half), contiguous; positions: int64 (batch,
// length).
inline Rotary rotary_of(const Tensor& x, const Tensor& cos, const Tensor& sin, const OptionalTensor& positions,
                        bool interleaved, bool inverse, const Tensor& y) {
  Rotary a{};
  a.dtype = dtype_of(x);
  a.x = read(x);
  a.y = write(y);
  a.cos = read<float>(cos);
  a.sin = read<float>(sin);
  a.positions = read<int64_t>(positions);
  a.batch = x.size(0), a.length = x.size(1), a.heads = x.size(2), a.width = x.size(3), a.half = cos.size(1);
  a.x_batch = x.stride(0), a.x_token = x.stride(1), a.x_head = x.stride(2);
  a.y_batch = y.stride(0), a.y_token = y.stride(1), a.y_head = y.stride(2);
  if (positions.has_value()) a.position_batch = positions->stride(0), a.position_token = positions->stride(1);
  a.interleaved = interleaved;
  a.inverse = inverse;
  return a;
}

}  // namespace tf
