// What the bindings use of torch: only the stable ABI, so that one library serves every torch >= 2.11.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "cpu/kernels.hpp"

namespace tf {

using torch::stable::Tensor;
using ScalarType = torch::headeronly::ScalarType;
using OptionalTensor = std::optional<Tensor>;

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: STD_TORCH_CHECK(false, "transformer_fast: dtype must be float32, bfloat16 or float16");
  }
}
inline Storage storage_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Storage::f32;
    case ScalarType::BFloat16: return Storage::bf16;
    case ScalarType::Char: return Storage::i8;
    default: STD_TORCH_CHECK(false, "transformer_fast: a weight must be float32, bfloat16 or int8 panels");
  }
}
inline int64_t bytes_of(Storage s) { return s == Storage::f32 ? 4 : s == Storage::i8 ? 1 : 2; }
#ifdef TF_EMULATE
// The emulator checks every access of a kernel against the tensors that its binding passed to read() or write().
void name_tensor(const Tensor& t, const void* data, bool writable);
void forget_tensors();
#else
inline void name_tensor(const Tensor&, const void*, bool) {}
#endif

template <class T = void>
const T* read(const Tensor& t) {
  const void* data = t.const_data_ptr();
  name_tensor(t, data, false);
  return static_cast<const T*>(data);
}
template <class T = void>
const T* read(const OptionalTensor& t) {
  return t.has_value() ? read<T>(*t) : nullptr;
}
template <class T = void>
T* write(const Tensor& t) {
  void* data = t.mutable_data_ptr();
  name_tensor(t, data, true);
  return static_cast<T*>(data);
}
template <class T = void>
T* write(const OptionalTensor& t) {
  return t.has_value() ? write<T>(*t) : nullptr;
}

// Dropout with probability p drops an element when its 16 random bits are below the threshold.
inline uint32_t dropout_threshold(double p) {
  STD_TORCH_CHECK(0. <= p && p <= 1., "transformer_fast: dropout_p: wanted a probability, got ", p);
  const uint32_t threshold = uint32_t(p * 65536.0 + 0.5);
  return threshold < 65535 ? threshold : 65535;
}
inline float keep_scale_of(uint32_t threshold) { return float(65536.0 / (65536.0 - double(threshold))); }

// rng is an int64 tensor {seed, offset} on the CPU, or absent when nothing is dropped.
inline Philox philox_of(const OptionalTensor& rng, double p) {
  Philox result;
  if (!rng.has_value() || p <= 0) return result;
  STD_TORCH_CHECK(rng->is_cpu() && rng->scalar_type() == ScalarType::Long && rng->numel() == 2 && rng->is_contiguous(),
                  "transformer_fast: rng: wanted {seed, offset} in int64");
  const int64_t* state = read<int64_t>(*rng);
  result.seed = uint64_t(state[0]);
  result.offset = uint64_t(state[1]);
  result.threshold = dropout_threshold(p);
  result.keep_scale = keep_scale_of(result.threshold);
  return result;
}

const Kernels& kernels();  // of the instruction set in use

}  // namespace tf
