#include "rotary.hpp"

namespace tf {
namespace {

void rotary(Tensor x, Tensor cos, Tensor sin, OptionalTensor positions, bool interleaved, bool inverse, Tensor y) {
  kernels().rotary(rotary_of(x, cos, sin, positions, interleaved, inverse, y));
}

}  // namespace
}  // namespace tf

STABLE_TORCH_LIBRARY_IMPL(transformer_fast, CPU, m) { m.impl("cpu_rotary", TORCH_BOX(&tf::rotary)); }
