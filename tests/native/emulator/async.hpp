// Work that a GPU does behind the threads' backs, and the matrix instructions.
#pragma once
#include "types.hpp"
#include "machine.hpp"
#include "swizzle.hpp"

namespace tf::emulator {

constexpr uint32_t kSharedBase = 1024;

void cp_async(void* shared, const void* global, int bytes, bool valid);
void cp_async_commit();
void cp_async_wait(int groups);

void ldmatrix(uint32_t* registers, int matrices, bool transposed, const void* shared_row);
void stmatrix(const uint32_t* registers, int matrices, bool transposed, void* shared_row);
void mma_m16n8k16(bool half, float* d, const uint32_t* a, const uint32_t* b);

void mbarrier_init(uint64_t* bar, uint32_t count);
void mbarrier_fence_init();
void mbarrier_arrive(uint64_t* bar, uint32_t expected_bytes);
void mbarrier_wait(uint64_t* bar, uint32_t parity);

struct alignas(64) TensorMap {
  unsigned char* base;
  int rank, element;  // bytes of an element
  DType dtype;
  cuda::Swizzle swizzle;
  uint64_t sizes[5], strides[5];  // strides: bytes, of every dimension
  uint32_t box[5];
};
std::string make_tensor_map(TensorMap* map, DType dtype, const void* base, int rank, const uint64_t* sizes,
                            const uint64_t* strides_bytes, const uint32_t* box, cuda::Swizzle swizzle);
using Coordinates = std::array<int, 5>;
void tma_load(void* shared, const TensorMap& map, uint64_t* bar, Coordinates at, int coordinates);
void tma_store(const TensorMap& map, const void* shared, Coordinates at, int coordinates, bool add);
void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* bar);
void bulk_reduce_add(float* global, const void* shared, uint32_t bytes);
void bulk_commit();
void bulk_wait(int groups, bool read_only);
void fence_async_shared();

struct Product {  // one wgmma
  bool half;
  int n;
  bool a_transposed, b_transposed, accumulate, a_shared;
  uint64_t a, b;  // descriptors
};
void wgmma(const Product& product, float* d, const uint32_t* a);
void warpgroup_fence();
void warpgroup_commit();
void warpgroup_wait(int groups);

}  // namespace tf::emulator
