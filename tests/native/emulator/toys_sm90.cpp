#include "ptx.cuh"
#include "toys.hpp"

namespace tf::toys {
using namespace tf::cuda;

TensorMap map_of(DType dtype, const void* base, std::vector<uint64_t> sizes, std::vector<uint32_t> box,
                 Swizzle swizzle) {
  TensorMap map;
  uint64_t strides[4], bytes = dtype == DType::f32 ? 4 : 2;
  for (size_t i = 0; i + 1 < sizes.size(); ++i) strides[i] = bytes *= sizes[i];
  const std::string error =
      make_tensor_map(&map, dtype, base, int(sizes.size()), sizes.data(), strides, box.data(), swizzle);
  if (!error.empty()) throw std::runtime_error(error);
  return map;
}

enum Bug { none, no_wait, wrong_parity, no_fence, no_commit, wrong_swizzle, unread, too_few_bytes };

// C = A B^T, A (M, K), B (N, K): one producer thread fills a ring of `kStages`, a warpgroup multiplies a 64xN tile.
template <class T, int N, int kBug>
__global__ void __launch_bounds__(256, 1)
    ring_gemm(TF_GRID_CONSTANT TensorMap a, TF_GRID_CONSTANT TensorMap b, float* c, int n, int k) {
  constexpr int kStages = 2, kA = 64 * 128, kB = N * 128;
  TF_SHARED(smem);
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
        tma_load(smem + s * (kA + kB), &a, full + s, i * 64, int(blockIdx.x) * 64);
        tma_load(smem + s * (kA + kB) + kA, &b, full + s, i * 64, int(blockIdx.y) * N);
      }
    }
    return;
  }
  registers_increase<240>();
  float d[N / 2];
  for (int i = 0; i < steps; ++i) {
    const int s = i % kStages;
    const unsigned char* at = smem + s * (kA + kB);
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
}

template <int kBug>
void ring(Array<uint16_t> a, Array<uint16_t> b, Array<float> c) {
  const Clear clear;
  const auto m = unsigned(a.shape(0)), n = unsigned(b.shape(0)), k = unsigned(a.shape(1));
  const TensorMap ta = map_of(DType::bf16, in(a), {k, m}, {64, 64}, Swizzle::b128);
  const TensorMap tb = map_of(DType::bf16, in(b), {k, n}, {64, 80}, Swizzle::b128);
  TF_LAUNCH((ring_gemm<bf16_t, 80, kBug>), dim3(m / 64, n / 80), dim3(256), 2 * 144 * 128 + 32, nullptr, ta, tb, out(c),
            int(n), int(k));
}

// C (64, N) = A B over K = 32, both tiles by one TMA load of each span of a row. A: (64, 32) or, transposed, (32, 64)
// in memory; B: (N, 32) or (32, N). From registers: A's fragments come in `registers` (2, 128, 4).
template <class T, int N, bool ATrans, bool BTrans, Swizzle S, bool Registers>
__global__ void __launch_bounds__(128) product(TF_GRID_CONSTANT TensorMap a, TF_GRID_CONSTANT TensorMap b,
                                               const uint32_t* registers, float* c) {
  constexpr int kSpan = int(swizzle_span(S)) / 2;  // elements
  constexpr int kSpansA = (ATrans ? 64 : 32) / kSpan, kRowsA = ATrans ? 32 : 64;
  constexpr int kSpansB = (BTrans ? N : 32) / kSpan, kRowsB = BTrans ? 32 : N;
  constexpr int kPanelA = kRowsA * kSpan * 2, kPanelB = kRowsB * kSpan * 2;
  TF_SHARED(smem);
  unsigned char* const sb = smem + 64 * 32 * 2;
  auto* bar = reinterpret_cast<uint64_t*>(sb + N * 32 * 2);
  if (threadIdx.x == 0) {
    mbarrier_init(bar, 1);
    mbarrier_fence_init();
    mbarrier_expect_tx(bar, (Registers ? 0 : 64 * 32 * 2) + N * 32 * 2);
    for (int p = 0; !Registers && p < kSpansA; ++p) tma_load(smem + p * kPanelA, &a, bar, p * kSpan, 0);
    for (int p = 0; p < kSpansB; ++p) tma_load(sb + p * kPanelB, &b, bar, p * kSpan, 0);
  }
  __syncthreads();
  mbarrier_wait(bar, 0);
  float d[N / 2];
  uint32_t r[2][4];
  for (int k = 0; Registers && k < 2; ++k) {
    for (int i = 0; i < 4; ++i) r[k][i] = load(registers + (k * 128 + int(threadIdx.x)) * 4 + i);
  }
  warpgroup_fence();
  for (int k = 0; k < 2; ++k) {
    // The atoms of eight rows follow each other; a panel is one span wide.
    constexpr int kAtom = kSpan * 16;
    const auto step = [=](bool transposed, int panel) {
      return transposed ? 16 * k * kSpan * 2 : 16 * k / kSpan * panel + 16 * k % kSpan * 2;
    };
    const auto descriptor = [=](const unsigned char* at, bool transposed, int panel) {
      // Without a swizzle: K-major leading is from one 8-wide panel to the next; transposed, stride is.
      const bool flip = S == Swizzle::none && transposed;
      return wgmma_descriptor(at + step(transposed, panel), uint32_t(flip ? kAtom : panel),
                              uint32_t(flip ? panel : kAtom), S);
    };
    const uint64_t db = descriptor(sb, BTrans, kPanelB);
    if constexpr (Registers) {
      wgmma_rs<T, N, BTrans>(d, r[k], db, k > 0);
    } else {
      wgmma_ss<T, N, ATrans, BTrans>(d, descriptor(smem, ATrans, kPanelA), db, k > 0);
    }
  }
  warpgroup_commit();
  warpgroup_wait<0>();
  const int w = int(threadIdx.x) / 32, l = int(threadIdx.x) % 32;
  for (int e = 0; e < N / 2; ++e)
    store(c + (w * 16 + l / 4 + e % 4 / 2 * 8) * N + e / 4 * 8 + l % 4 * 2 + e % 2, d[e]);
}

template <class T, int N, bool ATrans, bool BTrans, Swizzle S, bool Registers>
void multiply(Array<uint16_t> a, Array<uint16_t> b, Array<uint32_t> registers, Array<float> c) {
  const Clear clear;
  constexpr uint32_t kSpan = swizzle_span(S) / 2;
  constexpr DType dtype = std::is_same_v<T, half_t> ? DType::f16 : DType::bf16;
  const auto tile = [](const uint16_t* x, bool transposed, unsigned rows) {
    return transposed ? map_of(dtype, x, {rows, 32}, {kSpan, 32}, S) : map_of(dtype, x, {32, rows}, {kSpan, rows}, S);
  };
  TF_LAUNCH((product<T, N, ATrans, BTrans, S, Registers>), dim3(1), dim3(128), 64 * 64 + N * 64 + 8, nullptr,
            tile(in(a), ATrans, 64), tile(in(b), BTrans, N), in(registers), out(c));
}

// A box (8, 64) of x (rows, columns) bf16 at (row, column): `raw`, the shared memory as it lies, and `back`, the box
// stored (add = 0) or added as float32 (add = 1) at the same place. bug 1: no fence before the store, 2: no wait after.
__global__ void __launch_bounds__(64) box(TF_GRID_CONSTANT TensorMap x, TF_GRID_CONSTANT TensorMap y,
                                          TF_GRID_CONSTANT TensorMap sum, uint16_t* raw, int row, int column, bool add,
                                          int bug) {
  TF_SHARED(smem);
  auto* bar = reinterpret_cast<uint64_t*>(smem + 4096);
  const int t = int(threadIdx.x);
  if (t == 0) {
    mbarrier_init(bar, 1);
    mbarrier_fence_init();
    mbarrier_expect_tx(bar, 1024);
    tma_load(smem, &x, bar, column, row);
  }
  __syncthreads();
  mbarrier_wait(bar, 0);
  const auto* s = reinterpret_cast<const uint16_t*>(smem);
  for (int i = t * 8; i < 512; i += 512) store_vec(raw + i, load_shared_vec<8>(s + i));
  auto* wide = reinterpret_cast<float*>(smem + 2048);
  for (int i = t; i < 512; i += 64) {
    // Row by row, unswizzled, as float32.
    const int at = i / 64 * 64 + ((i % 64 / 8) ^ (i / 64)) * 8 + i % 8;
    store_shared(wide + i, to_float(bf16_t{load_shared(s + at)}));
  }
  if (bug != 1) fence_async_shared();
  __syncthreads();
  if (t == 0) {
    add ? tma_reduce_add(&sum, wide, column, row) : tma_store(&y, smem, column, row);
    bulk_commit();
    if (bug != 2) bulk_wait_read<0>();
  }
}

// y += x, in rows of 64 floats, by copies without a map.
__global__ void __launch_bounds__(32) bulk(const float* x, float* y) {
  TF_SHARED(smem);
  auto* bar = reinterpret_cast<uint64_t*>(smem + 256);
  if (threadIdx.x == 0) {
    mbarrier_init(bar, 1);
    mbarrier_fence_init();
    mbarrier_expect_tx(bar, 256);
    bulk_load(smem, x + blockIdx.x * 64, 256, bar);
    mbarrier_wait(bar, 0);
    bulk_reduce_add(y + blockIdx.x * 64, smem, 256);
    bulk_commit();
    bulk_wait<0>();
  }
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
  // wgmma_<dtype>_<N>_<A>_<B>_<swizzle>
  m.def("wgmma_bf16_64_k_k_64", multiply<bf16_t, 64, false, false, Swizzle::b64, false>);
  m.def("wgmma_f16_96_k_k_32", multiply<half_t, 96, false, false, Swizzle::b32, false>);
  m.def("wgmma_f16_80_k_k_none", multiply<half_t, 80, false, false, Swizzle::none, false>);
  m.def("wgmma_bf16_128_k_t_64", multiply<bf16_t, 128, false, true, Swizzle::b64, false>);
  m.def("wgmma_bf16_192_t_t_128", multiply<bf16_t, 192, true, true, Swizzle::b128, false>);
  m.def("wgmma_f16_64_t_t_64", multiply<half_t, 64, true, true, Swizzle::b64, false>);
  m.def("wgmma_bf16_48_t_t_32", multiply<bf16_t, 48, true, true, Swizzle::b32, false>);
  m.def("wgmma_f16_32_t_t_none", multiply<half_t, 32, true, true, Swizzle::none, false>);
  m.def("wgmma_bf16_256_r_t_128", multiply<bf16_t, 256, false, true, Swizzle::b128, true>);
  m.def("wgmma_f16_176_r_k_64", multiply<half_t, 176, false, false, Swizzle::b64, true>);
  m.def("box", [](Array<uint16_t> x, Array<uint16_t> raw, Array<uint16_t> y, Array<float> sum, int row, int column,
                  bool add, int bug) {
    const Clear clear;
    const auto rows = unsigned(x.shape(0)), columns = unsigned(x.shape(1));
    const TensorMap tx = map_of(DType::bf16, in(x), {columns, rows}, {64, 8}, Swizzle::b128);
    const TensorMap ty = map_of(DType::bf16, out(y), {columns, rows}, {64, 8}, Swizzle::b128);
    const TensorMap tsum = map_of(DType::f32, out(sum), {columns, rows}, {64, 8}, Swizzle::none);
    TF_LAUNCH(box, dim3(1), dim3(64), 4096 + 8, nullptr, tx, ty, tsum, out(raw), row, column, add, bug);
  });
  m.def("bulk", [](Array<float> x, Array<float> y) {
    const Clear clear;
    TF_LAUNCH(bulk, dim3(unsigned(x.shape(0))), dim3(32), 264, nullptr, in(x), out(y));
  });
}

}  // namespace tf::toys
