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

// out (6, 32): what each lane gets of the value 100 * lane + 7.
__global__ void shuffles(int* out) {
  const int l = int(threadIdx.x), v = 100 * l + 7;
  const int got[6] = {__shfl_sync(~0u, v, l * 5),         __shfl_xor_sync(~0u, v, 6),
                      __shfl_down_sync(~0u, v, 3),        __shfl_up_sync(~0u, v, 3),
                      __shfl_xor_sync(~0u, v, 1, 8),      int(__ballot_sync(~0u, l % 3 == 0))};
  for (int i = 0; i < 6; ++i) store(out + i * 32 + l, got[i]);
}

// a, b, d: registers of each lane, (32, 4), (32, 2), (32, 4).
template <class T>
__global__ void mma(const uint32_t* a, const uint32_t* b, float* d) {
  const unsigned l = threadIdx.x;
  uint32_t ra[4], rb[2];
  float rd[4];
  for (unsigned i = 0; i < 4; ++i) ra[i] = load(a + l * 4 + i);
  for (unsigned i = 0; i < 2; ++i) rb[i] = load(b + l * 2 + i);
  for (unsigned i = 0; i < 4; ++i) rd[i] = load(d + l * 4 + i);
  mma_m16n8k16<T>(rd, ra, rb);
  for (unsigned i = 0; i < 4; ++i) store(d + l * 4 + i, rd[i]);
}

// x: four 8x8 matrices; out (32, 4) registers, of ldmatrix; stored back by stmatrix to `back`.
__global__ void matrices(const uint16_t* x, uint32_t* out, uint16_t* back, int count, bool transposed) {
  TF_SHARED(smem);
  auto* s = reinterpret_cast<uint16_t*>(smem);
  const unsigned l = threadIdx.x;
  store_shared_vec(s + l * 8, load_vec<8>(x + l * 8));
  __syncwarp();
  uint32_t r[4] = {}, two[2];
  if (count == 4) {
    transposed ? ldmatrix_x4_trans(r, s + l * 8) : ldmatrix_x4(r, s + l * 8);
  } else {
    transposed ? ldmatrix_x2_trans(two, s + l % 16 * 8) : ldmatrix_x2(two, s + l % 16 * 8);
    r[0] = two[0];
    r[1] = two[1];
  }
  for (unsigned i = 0; i < 4; ++i) store(out + l * 4 + i, r[i]);
  transposed ? stmatrix_x4_trans(s + 256 + l * 8, r) : stmatrix_x4(s + 256 + l * 8, r);
  __syncwarp();
  store_vec(back + l * 8, load_shared_vec<8>(s + 256 + l * 8));
}

// y = x through a ring of cp.async, where i < valid; zeros beyond. bug 1: no wait, 2: no commit, 3: no barrier.
__global__ void __launch_bounds__(64) copy(const float* x, float* y, int valid, int bug) {
  TF_SHARED(smem);
  float* s = reinterpret_cast<float*>(smem);
  const int t = int(threadIdx.x);
  for (int step = 0; step < 5; ++step) {
    if (step < 4) cp_async_16(s + step % 2 * 256 + t * 4, x + step * 256 + t * 4, step * 256 + t * 4 < valid);
    if (bug != 2) cp_async_commit();
    if (step > 0) {
      if (bug != 1) cp_async_wait<1>();
      if (bug != 3) __syncthreads();
      const int other = 63 - t;
      store_vec(y + (step - 1) * 256 + other * 4, load_shared_vec<4>(s + (step - 1) % 2 * 256 + other * 4));
      __syncthreads();
    }
  }
}

// Each `kind` is one fault.
__global__ void __launch_bounds__(64) fault(const float* x, float* y, int kind) {
  TF_SHARED(smem);
  float* s = reinterpret_cast<float*>(smem);
  const int t = int(threadIdx.x);
  if (kind == 0) store(y + t, load(x + t + 1));                       // off by one at the tail
  if (kind == 1) store(y + t + 1, 1.f);                               // the same, written
  if (kind == 2) store(const_cast<float*>(x) + t, 1.f);               // an input is written
  if (kind == 3) store_vec(y, load_vec<4>(x + 1));                    // misaligned
  if (kind == 4) store_shared(s + 64 + t, 1.f);                       // out of shared memory
  if (kind == 5 && t < 32) __syncthreads();                           // half the block
  if (kind == 6) {
    if (t == 3) return;  // exited
    __syncthreads();
  }
  if (kind == 7 && t % 32 < 16) __syncwarp();                         // half a warp
  if (kind == 8) {
    if (t < 32) {
      __shfl_sync(~0u, 1, 0);  // another lane's instruction
    } else if (t < 48) {
      __shfl_sync(~0u, 1, 0);
    } else {
      __syncwarp();
    }
  }
  if (kind == 9) named_barrier_sync(1, 96);                           // more threads than there are
  if (kind == 10) {
    named_barrier_arrive(1, 96);
    named_barrier_arrive(1, 96);  // twice in a phase
  }
  if (kind == 11) {
    while (load_acquire(x) != -1.f) {
    }  // nobody will write it
  }
  if (kind == 12) store(y + t, __shfl_sync(0xffffu << t / 16 % 2 * 16, 1.f, 31));  // from a lane outside the mask
  if (kind == 13) store_shared(s + (t == 33), float(t));              // a race on one word
  if (kind == 14) {
    store_shared_vec(s + t % 16 * 4 + 1, Vec<float, 2>{{1.f, 2.f}});  // misaligned, shared
  }
  if (kind >= 15) {
    auto* bar = reinterpret_cast<uint64_t*>(smem);
    if (t == 0) {
      mbarrier_init(bar, 1);
      if (kind != 15) mbarrier_fence_init();
    }
    __syncthreads();
    if (kind == 15 && t == 1) mbarrier_arrive(bar);                   // before the fence
    if (kind == 16 && t == 0) {
      store_shared(s, 0.f);  // over the mbarrier
      mbarrier_arrive(bar);
    }
    if (kind >= 17 && t == 0) mbarrier_expect_tx(bar, 16);            // bytes that never come
    if (kind == 18 && t == 0) mbarrier_arrive(bar);                   // the second of one arrival
  }
}

// No fault: both warps write the same value, and each reads what it has written.
__global__ void __launch_bounds__(64) twins(float* y) {
  TF_SHARED(smem);
  auto* s = reinterpret_cast<float*>(smem);
  store_shared(s + threadIdx.x % 32, 3.f);
  __syncwarp();
  store(y + threadIdx.x, load_shared(s + 31 - threadIdx.x % 32));
}

void bind_sm80(py::module_& m) {
  m.def("row_sum", [](Array<float> x, Array<float> y, bool barrier) {
    const Clear clear;
    const dim3 rows(unsigned(x.shape(0)));
    const float* px = in(x);
    float* py = out(y);
    const int width = int(x.shape(1));
    barrier ? TF_LAUNCH(row_sum<true>, rows, dim3(128), 16, nullptr, px, py, width)
            : TF_LAUNCH(row_sum<false>, rows, dim3(128), 16, nullptr, px, py, width);
  });
  m.def("shuffles", [](Array<int> y) {
    const Clear clear;
    TF_LAUNCH(shuffles, dim3(1), dim3(32), 0, nullptr, out(y));
  });
  m.def("mma", [](bool half, Array<uint32_t> a, Array<uint32_t> b, Array<float> d) {
    const Clear clear;
    half ? TF_LAUNCH(mma<half_t>, dim3(1), dim3(32), 0, nullptr, in(a), in(b), out(d))
         : TF_LAUNCH(mma<bf16_t>, dim3(1), dim3(32), 0, nullptr, in(a), in(b), out(d));
  });
  m.def("matrices", [](Array<uint16_t> x, Array<uint32_t> y, Array<uint16_t> back, int count, bool transposed) {
    const Clear clear;
    TF_LAUNCH(matrices, dim3(1), dim3(32), 1024, nullptr, in(x), out(y), out(back), count, transposed);
  });
  m.def("copy", [](Array<float> x, Array<float> y, int valid, int bug) {
    const Clear clear;
    TF_LAUNCH(copy, dim3(1), dim3(64), 2048, nullptr, in(x), out(y), valid, bug);
  });
  m.def("twins", [](Array<float> y) {
    const Clear clear;
    TF_LAUNCH(twins, dim3(1), dim3(64), 128, nullptr, out(y));
  });
  m.def("fault", [](Array<float> x, Array<float> y, int kind) {
    const Clear clear;
    TF_LAUNCH(fault, dim3(1), dim3(64), 256, nullptr, in(x), out(y), kind);
  });
}

}  // namespace tf::toys
