// The CUDA kernel of the rotary position embedding; its arguments are those of the CPU's. y is contiguous.
#pragma once
#include "cpu/rotary.hpp"

namespace tf::cuda {

using Stream = void*;  // cudaStream_t

void rotary(const Rotary&, Stream);

}  // namespace tf::cuda
