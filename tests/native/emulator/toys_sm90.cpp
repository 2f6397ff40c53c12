// C = A B^T, A (M, K), B (N, K), by a TMA ring and wgmma.
#include "ptx.cuh"
#include "toys.hpp"

namespace tf::toys {
using namespace tf::cuda;

enum Bug { none, no_wait, wrong_parity, no_fence, no_commit, wrong_swizzle, unread, too_few_bytes };

// One producer warpgroup's thread fills a ring of `kStages`, one consumer warpgroup multiplies a 64xN tile.
template <class T, int N, int kBug>
__global__ void __launch_bounds__(256, 1)
    ring_gemm(TF_GRID_CONSTANT TensorMap a, TF_GRID_CONSTANT TensorMap b, float* c, int n, int k) {
#if TF_SM90A
  constexpr int kStages = 2, kA = 64 * 128, kB = N * 128;
  TF_SHARED(smem);
  unsigned char* tiles = smem;
  auto* full = reinterpret_cast<uint64_t*>(smem + kStages * (kA + kB));
  uint64_t* empty = full + kStages;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      mbarrier_init(full + s, 1);
      mbarrier_init(empty + s, 128);
    }
    mbarrier_fence_init();
  }
  __syncthreads();
  const int steps = k / 64;
  if (threadIdx.x >= 128) {
    registers_decrease<24>();
    if (threadIdx.x == 128) {
      for (int i = 0; i < steps; ++i) {
        const int s = i % kStages;
        mbarrier_wait(empty + s, unsigned(i / kStages & 1) ^ 1u);
        mbarrier_expect_tx(full + s, kBug == too_few_bytes ? kA : kA + kB);
        tma_load(tiles + s * (kA + kB), &a, full + s, i * 64, int(blockIdx.x) * 64);
        tma_load(tiles + s * (kA + kB) + kA, &b, full + s, i * 64, int(blockIdx.y) * N);
      }
    }
    return;
  }
  registers_increase<240>();
  float d[N / 2];
  for (int i = 0; i < steps; ++i) {
    const int s = i % kStages;
    const unsigned char* at = tiles + s * (kA + kB);
    if (kBug != no_wait && !(kBug == unread && i + 1 == steps))
      mbarrier_wait(full + s, unsigned(i / kStages & 1) ^ unsigned(kBug == wrong_parity));
    if (kBug != no_fence) warpgroup_fence();
    constexpr Swizzle swizzle = kBug == wrong_swizzle ? Swizzle::b64 : Swizzle::b128;
    for (int j = 0; j < 4; ++j)
      wgmma_ss<T, N>(d, wgmma_descriptor(at + j * 32, 16, 1024, swizzle),
                     wgmma_descriptor(at + kA + j * 32, 16, 1024, swizzle), i + j > 0);
    if (kBug != no_commit) warpgroup_commit();
    warpgroup_wait<0>();
    mbarrier_arrive(empty + s);
  }
  const int w = int(threadIdx.x) / 32, l = int(threadIdx.x) % 32;
  for (int e = 0; e < N / 2; ++e) {
    const int row = int(blockIdx.x) * 64 + w * 16 + l / 4 + e % 4 / 2 * 8;
    store(c + row * n + int(blockIdx.y) * N + e / 4 * 8 + l % 4 * 2 + e % 2, d[e]);
  }
#endif
}

template <int kBug>
void ring(Array<uint16_t> a, Array<uint16_t> b, Array<float> c) {
  const Clear clear;
  const int m = int(a.shape(0)), n = int(b.shape(0)), k = int(a.shape(1));
  TensorMap ta, tb;
  const uint64_t sizes_a[2] = {uint64_t(k), uint64_t(m)}, sizes_b[2] = {uint64_t(k), uint64_t(n)};
  const uint64_t stride[1] = {uint64_t(k) * 2};
  const uint32_t box_a[2] = {64, 64}, box_b[2] = {64, 80};
  std::string error = make_tensor_map(&ta, DType::bf16, in(a), 2, sizes_a, stride, box_a, Swizzle::b128);
  error += make_tensor_map(&tb, DType::bf16, in(b), 2, sizes_b, stride, box_b, Swizzle::b128);
  if (!error.empty()) throw std::runtime_error(error);
  TF_LAUNCH((ring_gemm<bf16_t, 80, kBug>), dim3(unsigned(m / 64), unsigned(n / 80)), dim3(256), 2 * 144 * 128 + 32, nullptr, ta, tb, out(c), n, k);
}

void bind_sm90(py::module_& m) {
  m.def("ring_gemm", ring<none>);
  m.def("ring_gemm_no_wait", ring<no_wait>);
  m.def("ring_gemm_wrong_parity", ring<wrong_parity>);
  m.def("ring_gemm_no_fence", ring<no_fence>);
  m.def("ring_gemm_no_commit", ring<no_commit>);
  m.def("ring_gemm_wrong_swizzle", ring<wrong_swizzle>);
  m.def("ring_gemm_unread", ring<unread>);
  m.def("ring_gemm_too_few_bytes", ring<too_few_bytes>);
}

}  // namespace tf::toys
