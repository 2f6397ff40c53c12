// Work that a GPU does behind the threads' backs, and the matrix instructions.
#pragma once
#include "machine.hpp"

namespace tf::emulator {

constexpr uint32_t kSharedBase = 1024;

void cp_async(void* shared, const void* global, int bytes, bool valid);
void cp_async_commit();
void cp_async_wait(int groups);

void ldmatrix(uint32_t* registers, int matrices, bool transposed, const void* shared_row);
void mma_m16n8k16(bool half, float* d, const uint32_t* a, const uint32_t* b);

}  // namespace tf::emulator
