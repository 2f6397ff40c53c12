// The CUDA kernel of the rotary position embedding. Its arguments are those of the CPU kernel; y must be contiguous.
#pragma once
#include "cpu/rotary.hpp"

namespace tf::cuda {

using Stream = void*;  // cudaStream_t

void rotary(const Rotary&, Stream);

}  // namespace tf::cuda
