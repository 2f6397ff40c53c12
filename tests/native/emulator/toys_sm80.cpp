#include "ptx.cuh"
#include "toys.hpp"

namespace tf::toys {
using namespace tf::cuda;

template <bool Barrier>
__global__ void __launch_bounds__(128) row_sum(const float* x, float* y, int width) {
  TF_SHARED(smem);
  float* partial = reinterpret_cast<float*>(smem);
  float s = 0;
  for (int i = int(threadIdx.x); i < width; i += 128) s += load(x + blockIdx.x * unsigned(width) + i);
  for (int o = 16; o; o >>= 1) s += __shfl_xor_sync(~0u, s, o);
  if (threadIdx.x % 32 == 0) store_shared(partial + threadIdx.x / 32, s);
  if (Barrier) __syncthreads();
  if (threadIdx.x == 0) {
    s = 0;
    for (int w = 0; w < 4; ++w) s += load_shared(partial + w);
    store(y + blockIdx.x, s);
  }
}

void bind_sm80(py::module_& m) {
  m.def("row_sum", [](Array<float> x, Array<float> y, bool barrier) {
    Clear clear;
    const float* px = in(x);
    float* py = out(y);
    const int width = int(x.shape(1));
    if (barrier) {
      TF_LAUNCH(row_sum<true>, dim3(unsigned(x.shape(0))), dim3(128), 16, nullptr, px, py, width);
    } else {
      TF_LAUNCH(row_sum<false>, dim3(unsigned(x.shape(0))), dim3(128), 16, nullptr, px, py, width);
    }
  });
}

}  // namespace tf::toys
