#include "cuda.hpp"

#if TF_CUDA_KERNELS
#include "cuda/rotary.hpp"
#include "cuda/rotary_append.hpp"
#include "rotary.hpp"

namespace tf::cuda::bindings {
namespace {

void rotary(Tensor x, Tensor cos, Tensor sin, OptionalTensor positions, bool interleaved, bool inverse, Tensor y) {
  const Device device(x);
  check_some(x, "x");
  Check{x}(y, "y").contiguous();
  cuda::rotary(rotary_of(x, cos, sin, positions, interleaved, inverse, y), device.stream());
}

void rotary_append(Tensor query, Tensor key, Tensor value, Tensor key_cache, Tensor value_cache, Tensor lengths,
                   Tensor cos, Tensor sin, OptionalTensor positions, OptionalTensor query_weight,
                   OptionalTensor key_weight, double eps, bool interleaved, Tensor y) {
  const Device device(query);
  check_some(query, "query");
  const RotaryAppend a = rotary_append_of(query, key, value, key_cache, value_cache, lengths, cos, sin, positions,
                                          query_weight, key_weight, eps, interleaved, y, query.scalar_type());
  cuda::rotary_append(a, device.stream());
}

}  // namespace
}  // namespace tf::cuda::bindings

TF_CUDA_IMPL(m) {
  m.impl("cuda_rotary", TORCH_BOX(&tf::cuda::bindings::rotary));
  m.impl("cuda_rotary_append", TORCH_BOX(&tf::cuda::bindings::rotary_append));
}
#endif

// x, y: (batch, length, heads, width), last stride 1, y contiguous; cos, sin: float32 (positions, half), contiguous;
// positions: int64 (batch, length). query, key, value: as x; caches: (batch, key heads, capacity, width), last stride
// 1; lengths: int32 or int64 (batch,); weights: (width,), contiguous, float32 or of query's dtype.
TF_CUDA_SCHEMA(m) {
  m.def(
      "cuda_rotary(Tensor x, Tensor cos, Tensor sin, Tensor? positions, bool interleaved, bool inverse, Tensor(a!) y) "
      "-> ()");
  m.def(
      "cuda_rotary_append(Tensor query, Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
      "Tensor lengths, Tensor cos, Tensor sin, Tensor? positions, Tensor? query_weight, Tensor? key_weight, float eps, "
      "bool interleaved, Tensor(c!) y) -> ()");
}
