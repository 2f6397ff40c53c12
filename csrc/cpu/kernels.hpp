// Arguments of every CPU kernel, as plain pointers and strides, and the table of kernels that each
// instruction set provides. Strides count elements.
#pragma once
#include <cstdint>

namespace tf {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2 };

struct Philox {  // dropout randomness: see philox.hpp
  uint64_t seed = 0, offset = 0;
  uint32_t threshold = 0;  // of 65536: an element is dropped when its 16 random bits are below
  float keep_scale = 1.f;  // 65536 / (65536 - threshold)
};

struct NormForward {
  DType dtype;
  const void *x, *residual;        // residual may be null
  const float *weight, *bias;      // may be null
  void *y, *sum;                   // sum may be null: residual + dropout(x)
  float *mean, *rstd;              // may be null; mean unused for rms
  int64_t rows, width;
  int64_t x_stride, residual_stride;  // between rows; y and sum are contiguous
  float eps;
  bool rms;
  Philox dropout;
};

struct Kernels {
  void (*norm_forward)(const NormForward&);
};

#ifdef TF_ISA
namespace TF_ISA {
void norm_forward(const NormForward&);
}
#endif

}  // namespace tf
