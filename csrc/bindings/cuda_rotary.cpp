#include "cuda.hpp"

#if TF_CUDA_KERNELS
#include "cuda/rotary.hpp"
#include "rotary.hpp"

namespace tf::cuda::bindings {
namespace {

void rotary(Tensor x, Tensor cos, Tensor sin, OptionalTensor positions, bool interleaved, bool inverse, Tensor y) {
  const Device device(x);
  cuda::rotary(rotary_of(x, cos, sin, positions, interleaved, inverse, y), device.stream());
}

}  // namespace
}  // namespace tf::cuda::bindings

TF_CUDA_IMPL(m) { m.impl("cuda_rotary", TORCH_BOX(&tf::cuda::bindings::rotary)); }
#endif

// x, y: (batch, length, heads, width), last stride 1, y contiguous; cos, sin: float32 (positions, half), contiguous;
// positions: int64 (batch, length).
TF_CUDA_SCHEMA(m) {
  m.def(
      "cuda_rotary(Tensor x, Tensor cos, Tensor sin, Tensor? positions, bool interleaved, bool inverse, Tensor(a!) y) "
      "-> ()");
}
