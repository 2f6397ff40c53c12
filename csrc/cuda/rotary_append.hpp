// The CUDA kernel of the rotation of new queries and keys with the append to a cache; its arguments are the CPU's.
#pragma once
#include "cpu/rotary_append.hpp"

namespace tf::cuda {

using Stream = void*;  // cudaStream_t

void rotary_append(const RotaryAppend&, Stream);

}  // namespace tf::cuda
